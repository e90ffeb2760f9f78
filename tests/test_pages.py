"""Layouts of pages against vLLM's own writers: what was written at a slot is what is read back, bit for bit."""

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from fastkv_vllm.adapter.pages import FLOAT8, PageLayout, ProbedLayout, RowLayout
from tests.reference.codecs import cut

NUM_BLOCKS, NUM_HEADS = 7, 3
FLOAT8_SCALES = 0.5, 0.0625  # of keys and of values
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
WIDE = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()  # vLLM's build for AVX2 lacks some
# Head dimensions, block sizes, types, and the layouts the writer knows: the one vLLM picks on this processor, the
# generic one, and AMX tiles, which are plain stores and need no AMX; and rows, as backends for GPUs store them.
SHAPES = [
    (head_dim, block_size, dtype, isa)
    for head_dim in (32, 64, 80, 128, 256)
    for block_size in (32, 64, 128)
    for dtype in DTYPES
    for isa in sorted(
        {_get_attn_isa(dtype, block_size, head_dim), "vec16", "rows"}
        | ({"amx"} if WIDE and head_dim % 32 == 0 else set())
    )
    if isa != "amx" or dtype == torch.bfloat16
]
EACH_SHAPE = pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "isa"),
    SHAPES,
    ids=[f"D{d}-B{b}-{str(t).removeprefix('torch.')}-{isa}" for d, b, t, isa in SHAPES],
)


class Cache:
    """A layer's cache and, beside it, the plain entries that vLLM's writer put there."""

    def __init__(self, head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
        self.block_size, self.isa = block_size, isa
        if isa == "rows":
            self.layout = RowLayout(block_size, head_dim, dtype, "auto")
        else:
            self.layout = ProbedLayout.probe(block_size=block_size, head_dim=head_dim, dtype=dtype, isa=isa)
        self.pages = torch.full((NUM_BLOCKS, NUM_HEADS, block_size, 2 * head_dim), torch.nan, dtype=dtype)
        self.keys = torch.full((NUM_BLOCKS * block_size, NUM_HEADS, head_dim), torch.nan, dtype=dtype)
        self.values = self.keys.clone()
        self.generator = torch.Generator().manual_seed(head_dim + block_size)

    def entries(self, count: int) -> tuple[Tensor, Tensor]:
        shape = (2, count, *self.keys.shape[1:])
        keys, values = torch.randn(shape, generator=self.generator).to(self.keys.dtype)
        return keys, values

    def note(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.keys[slots], self.values[slots] = keys, values

    def write_as_vllm(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """The lines of `do_kv_cache_update` of the CPU's and of a GPU's attention, whose kernel is one of these."""
        if self.isa == "rows":
            caches = self.pages.transpose(1, 2).split(self.layout.head_dim, dim=-1)
            for cache, entries in zip(caches, (keys, values), strict=True):
                cache[slots // self.block_size, slots % self.block_size] = entries
            return
        halves = self.pages.view(NUM_BLOCKS, NUM_HEADS, self.block_size * 2, -1)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves.chunk(2, dim=2), slots, self.isa)

    def fill(self) -> None:
        """Every slot, as one prompt's entries in blocks of random order."""
        slots = torch.randperm(NUM_BLOCKS * self.block_size, generator=self.generator)
        keys, values = self.entries(len(slots))
        self.write_as_vllm(keys, values, slots)
        self.note(keys, values, slots)

    def check_all(self) -> None:
        blocks = torch.arange(NUM_BLOCKS)
        every = torch.arange(len(self.keys)).expand(NUM_HEADS, -1)
        keys, values = take(self.layout, self.pages, blocks, every)
        check_same(keys, self.keys, "key [slot, head, element]")
        check_same(values, self.values, "value [slot, head, element]")


def take(layout: PageLayout, pages: Tensor, blocks: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [K, H, D] each, of entries of each head, [H, K], where a sequence's blocks are these."""
    of_heads = blocks[entries // layout.block_size] * NUM_HEADS + torch.arange(NUM_HEADS).unsqueeze(1)
    return layout.take(pages, of_heads.T, (entries % layout.block_size).T)


def check_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit, NaN included; names the first wrong coordinate."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    bits = BITS[found.dtype]
    wrong = (found.contiguous().view(bits) != expected.contiguous().view(bits)).nonzero().tolist()
    assert not wrong, f"{len(wrong)} wrong, first {what} = {wrong[0]}: {found[tuple(wrong[0])]}"


@EACH_SHAPE
def test_every_entry_is_read_where_vllm_wrote_it(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    cache = Cache(head_dim, block_size, dtype, isa)
    cache.fill()
    cache.check_all()


@EACH_SHAPE
def test_read_keys_and_values(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    """Counts: one, a block and its neighbours, a prime, all; blocks in any order."""
    cache = Cache(head_dim, block_size, dtype, isa)
    cache.fill()
    blocks = torch.tensor([4, 0, 6, 3])
    slots = (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()
    for count in (1, block_size - 1, block_size, block_size + 1, 97, 4 * block_size):
        needed = blocks[: -(-count // block_size)]
        keys, values = (
            cache.layout.read_keys(cache.pages, needed, count),
            cache.layout.read_values(cache.pages, blocks, count),
        )
        check_same(keys, cache.keys[slots[:count]].transpose(0, 1), "key [head, entry, element]")
        check_same(values, cache.values[slots[:count]].transpose(0, 1), "value [head, entry, element]")


@EACH_SHAPE
def test_heads_take_entries_of_their_own(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    cache = Cache(head_dim, block_size, dtype, isa)
    cache.fill()
    blocks = torch.tensor([5, 1, 2, 0])
    for count in (1, 31, 4 * block_size):
        order = [torch.randperm(4 * block_size, generator=cache.generator)[:count].sort() for _ in range(NUM_HEADS)]
        entries = torch.stack([head.values for head in order])
        keys, values = take(cache.layout, cache.pages, blocks, entries)
        slots = blocks[entries // block_size] * block_size + entries % block_size  # [H, count]
        for head in range(NUM_HEADS):
            check_same(keys[:, head], cache.keys[slots[head], head], f"key of head {head} [entry, element]")
            check_same(values[:, head], cache.values[slots[head], head], f"value of head {head} [entry, element]")


@EACH_SHAPE
def test_entries_move_as_if_all_were_read_first(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    """From anywhere, other pages to fill included; a slot without a source keeps what it has."""
    cache = Cache(head_dim, block_size, dtype, isa)
    cache.fill()
    num_pages = NUM_BLOCKS * NUM_HEADS
    pages = torch.randperm(num_pages, generator=cache.generator)[:9]
    sources = torch.randint(num_pages * block_size, (9, block_size), generator=cache.generator)
    sources[torch.rand(9, block_size, generator=cache.generator) < 0.2] = -1
    starts = torch.tensor([0, 1, 1, 5, 9])
    page, offset = (sources >= 0).nonzero(as_tuple=True)
    for entries in (cache.keys, cache.values):
        by_page = entries.unflatten(0, (NUM_BLOCKS, block_size)).transpose(1, 2).flatten(0, 1)  # a copy
        by_page[pages[page], offset] = by_page.flatten(0, 1)[sources[page, offset]]
        entries.copy_(by_page.unflatten(0, (NUM_BLOCKS, NUM_HEADS)).transpose(1, 2).flatten(0, 1))
    cache.layout.move(cache.pages.flatten(0, 1).unsqueeze(1), sources, pages, starts)
    cache.check_all()


@EACH_SHAPE
def test_write_changes_its_slots_only(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    """Into two blocks and a few single slots; every other slot, blocks never written included, stays as it was."""
    cache = Cache(head_dim, block_size, dtype, isa)
    cache.check_all()  # nothing written yet: NaN everywhere
    for slots in (
        torch.cat([torch.arange(2 * block_size, 3 * block_size), torch.arange(block_size)]),
        torch.tensor([3 * block_size + 1]),
        torch.tensor([6 * block_size - 1, 5 * block_size, 4 * block_size + 13]),
        torch.arange(block_size, block_size + 31),
        torch.empty(0, dtype=torch.int64),
    ):
        keys, values = cache.entries(len(slots))
        cache.layout.write(cache.pages, keys, values, slots)
        cache.note(keys, values, slots)
        cache.check_all()


@EACH_SHAPE
def test_a_negative_slot_is_skipped(head_dim: int, block_size: int, dtype: torch.dtype, isa: str) -> None:
    if isa == "rows":
        pytest.skip("nothing writes to a negative slot")
    cache = Cache(head_dim, block_size, dtype, isa)
    keys, values = cache.entries(5)
    slots = torch.tensor([7, -1, block_size, -1, 2])
    cache.layout.write(cache.pages, keys, values, slots)
    real = slots >= 0
    cache.note(keys[real], values[real], slots[real])
    cache.check_all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_written(dtype: torch.dtype) -> None:
    """Slices of a fused projection, as the runner has them."""
    cache = Cache(64, 32, dtype, _get_attn_isa(dtype, 32, 64))
    fused = torch.randn(45, NUM_HEADS * 2 * 64, generator=cache.generator).to(dtype)
    keys, values = (half.view(45, NUM_HEADS, 64) for half in fused.chunk(2, dim=-1))
    slots = torch.arange(20, 65)
    cache.layout.write(cache.pages, keys, values, slots)
    cache.note(keys, values, slots)
    cache.check_all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_is_a_permutation(dtype: torch.dtype) -> None:
    for isa in ("vec16", _get_attn_isa(dtype, 32, 64)):
        layout = ProbedLayout.probe(block_size=32, head_dim=64, dtype=dtype, isa=isa)
        for offsets in (layout.key_offsets, layout.value_offsets):
            assert offsets.sort().values.tolist() == list(range(32 * 64))


def test_a_writer_that_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_keys_only(key, value, key_cache, value_cache, slots, isa, kv_cache_dtype):
        key_cache.copy_(key.transpose(0, 1).unsqueeze(0))

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", write_keys_only)
    with pytest.raises(RuntimeError, match="layout 'vec' of this vLLM does not store each element exactly once"):
        ProbedLayout.probe(block_size=32, head_dim=64, dtype=torch.float32, isa="vec")


@pytest.mark.skipif(not WIDE, reason="vLLM's CPU attention has eight-bit caches with AVX-512 or AMX only")
@pytest.mark.parametrize("cache_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 32), (128, 64)])
def test_entries_of_eight_bits(head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: str) -> None:
    """What is read is what was written, cut down, but for the scale; moved entries are the same bytes."""
    isa = _get_attn_isa(dtype, block_size, head_dim, cache_dtype)
    layout = ProbedLayout.probe(block_size=block_size, head_dim=head_dim, dtype=dtype, isa=isa, cache_dtype=cache_dtype)
    pages = torch.full((NUM_BLOCKS, NUM_HEADS, block_size, 2 * head_dim), 0x7F, dtype=torch.uint8)  # NaN
    generator = torch.Generator().manual_seed(head_dim)
    entries = torch.randn(2, 3 * block_size - 5, NUM_HEADS, head_dim, generator=generator).to(dtype)
    blocks = torch.tensor([5, 0, 3])
    slots = (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()[: entries.shape[1]]
    halves = pages.view(NUM_BLOCKS, NUM_HEADS, 2 * block_size, -1).chunk(2, dim=2)
    scales = dict(zip(("k_scale", "v_scale"), FLOAT8_SCALES, strict=True))
    ops.cpu_attn_reshape_and_cache(*entries, *halves, slots, isa, **scales, kv_cache_dtype=cache_dtype)
    read = [each(pages, blocks, len(slots)) for each in (layout.read_keys, layout.read_values)]
    for got, own, scale in zip(read, entries, FLOAT8_SCALES, strict=True):
        assert torch.equal(got, cut(own.float() / scale, FLOAT8[cache_dtype]).to(dtype).transpose(0, 1))
    chosen = torch.tensor([2, 3, block_size + 1, 2 * block_size + 7])
    taken = take(layout, pages, blocks, chosen.expand(NUM_HEADS, -1))
    layout.write(pages, *taken, 4 * block_size + torch.arange(4))
    moved = [each(pages, torch.tensor([4]), 4) for each in (layout.read_keys, layout.read_values)]
    for got, before in zip(moved, read, strict=True):
        assert torch.equal(got, before[:, chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_eight_bits(dtype: torch.dtype) -> None:
    """Read in the model's dtype, moved as bytes."""
    layout = RowLayout(32, 64, dtype, "fp8")
    pages = torch.randint(0x78, (NUM_BLOCKS, NUM_HEADS, 32, 128), dtype=torch.uint8)
    rows = pages.view(torch.float8_e4m3fn).to(dtype)
    for part, read in enumerate((layout.read_keys, layout.read_values)):
        expected = rows[torch.tensor([5, 2])][..., part * 64 : (part + 1) * 64].transpose(0, 1).flatten(1, 2)
        check_same(read(pages, torch.tensor([5, 2]), 40), expected[:, :40], "part [head, entry, element]")
    before, sources = pages.clone(), torch.arange(64, 96).unsqueeze(0)
    layout.move(pages.flatten(0, 1).unsqueeze(1), sources, torch.tensor([0]), torch.tensor([0, 1]))
    assert torch.equal(pages[0, 0], before[0, 2]) and torch.equal(pages[0, 1:], before[0, 1:])
