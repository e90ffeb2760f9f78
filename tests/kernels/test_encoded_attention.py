"""`encoded_attention`: attention over what codes decode to and what lies beside them, as float64 has it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.codecs import CODECS, ChannelGroups, Codec, EntryShape, ExactCodec, PairCodec, SkvqCodec
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention
from tests.kernels.compare import assert_accurate

Run = Callable[..., Any]
NO_PAGE = 10**6  # in a page table where nobody may look
BLOCK_SIZE = 16
HEAD_DIMS = (64, 128, 32, 80, 96, 256, 8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Part:
    """Entries of each sequence stored in one way.

    Fields:
        tensors: pages, tables, lengths, and channels where they are given.
        others: the other fields of `PagedEntries`.
        keys, values: as attention reads them, all channels, [n, D] of each sequence.
    """

    tensors: dict[str, Tensor]
    others: dict[str, Any]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def paged(records: Sequence[Tensor], num_entries: Sequence[int], width: int, seed: int) -> dict[str, Tensor]:
    """Records of each sequence, [n, B] uint8, in pages all over a pool that is otherwise 255; pages lie apart."""
    generator = torch.Generator().manual_seed(seed)
    size = records[0].shape[1]
    per_page = width // size
    num_pages = [-(-len(each) // per_page) for each in records]
    ids = torch.randperm(sum(num_pages) + 3, generator=generator).to(torch.int32)
    pool = torch.full((len(ids), width + 8), 255, dtype=torch.uint8)
    tables = torch.full((len(records), max(num_pages) + 1), NO_PAGE, dtype=torch.int32)
    for row, count, each in zip(tables, num_pages, records, strict=True):
        row[:count], ids = ids[:count], ids[count:]
        for i, record in enumerate(each):
            at = i % per_page * size
            pool[int(row[i // per_page]), at : at + size] = record
    return {"pages": pool[:, :width], "tables": tables, "lengths": torch.tensor(num_entries, dtype=torch.int32)}


def decode(codec: Codec, entry: EntryShape, records: Tensor) -> tuple[Tensor, Tensor]:
    return codec.decode(records[:, : codec.read_bytes(entry)], entry)


def stored(
    lengths: Sequence[int],
    codec: Codec,
    entry: EntryShape,
    *,
    read: Codec | None = None,
    first: int = 0,
    channels: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Part:
    """Entries of so many for each sequence, of `entry.head_dim` channels if all are stored; `read` reads them."""
    generator = torch.Generator().manual_seed(seed)
    read = codec if read is None else read
    data, keys, values = [], [], []
    for length in lengths:
        whole = -(-length // codec.group_size) * codec.group_size
        vectors = [
            torch.randn(max(whole, codec.group_size), size, generator=generator).to(entry.dtype)
            for size in (entry.key_dim, entry.value_dim)
        ]
        records = codec.encode(*vectors)
        data.append(records[: whole // codec.group_size])
        for found, each in zip((keys, values), decode(read, entry, records), strict=True):
            found.append(each[first:length].to(entry.dtype))
    width = max(BLOCK_SIZE * 2 * entry.head_dim * entry.dtype.itemsize, codec.num_bytes(entry))
    others = {"form": read.form(entry), "decode": partial(decode, read, entry), "first": first}
    part = Part(paged(data, lengths, width, seed) | dict(channels or {}), others)
    for name, of_sequences, into in (("key_channels", keys, part.keys), ("value_channels", values, part.values)):
        for s, each in enumerate(of_sequences):
            if name in part.tensors:
                places = part.tensors[name][s].expand(len(each), -1)
                each = each.new_zeros(len(each), entry.head_dim).scatter_(1, places, each)
            into.append(each)
    return part


def as_they_are(lengths: Sequence[int], head_dim: int, dtype: torch.dtype) -> Part:
    return stored(lengths, ExactCodec(), EntryShape(head_dim, dtype), seed=1)


class Case:
    """Queries for sequences of some parts.

    Fields:
        arguments: tensors of `attend`: queries, then those of each part.
        settings: its others.
        keys, values: of each sequence, [n, D].
    """

    def __init__(self, parts: Sequence[Part], head_dim: int, dtype: torch.dtype, group: int = 4) -> None:
        num_sequences = len(parts[0].keys)
        generator = torch.Generator().manual_seed(head_dim + group + num_sequences)
        queries = torch.randn(num_sequences, group, head_dim, generator=generator).to(dtype)
        self.arguments = (queries, *(tensor for part in parts for tensor in part.tensors.values()))
        names = [(tuple(part.tensors), part.others) for part in parts]
        self.settings: dict[str, Any] = {"parts": names, "scale": head_dim**-0.5}
        self.keys = [torch.cat(each) for each in zip(*(part.keys for part in parts), strict=True)]
        self.values = [torch.cat(each) for each in zip(*(part.values for part in parts), strict=True)]

    @classmethod
    def of(
        cls,
        lengths: Sequence[tuple[int, int]],
        *,
        codec: str = "int4",
        head_dim: int = 64,
        group: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> "Case":
        """Sequences of so many encoded entries and so many that are not."""
        encoded, dense = zip(*lengths, strict=True)
        first = stored(encoded, CODECS[codec], EntryShape(head_dim, dtype))
        return cls([first, as_they_are(dense, head_dim, dtype)], head_dim, dtype, group)

    def softmax(self, to: torch.dtype, chunk: int | None = None) -> Tensor:
        """By torch in this dtype, [S, G, D]; in chunks of so many entries merged by log-sum-exp where given."""
        out = []
        for q, k, v in zip(self.arguments[0].to(to), self.keys, self.values, strict=True):
            logits = q @ k.to(to).T * self.settings["scale"]
            if chunk is None:
                out.append(logits.softmax(dim=1) @ v.to(to))
                continue
            parts = [
                (part.logsumexp(1), part.softmax(1) @ values)
                for part, values in zip(logits.split(chunk, dim=1), v.to(to).split(chunk), strict=True)
            ]
            weights = torch.stack([lse for lse, _ in parts]).softmax(dim=0).unsqueeze(2)
            out.append((weights * torch.stack([part for _, part in parts])).sum(dim=0))
        return torch.stack(out)


def attend(
    queries: Tensor, *tensors: Tensor, parts: Sequence[tuple[Any, Any]], scale: float, impl: str | None = None
) -> Tensor:
    """The op on tensors: what runs elsewhere takes them and returns one."""
    left = iter(tensors)
    made = [PagedEntries(**{name: next(left) for name in names}, **others) for names, others in parts]
    return encoded_attention(queries, made, scale=scale, impl=impl)


def check(form: Run, case: Case) -> None:
    dtype = case.arguments[0].dtype
    found = form(attend, *case.arguments, **case.settings)
    assert_accurate(found, case.softmax(torch.float64), [case.softmax(dtype), case.softmax(dtype, 7)])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codecs_and_dtypes(form: Run, codec: str, dtype: torch.dtype) -> None:
    check(form, Case.of([(75, 19), (33, 1), (64, 2)], codec=codec, dtype=dtype))


@pytest.mark.parametrize("codec", ["fp8", "kivi2", "int4x2", "skvq"])
def test_wide_heads(form: Run, codec: str) -> None:
    check(form, Case.of([(40, 3)], codec=codec, head_dim=128))


def test_four_of_eight_bits(form: Run) -> None:
    """A draft's reading of records that hold both halves."""
    whole = CODECS["int4x2"]
    codes = stored((50, 16), whole, EntryShape(64, torch.float32), read=whole.draft_view())
    check(form, Case([codes, as_they_are((3, 1), 64, torch.float32)], 64, torch.float32))


@pytest.mark.parametrize("codec", ["exact", "int4", "kivi4", "skvq", "fp8"])
@pytest.mark.parametrize("ratios", [(0.5, 1.0), (1.0, 0.5), (0.25, 0.5)])
def test_fewer_channels(form: Run, codec: str, ratios: tuple[float, float]) -> None:
    """Those of the keys, of the values or both, others for each sequence."""
    entry = EntryShape(128, torch.float32, *ratios)
    generator = torch.Generator().manual_seed(2)
    channels = {
        name: torch.stack([torch.randperm(128, generator=generator)[:size].sort().values for _ in range(2)])
        for name, size in (("key_channels", entry.key_dim), ("value_channels", entry.value_dim))
        if size < 128
    }
    part = stored((45, 64), CODECS[codec], entry, channels=channels)
    check(form, Case([part, as_they_are((5, 1), 128, torch.float32)], 128, torch.float32))


def test_channels_in_an_order_of_their_own(form: Run) -> None:
    """skvq's groups: attention reads them in the order in which they are stored."""
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(64, generator=generator) for _ in range(4)]).view(2, 2, 64)
    entry, lengths = EntryShape(64, torch.float32), (40, 23)
    codec = SkvqCodec(ChannelGroups(orders, torch.full((2, 2, 2), 0.9)))
    vectors = torch.randn(2, sum(lengths), 64, generator=generator)
    codec = codec.of_heads(torch.arange(2).repeat_interleave(torch.tensor(lengths)))
    data, keys, values = codec.encode(*vectors), *codec.decode(codec.encode(*vectors), entry)
    in_order = codec.orders(torch.arange(2))
    assert in_order is not None
    tensors = paged(data.split(lengths), lengths, BLOCK_SIZE * 512, 3)
    tensors |= {"key_channels": in_order[:, 0], "value_channels": in_order[:, 1]}
    others = {"form": codec.form(entry), "decode": partial(decode, codec.as_stored(), entry)}
    part = Part(tensors, others, list(keys.split(lengths)), list(values.split(lengths)))
    check(form, Case([part], 64, torch.float32))


def test_entries_before_the_first(form: Run) -> None:
    """Their places hold something else; a sequence has no others."""
    entry = EntryShape(64, torch.float32)
    part = stored((50, 20, 4), CODECS["skvq"], entry, first=7)
    check(form, Case([part, as_they_are((4, 1, 2), 64, torch.float32)], 64, torch.float32))


@pytest.mark.parametrize("values_only", [True, False], ids=["values", "keys and values"])
@pytest.mark.parametrize("vectors", ["exact", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_stored_as_one(form: Run, values_only: bool, vectors: str, dtype: torch.dtype) -> None:
    """Of the lower layer all from the records, of the upper one those that are not retained, and these elsewhere."""
    generator = torch.Generator().manual_seed(4)
    of_vectors = CODECS[vectors]
    codec, entry = PairCodec(0.6, 0.3, values_only, of_vectors), EntryShape(64, dtype)
    lower, upper = torch.randn(2, 2, 2, 40, 64, generator=generator).to(dtype)
    upper = (upper + lower * torch.rand(2, 1, 40, 1, generator=generator) * 3).to(dtype)
    records, retained = codec.merge(lower.clone(), upper.clone(), 9)
    assert retained.any(dim=1).all() and not retained.all()
    own = [of_vectors.encode(*upper[s, :, retained[s]].unbind()) for s in range(2)]
    found = [len(each) for each in own]
    tensors = paged(list(records), (40, 40), BLOCK_SIZE * 512, 4)
    for above in (False, True):
        decoded = [codec.decode(each, entry, upper=above) for each in records]
        others = {"form": codec.form(entry, upper=above), "decode": partial(codec.decode, entry=entry, upper=above)}
        stays = [~each if above else torch.ones_like(each) for each in retained]
        keys, values = ([pair[i][stays[s]].to(dtype) for s, pair in enumerate(decoded)] for i in range(2))
        parts = [Part(tensors, others, keys, values)]
        if above:
            others = {"form": of_vectors.form(entry), "decode": partial(decode, of_vectors, entry)}
            again = [[x.to(dtype) for x in of_vectors.decode(each, entry)] for each in own]
            vectors_again = ([each[i] for each in again] for i in range(2))
            parts.append(Part(paged(own, found, BLOCK_SIZE * 512, 5), others, *vectors_again))
        check(form, Case([*parts, as_they_are((3, 1), 64, dtype)], 64, dtype))


LENGTHS = {
    "one": [(0, 1)],
    "a page and its neighbours": [(n, n) for n in (15, 16, 17)],
    "one of each": [(1, 1)],
    "nothing dense": [(40, 0), (0, 3)],
    "more than a tile a share": [(16 * 32 + 1, 5), (31, 16 * 32 + 33)],
}


@pytest.mark.parametrize("codec", ["int4", "kivi4", "int4x2"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(form: Run, lengths: list[tuple[int, int]], codec: str) -> None:
    check(form, Case.of(lengths, codec=codec))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(form: Run, head_dim: int) -> None:
    """Groups of a power of two and others."""
    dtype = torch.float16 if head_dim > 128 else torch.float32
    check(form, Case.of([(21, 2), (50, 18)], head_dim=head_dim, codec="int8", dtype=dtype))
    check(form, Case.of([(21, 2)], head_dim=head_dim, codec="int2", dtype=dtype))


@pytest.mark.parametrize("group", [1, 8, 17])
def test_group_sizes(form: Run, group: int) -> None:
    check(form, Case.of([(30, 4)], group=group))


def test_a_sequence_stands_for_itself(form: Run) -> None:
    """Beside others, in the same bits."""
    case = Case.of([(100, 3), (7, 40), (64, 16)])
    together = form(attend, *case.arguments, **case.settings)
    queries, pages, tables, lengths, rows, row_tables, num_rows = case.arguments
    alone = form(
        attend, queries[1:2], pages, tables[1:2], lengths[1:2], rows, row_tables[1:2], num_rows[1:2], **case.settings
    )
    assert torch.equal(alone[0], together[1])


def test_large_logits(form: Run) -> None:
    """One entry takes all, among the codes or beside them; nothing overflows."""
    case = Case.of([(40, 10), (40, 10)], codec="int8")
    queries = case.arguments[0]
    queries[0], queries[1] = case.keys[0][5] * 100, case.keys[1][45] * 100
    check(form, case)


BAD = {
    "float64": (0, torch.zeros(1, 4, 64).double(), "queries must be"),
    "codes of a float": (1, torch.zeros(9, 2048), "part 0: pages must be"),
    "short pages": (1, torch.zeros(9, 71, dtype=torch.uint8), r"part 0: pages must be \[num_pages, 72 or more\]"),
    "int64 tables": (2, torch.zeros(1, 2).long(), r"part 0: tables must be \[1, columns\] int32"),
    "lengths": (3, torch.zeros(2).int(), r"part 0: lengths must be \[1\] int32"),
    "rows apart": (4, torch.zeros(8192, 9, dtype=torch.uint8).T, "part 1: pages must be .*side by side"),
}


@pytest.mark.parametrize(("number", "tensor", "message"), BAD.values(), ids=BAD)
def test_bad_tensors_are_refused(number: int, tensor: Tensor, message: str) -> None:
    case = Case.of([(5, 1)])
    arguments = [*case.arguments]
    arguments[number] = tensor
    with pytest.raises(ValueError, match=message):
        attend(*arguments, **case.settings)


def test_channels_that_do_not_fit_are_refused() -> None:
    entry = EntryShape(64, torch.float32, 0.5, 1.0)
    without = stored((5,), CODECS["exact"], entry, channels={"key_channels": torch.arange(32).unsqueeze(0)})
    case = Case([without], 64, torch.float32)
    *rest, channels = case.arguments
    with pytest.raises(ValueError, match=r"key_channels must be \[1, 32\] int64; got \[1, 31\]"):
        attend(*rest, channels[:, 1:], **case.settings)
    del without.tensors["key_channels"]
    with pytest.raises(ValueError, match="key_channels must be given where 32 of 64 are stored"):
        attend(*rest, **Case([without], 64, torch.float32).settings)


def test_a_record_is_not_begun_in_the_middle() -> None:
    part = stored((64,), CODECS["kivi4"], EntryShape(64, torch.float32), first=32)
    part.others["first"] = 31
    with pytest.raises(ValueError, match="first must be a multiple of the record's 32; got 31"):
        attend(*(case := Case([part], 64, torch.float32)).arguments, **case.settings)


def test_it_needs_a_gpu() -> None:
    case = Case.of([(5, 1)])
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        attend(*case.arguments, **case.settings, impl="triton")


@pytest.mark.parametrize(("head_dim", "dtype"), [(192, torch.float32), (320, torch.bfloat16)], ids=str)
def test_heads_too_wide_are_refused(head_dim: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"padded to powers of two; got .*size={head_dim}"):
        attend(*(case := Case.of([(1, 1)], head_dim=head_dim, dtype=dtype)).arguments, **case.settings)


def call(head_dim: int, codec: Codec, dtype: torch.dtype, ratio: float = 1.0) -> Callable[[], None]:
    """Two requests of 8 heads."""

    def run() -> None:
        none, entry = torch.zeros(16, dtype=torch.int32), EntryShape(head_dim, dtype, ratio, ratio)
        pages = torch.zeros(9, 2 * BLOCK_SIZE * 2 * head_dim * dtype.itemsize, dtype=torch.uint8)
        columns = [torch.zeros(16, size, dtype=torch.int64) for size in (entry.key_dim, entry.value_dim)]
        exact = ExactCodec(), EntryShape(head_dim, dtype), [None, None]
        parts = [
            PagedEntries(pages, none.view(16, 1), none, of.form(shape), partial(decode, of, shape), 0, *channels)
            for of, shape, channels in ((codec, entry, [None, None] if ratio == 1 else columns), exact)
        ]
        encoded_attention(torch.zeros(16, 4, head_dim, dtype=dtype), parts, scale=1.0, impl="triton")

    return run


def call_merged(vectors: str, values_only: bool) -> Callable[[], None]:
    """The upper layer of a pair, two requests of 8 heads."""

    def run() -> None:
        none, entry = torch.zeros(16, dtype=torch.int32), EntryShape(128, torch.bfloat16)
        pages, codec = (
            torch.zeros(9, 2 * BLOCK_SIZE * 512, dtype=torch.uint8),
            PairCodec(0.6, 0.3, values_only, CODECS[vectors]),
        )
        of_layer = codec.form(entry, upper=True), partial(codec.decode, entry=entry, upper=True)
        part = PagedEntries(pages, none.view(16, 1), none, *of_layer)
        encoded_attention(torch.zeros(16, 4, 128, dtype=entry.dtype), [part], scale=1.0, impl="triton")

    return run


CALLS = {
    f"{head_dim} in {codec}, {dtype}": call(head_dim, CODECS[codec], dtype)
    for head_dim, codec, dtype in [
        (64, "int4", torch.bfloat16),
        (128, "int8", torch.bfloat16),
        (128, "int4", torch.bfloat16),
        (128, "int2", torch.float16),
        (256, "int4", torch.bfloat16),
        (128, "int4", torch.float32),
        (64, "int8", torch.float32),
        (128, "fp8", torch.bfloat16),
        (128, "kivi4", torch.bfloat16),
        (128, "kivi2", torch.bfloat16),
        (128, "int4x2", torch.bfloat16),
        (128, "skvq", torch.bfloat16),
        (256, "skvq", torch.bfloat16),
        (128, "skvq", torch.float32),
        (256, "kivi4", torch.bfloat16),
        (256, "int4x2", torch.bfloat16),
        (256, "fp8", torch.float16),
    ]
}
CALLS["half of 128 channels"] = call(128, CODECS["exact"], torch.bfloat16, ratio=0.5)
CALLS |= {
    f"layers as one in {vectors}, values only {values_only}": call_merged(vectors, values_only)
    for vectors, values_only in [("exact", True), ("int4", False)]
}
