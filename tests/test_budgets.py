"""Budgets: pages are shared by whom most is missing, never lost, within their bounds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv_vllm.adapter.encoded import stored_pages
from fastkv_vllm.adapter.pages import ProbedLayout
from fastkv_vllm.adapter.ragged import HeadPages, PagePool, blocks_for
from fastkv_vllm.adapter.reads import HeadRows, ReadBuffers
from fastkv_vllm.cache import share_pages
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.kernels.select import select, select_ragged
from fastkv_vllm.methods.density import by_density
from tests.reference.budgets import hand_out

NUM_LAYERS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 4, 2, 32, 32


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    """Wishes (some equal, some beyond the bounds), a total that fits, and bounds."""
    count = draw(st.integers(1, 8))
    wish = st.one_of(st.floats(-3, 30), st.integers(0, 9).map(float))
    low = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    high = [a + draw(st.integers(0, 20)) for a in low]
    return draw(st.lists(wish, min_size=count, max_size=count)), draw(st.integers(sum(low), sum(high))), low, high


@given(shares())
@settings(max_examples=500, derandomize=True, deadline=None)
def test_pages_are_those_handed_out_one_by_one(case: tuple[list[float], int, list[int], list[int]]) -> None:
    wanted, total, low, high = case
    pages = share_pages(wanted, total, low=low, high=high)
    assert sum(pages) == total
    assert all(a <= n <= b for a, n, b in zip(low, pages, high, strict=True))
    assert pages == hand_out(wanted, total, low, high)


@pytest.mark.parametrize("total", [2, 9])
def test_a_total_outside_the_bounds_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match=r"total must be in 3\.\.8, the sums of the bounds; got"):
        share_pages([2.0, 2.0], total, low=[1, 2], high=[4, 4])


@pytest.mark.parametrize("layers", ["uniform", "pyramid", "density"])
@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize("num_tokens", [640, 703, 2000])
def test_pages_add_up(layers: str, heads: str, num_tokens: int) -> None:
    config = CompressionConfig("snapkv", layer_budgets=layers, head_budgets=heads, num_sink=3)
    plan = config.plan(num_tokens, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(num_tokens)
    scores = [torch.rand(NUM_HEADS, num_tokens - plan.num_tail, generator=generator) for _ in range(NUM_LAYERS)]
    densities = [0.02, 0.9, 0.4, 0.1]  # the second asks for more than there is, the first for less than a page
    pages = config.make_allocator().pages(plan, scores, NUM_HEADS, densities)
    assert pages.shape == (NUM_LAYERS, NUM_HEADS) and int(pages.sum()) == plan.num_pages * pages.numel()
    assert int(pages.min()) >= plan.least_pages and int(pages.max()) <= plan.num_whole_blocks
    assert plan.is_ragged == ((layers, heads) != ("uniform", "uniform"))
    if layers == "density":
        rising = pages.sum(dim=1)[[0, 3, 2, 1]].tolist()
        assert rising == sorted(rising) and rising[0] < rising[-1]
    if layers == "pyramid":
        assert pages.sum(dim=1).tolist() == sorted(pages.sum(dim=1).tolist(), reverse=True)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("layers", ["uniform", "pyramid"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.6])
def test_no_rank_needs_more_blocks_than_the_plan_has(num_ranks: int, layers: str, ratio: float) -> None:
    """The first head is wanted only by its rank: as uneven as can be."""
    config = CompressionConfig("snapkv", retention_ratio=ratio, layer_budgets=layers, head_budgets="adaptive")
    plan = replace(config.plan(1001, BLOCK_SIZE), num_ranks=num_ranks)
    scores = [torch.full((4, 1001 - plan.num_tail), 1e-3).index_fill(0, torch.arange(4 // num_ranks), 1.0)] * NUM_LAYERS
    options = replace(config.make_allocator().options, head_floor=0.0)
    pages = replace(config.make_allocator(), options=options).pages(plan, scores, 4)
    needed = [blocks_for(part) for part in pages.chunk(num_ranks, dim=1)]
    assert max(needed) <= plan.num_stored_blocks <= plan.num_whole_blocks
    assert plan.num_freed_blocks == plan.num_whole_blocks - plan.num_stored_blocks
    encoded = replace(plan, page_entries=40)
    stored = [blocks_for(stored_pages(encoded, part)) for part in pages.chunk(num_ranks, dim=1)]
    assert max(stored) <= encoded.num_stored_blocks <= plan.num_whole_blocks
    if num_ranks == 1:
        assert needed == [plan.num_stored_blocks] == [plan.num_pages]
    elif layers == "uniform":
        assert max(needed) == plan.num_stored_blocks, "the bound is met"


def test_layers_get_the_mean_by_their_density_within_its_bounds() -> None:
    """Of 10 pages a layer: in proportion to 1, 2, 3; then all of 40 and 1 % of it, which is evened out."""
    config = CompressionConfig("snapkv", budget=320, layer_budgets="density")
    plan = config.plan(1280, BLOCK_SIZE)
    assert by_density(plan, [1, 2, 3]) == [160, 320, 480]
    assert by_density(plan, [1, 1e-9, 1e-9, 1e-9, 1e-9]) == [1280, *[12.8] * 4]
    scores = [torch.zeros(2, 1280)] * 5
    pages = config.make_allocator().pages(plan, scores, 2, [1, 1e-9, 1e-9, 1e-9, 1e-9])
    assert pages.tolist() == [[40, 40], [3, 3], [3, 3], [2, 2], [2, 2]]


def test_importance_shares_a_beta_th_of_the_budget() -> None:
    """Half of 10 pages a head goes by importance: 5 each, and 20 more to the head that has it all."""
    weights = [[0.0, 1.0], [0.0, 0.0]]
    config = CompressionConfig("headkv", budget=320 + 8, head_weights=weights, head_beta=2.0, window_size=8)
    plan = config.plan(1280 + 8, BLOCK_SIZE)
    scores = [torch.zeros(2, 1280)] * 2
    assert config.make_allocator().pages(plan, scores, 2).tolist() == [[5, 25], [5, 5]]


def test_retrieval_heads_keep_all_in_order_of_their_weights() -> None:
    """Of 4 x 14 pages 4 go to each streaming head; one head is whole with 32, one has what is left."""
    weights = [[0.1, 0.9], [0.5, 0.5]]
    config = CompressionConfig("duoattention", budget=448, head_weights=weights, streaming_tokens=128)
    plan = config.plan(1024, BLOCK_SIZE)
    assert config.make_allocator().pages(plan, [torch.zeros(1, 1024)] * 2, 2).tolist() == [[4, 32], [16, 4]]


def test_a_head_with_the_layers_best_gets_more() -> None:
    config = CompressionConfig("adakv", retention_ratio=0.2)
    plan = config.plan(1280, BLOCK_SIZE)
    scores = [torch.cat([torch.rand(1, 1280), torch.rand(1, 1280) + 2])]
    assert config.make_allocator().pages(plan, scores, 2).tolist() == [[2, 14]]  # floor 0.2 of 8, the rest to head 1
    everything = CompressionConfig("adakv", retention_ratio=0.2, head_floor=1.0).make_allocator()
    assert everything.pages(plan, scores, 2).tolist() == [[8, 8]]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"layer_budgets": "square"}, "layer_budgets must be one of uniform, pyramid, density; got 'square'"),
        ({"head_budgets": 3}, "head_budgets must be one of uniform, adaptive, retrieval, importance; got 3"),
        ({"head_floor": 1.5}, r"head_floor must be in \[0, 1\]; got 1.5"),
        ({"pyramid_beta": 0}, "pyramid_beta must be an integer >= 1; got 0"),
    ],
)
def test_bad_settings_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_mapping("snapkv", settings_)


def test_select_ragged_is_select_row_by_row() -> None:
    scores = torch.randint(0, 9, (5, 70)).float()  # many ties
    counts = torch.tensor([1, 70, 7, 0, 33])
    expected = [select(scores[i : i + 1], n)[0] for i, n in enumerate(counts.tolist()) if n]
    assert torch.equal(select_ragged(scores, counts), torch.cat(expected))


@pytest.mark.parametrize("counts", [[1, 71], [-1, 2], [1]])
def test_bad_ragged_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="num_kept must be"):
        select_ragged(torch.rand(2, 70), torch.tensor(counts))


@pytest.fixture
def pool() -> PagePool:
    layout = ProbedLayout.probe(block_size=BLOCK_SIZE, head_dim=HEAD_DIM, dtype=torch.float32, isa="vec")
    storage = torch.zeros(NUM_LAYERS, 10, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    return PagePool.of(list(storage), layout)


def test_pool_pages_are_the_layers(pool: PagePool) -> None:
    ids = pool.pages(torch.tensor([3, 7]))
    pool.cache[ids[2, 1, 0]] = 5.0
    assert pool.cache.shape == (NUM_LAYERS * 10 * NUM_HEADS, 1, BLOCK_SIZE, 2 * HEAD_DIM)
    storage = pool.cache.view(NUM_LAYERS, 10, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    assert bool((storage[2, 3, 1] == 5).all()) and int((storage == 5).sum()) == BLOCK_SIZE * 2 * HEAD_DIM


def test_caches_of_several_allocations_are_refused(pool: PagePool) -> None:
    caches = [torch.zeros(10, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM) for _ in range(2)]
    with pytest.raises(RuntimeError, match="in one allocation, head-major and unpadded; layer 1 is not"):
        PagePool.of(caches, pool.layout)


@pytest.mark.parametrize("seed", range(8))
def test_shared_pages_are_those_of_the_destination(pool: PagePool, seed: int) -> None:
    """Any distribution fits; each page is held once, and appended blocks follow each head's own pages."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, NUM_LAYERS * NUM_HEADS, (3 * NUM_LAYERS * NUM_HEADS,), generator=generator)
    counts = torch.bincount(owners, minlength=NUM_LAYERS * NUM_HEADS).view(NUM_LAYERS, NUM_HEADS)
    destination = [4, 9, 2]
    held = HeadPages.share(20, counts, pool, destination)
    taken = held.pages[torch.arange(held.pages.shape[2]) < counts.unsqueeze(-1)]
    assert sorted(taken.tolist()) == sorted(pool.pages(torch.tensor(destination)).flatten().tolist())
    table = held.table(pool, torch.tensor([6, 1]))
    own = pool.pages(torch.tensor([6, 1]))
    for layer in range(NUM_LAYERS):
        for head in range(NUM_HEADS):
            n = int(counts[layer, head])
            assert table[layer, head, :n].tolist() == held.pages[layer, head, :n].tolist()
            assert table[layer, head, n : n + 2].tolist() == own[layer, head].tolist()


def test_even_counts_stay_in_their_own_pages(pool: PagePool) -> None:
    held = HeadPages.share(20, torch.full((NUM_LAYERS, NUM_HEADS), 2), pool, [4, 9])
    assert torch.equal(held.pages, pool.pages(torch.tensor([4, 9])))


@pytest.mark.parametrize("room", [(), (4, 30)], ids=["growing", "large enough"])
def test_buffers_go_on_as_requests_come_and_go(pool: PagePool, room: tuple[int, ...]) -> None:
    """What stands in them after any history is what new ones hold, at the same addresses while they are large enough.

    Requests behind all others, that have no rows, are empty.
    """
    generator = torch.Generator().manual_seed(5)
    requests = []  # what each holds, its block table, tokens so far
    for num_whole in (20, 5, 7, 0):
        counts = torch.randint(1, 4, (NUM_LAYERS, NUM_HEADS), generator=generator)
        held = HeadPages.share(num_whole, counts, pool, [4, 9, 2])
        table = torch.randint(1, 10, (30,), generator=generator, dtype=torch.int32)
        requests.append((held, table, num_whole * BLOCK_SIZE + 1))
    batches = [[0, 1, 2, 3]] + [[0, 1]] * 3 + [[0, 1, 2]] * BLOCK_SIZE + [[0, 3, 2], [2], [1, 2, 3]]
    buffers, addresses = ReadBuffers(pool, *room), set()
    for step, batch in enumerate(batches):
        rows = []
        for place, (held, table, num_tokens) in enumerate(requests[number] for number in batch):
            num_tokens += step
            num_blocks = -(-num_tokens // BLOCK_SIZE) - held.num_whole
            rows.append(HeadRows(place, 1, num_tokens, num_blocks, table, held))
        found, expected = buffers.write(rows, 4), ReadBuffers(pool).write(rows, len(rows))
        num_sequences, width = len(rows) * NUM_HEADS, expected.tables.shape[2]
        lengths = expected.seq_lens
        read = torch.arange(width) < -(-lengths.unsqueeze(-1) // BLOCK_SIZE)
        assert torch.equal(found.tables[:, :num_sequences, :width][read], expected.tables[read])
        assert torch.equal(found.seq_lens[:, :num_sequences], lengths) and not found.seq_lens[:, num_sequences:].any()
        starts = [*range(num_sequences + 1), *[num_sequences] * (4 * NUM_HEADS - num_sequences)]
        assert found.query_start.tolist() == found.host_query_start.tolist() == starts
        assert torch.equal(found.host_seq_lens, found.seq_lens)
        of_layers = [tuple(of_layer) for of_layer in lengths.tolist()]
        assert all(of_layers[layer] == of_layers[first] for layer, first in enumerate(found.like))
        addresses.add((found.tables.data_ptr(), found.seq_lens.data_ptr(), found.query_start.data_ptr()))
    assert (len(addresses) == 1) == bool(room)


def test_buffers_that_graphs_read_do_not_move(pool: PagePool) -> None:
    held = HeadPages.share(3, torch.full((NUM_LAYERS, NUM_HEADS), 1), pool, [4])
    rows = [HeadRows(0, 1, 4 * BLOCK_SIZE, 1, torch.ones(9, dtype=torch.int32), held)]
    buffers = ReadBuffers(pool, 2, 9, stays=True)
    buffers.write(rows, 2)
    with pytest.raises(RuntimeError, match="captured for 2 requests of at most 9 pages a head and a step has 3 of 2"):
        buffers.write(rows, 3)
