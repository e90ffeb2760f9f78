"""`encoded_attention`: attention over what codes decode to and what lies beside them, as float64 has it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.codecs import CODECS, EntryShape
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention
from tests.kernels.compare import assert_accurate

Run = Callable[..., Any]
NO_PAGE = 10**6  # in a page table where nobody may look
BLOCK_SIZE = 16
GROUP_SIZES = {64: 64, 128: 64, 32: 32, 80: 40, 96: 48, 256: 64, 8: 8}  # head_dim -> channels of a group in a codec
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def paged(entries: Sequence[Tensor], width: int, generator: torch.Generator) -> PagedEntries:
    """Entries of each sequence, [n, B], in pages all over a pool that is otherwise NaN, or 255; pages lie apart."""
    size, dtype = entries[0].shape[1], entries[0].dtype
    per_page = width // size
    num_pages = [-(-len(each) // per_page) for each in entries]
    ids = torch.randperm(sum(num_pages) + 3, generator=generator).to(torch.int32)
    pool = torch.full((len(ids), width + 6), float("nan") if dtype.is_floating_point else 255, dtype=dtype)
    tables = torch.full((len(entries), max(num_pages) + 1), NO_PAGE, dtype=torch.int32)
    for row, count, each in zip(tables, num_pages, entries, strict=True):
        row[:count], ids = ids[:count], ids[count:]
        for i, entry in enumerate(each):
            at = i % per_page * size
            pool[int(row[i // per_page]), at : at + size] = entry
    return PagedEntries(pool[:, :width], tables, torch.tensor([len(each) for each in entries], dtype=torch.int32))


class Case:
    """Sequences of so many encoded and dense entries.

    Fields:
        arguments, settings: of `attend`.
        keys, values: of each sequence as attention reads them, [n, D].
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        *,
        codec: str = "int4",
        head_dim: int = 64,
        group: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(head_dim + group + len(lengths))
        of, shape = CODECS[codec], EntryShape(head_dim, dtype)
        encoded, dense, self.keys, self.values = [], [], [], []
        for num_encoded, num_dense in lengths:
            vectors = torch.randn(2, num_encoded, head_dim, generator=generator).to(dtype)
            encoded.append(of.encode(*vectors))
            own = torch.randn(2, num_dense, head_dim, generator=generator).to(dtype)
            dense.append(torch.cat([*own], dim=1))
            decoded = torch.stack(of.decode(encoded[-1], shape)).to(dtype)
            for found, part in zip((self.keys, self.values), torch.cat([decoded, own], dim=1), strict=True):
                found.append(part)
        queries = torch.randn(len(lengths), group, head_dim, generator=generator).to(dtype)
        page_bytes = BLOCK_SIZE * 2 * head_dim * dtype.itemsize
        parts = paged(encoded, page_bytes, generator), paged(dense, BLOCK_SIZE * 2 * head_dim, generator)
        self.arguments = (queries, *(each for part in parts for each in (part.pages, part.tables, part.lengths)))
        self.settings = {
            "num_bits": of.num_bits,
            "quant_group_size": GROUP_SIZES[head_dim],
            "scale": head_dim**-0.5,
        }

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
    queries: Tensor,
    codes: Tensor,
    code_tables: Tensor,
    num_codes: Tensor,
    rows: Tensor,
    row_tables: Tensor,
    num_rows: Tensor,
    *,
    num_bits: int,
    quant_group_size: int,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """The op on tensors: what runs elsewhere takes them and returns one."""
    encoded, dense = PagedEntries(codes, code_tables, num_codes), PagedEntries(rows, row_tables, num_rows)
    settings = {"num_bits": num_bits, "quant_group_size": quant_group_size, "scale": scale}
    return encoded_attention(queries, encoded, dense, **settings, impl=impl)


def check(form: Run, case: Case) -> None:
    dtype = case.arguments[0].dtype
    found = form(attend, *case.arguments, **case.settings)
    assert_accurate(found, case.softmax(torch.float64), [case.softmax(dtype), case.softmax(dtype, 7)])


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_dtypes(form: Run, codec: str, dtype: torch.dtype) -> None:
    check(form, Case([(75, 19), (33, 1)], codec=codec, dtype=dtype))


LENGTHS = {
    "one": [(0, 1)],
    "a page and its neighbours": [(n, n) for n in (15, 16, 17)],
    "one of each": [(1, 1)],
    "nothing dense": [(40, 0), (0, 3)],
    "more than a tile a part": [(16 * 32 + 1, 5), (31, 16 * 32 + 33)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(form: Run, lengths: list[tuple[int, int]]) -> None:
    check(form, Case(lengths))


@pytest.mark.parametrize("head_dim", GROUP_SIZES)
def test_head_dims(form: Run, head_dim: int) -> None:
    """Groups of a power of two and others."""
    dtype = torch.float16 if head_dim > 128 else torch.float32
    check(form, Case([(21, 2), (50, 18)], head_dim=head_dim, codec="int8", dtype=dtype))
    check(form, Case([(21, 2)], head_dim=head_dim, codec="int2", dtype=dtype))


@pytest.mark.parametrize("group", [1, 8, 17])
def test_group_sizes(form: Run, group: int) -> None:
    check(form, Case([(30, 4)], group=group))


def test_a_sequence_stands_for_itself(form: Run) -> None:
    """Beside others, in the same bits."""
    case = Case([(100, 3), (7, 40), (64, 16)])
    together = form(attend, *case.arguments, **case.settings)
    queries, pages, tables, lengths, rows, row_tables, num_rows = case.arguments
    alone = form(
        attend, queries[1:2], pages, tables[1:2], lengths[1:2], rows, row_tables[1:2], num_rows[1:2], **case.settings
    )
    assert torch.equal(alone[0], together[1])


def test_large_logits(form: Run) -> None:
    """One entry takes all, among the codes or beside them; nothing overflows."""
    case = Case([(40, 10), (40, 10)], codec="int8")
    queries = case.arguments[0]
    queries[0], queries[1] = case.keys[0][5] * 100, case.keys[1][45] * 100
    check(form, case)


BAD = {
    "float64": (0, torch.zeros(1, 4, 64).double(), "queries must be"),
    "codes of a float": (1, torch.zeros(9, 2048), "encoded pages must be"),
    "short pages": (1, torch.zeros(9, 71, dtype=torch.uint8), r"encoded pages must be \[num_pages, 72 or more\]"),
    "int64 tables": (2, torch.zeros(1, 2).long(), r"encoded tables must be \[1, columns\] int32"),
    "lengths": (3, torch.zeros(2).int(), r"encoded lengths must be \[1\] int32"),
    "rows of another dtype": (4, torch.zeros(9, 2048).half(), "dense pages must be"),
    "rows apart": (4, torch.zeros(2048, 9).T, "side by side"),
}


@pytest.mark.parametrize(("number", "tensor", "message"), BAD.values(), ids=BAD)
def test_bad_tensors_are_refused(number: int, tensor: Tensor, message: str) -> None:
    case = Case([(5, 1)])
    arguments = [*case.arguments]
    arguments[number] = tensor
    with pytest.raises(ValueError, match=message):
        attend(*arguments, **case.settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_group_size": 48}, "quant_group_size must divide 64 and 4 bits of each must fill bytes; got 48"),
        ({"num_bits": 3}, "2, 4 or 8 bits; got 3"),
        ({"impl": "triton"}, "needs tensors on a GPU"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    case = Case([(5, 1)])
    with pytest.raises(ValueError, match=message):
        attend(*case.arguments, **case.settings | settings)


@pytest.mark.parametrize(("head_dim", "dtype"), [(192, torch.float32), (320, torch.bfloat16)], ids=str)
def test_heads_too_wide_are_refused(head_dim: int, dtype: torch.dtype) -> None:
    queries, none = torch.zeros(1, 1, head_dim, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    codes = PagedEntries(torch.zeros(1, 4096, dtype=torch.uint8), none.view(1, 1), none)
    rows = PagedEntries(torch.zeros(1, 2 * head_dim, dtype=dtype), none.view(1, 1), none + 1)
    with pytest.raises(ValueError, match=f"powers of two; got {head_dim} in groups of 64"):
        encoded_attention(queries, codes, rows, num_bits=4, quant_group_size=64, scale=1.0)


def call(head_dim: int, num_bits: int, dtype: torch.dtype) -> Callable[[], None]:
    """Two requests of 8 heads."""

    def run() -> None:
        none = torch.zeros(16, dtype=torch.int32)
        pool = torch.zeros(9, BLOCK_SIZE * 2 * head_dim, dtype=dtype)
        encoded, dense = (PagedEntries(pages, none.view(16, 1), none) for pages in (pool.view(torch.uint8), pool))
        settings = {"num_bits": num_bits, "quant_group_size": min(head_dim, 64), "scale": 1.0}
        encoded_attention(torch.zeros(16, 4, head_dim, dtype=dtype), encoded, dense, **settings, impl="triton")

    return run


CALLS = {
    f"{head_dim} in {num_bits} bits, {dtype}": call(head_dim, num_bits, dtype)
    for head_dim, num_bits, dtype in [
        (64, 4, torch.bfloat16),
        (128, 8, torch.bfloat16),
        (128, 4, torch.bfloat16),
        (128, 2, torch.float16),
        (256, 4, torch.bfloat16),
        (128, 4, torch.float32),
        (64, 8, torch.float32),
    ]
}
