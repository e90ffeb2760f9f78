"""The arithmetic of budgets: what `plan_prompt` promises about blocks, entries and rows."""

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastkv_vllm.cache import LeftAlone, PromptPlan, plan_prompt
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import CUT_BUDGETS, BudgetOptions

BLOCK_SIZES = (16, 32, 128)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of `fit`, lengths near multiples of the block size as often as any."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    near = st.builds(lambda n, d: max(n * block_size + d, 1), st.integers(0, 40), st.integers(-2, 2))
    num_tokens = draw(st.one_of(st.integers(1, 5000), near))
    window_size = draw(st.integers(1, 2 * block_size))
    return {
        "num_tokens": num_tokens,
        "block_size": block_size,
        "num_kept": draw(st.one_of(st.integers(0, num_tokens), near)),
        "cuts": list(enumerate(sorted(draw(st.lists(st.integers(0, num_tokens + 1), max_size=4)), reverse=True))),
        "window_size": window_size,
        "num_sink": draw(st.integers(0, 40)),
        "num_recent": max(draw(st.integers(0, num_tokens)), window_size),
        "min_tokens": draw(st.integers(window_size + 1, 600)),
        "evicts": draw(st.booleans()),
    }


def fit(
    *, num_kept: int, min_tokens: int, most_kept: int | None = None, window_size: int, **draft: Any
) -> PromptPlan | LeftAlone:
    """`plan_prompt` of a draft with such fields, where the window votes."""
    unfitted = PromptPlan(num_pages=0, window_size=window_size, num_voters=window_size, **draft)
    return plan_prompt(unfitted, num_kept=num_kept, min_tokens=min_tokens, most_kept=most_kept)


def plan_of(arguments: dict[str, Any]) -> PromptPlan:
    plan = fit(**arguments)
    assume(isinstance(plan, PromptPlan))
    return plan


def pages_forced(num_tokens: int, block_size: int, num_recent: int, num_sink: int, window: int) -> int:
    """Whole pages that hold sinks, one rated entry and the recent ones that are not in the tail; counted.

    With eviction the window at least (else 0), whichever block its last entry is in.
    """
    tail_from = num_tokens - num_tokens % block_size
    forced = [p for p in range(tail_from) if p < num_sink or p >= num_tokens - num_recent]
    return ceil((max(len(forced), num_sink + window) + 1) / block_size)


def check_plan(plan: PromptPlan, num_kept: int, cuts: list[tuple[int, int]]) -> None:
    """All that holds for a prompt that is compressed."""
    held = plan.num_pages + (plan.num_tail > 0)
    window = plan.window_size if plan.evicts else 0
    forced = pages_forced(plan.num_tokens, plan.block_size, plan.num_recent, plan.num_sink, window)
    assert held == max(ceil(num_kept / plan.block_size), forced + (plan.num_tail > 0))
    assert plan.num_freed_blocks >= 1
    assert plan.num_freed_blocks + held == ceil(plan.num_tokens / plan.block_size)
    assert plan.num_tail < plan.block_size
    assert plan.num_whole_blocks * plan.block_size + plan.num_tail == plan.num_tokens
    assert plan.num_kept == plan.num_pages * plan.block_size + plan.num_tail < plan.num_tokens
    assert plan.num_sink + max(plan.num_recent, plan.num_tail) < plan.num_kept
    assert plan.num_sink < plan.forced_from <= plan.num_tokens - plan.num_recent <= plan.num_tokens - plan.window_size
    assert plan.forced_from <= plan.num_tokens - plan.num_tail
    assert plan.num_sink + plan.num_tokens - plan.forced_from < plan.num_kept, "nothing is left to choose"
    seen = plan.num_tokens
    for layer, wished in cuts:
        rows = dict(plan.cuts).get(layer, seen)
        assert rows == min(max(wished, plan.num_kept), plan.num_tokens)
        assert (layer in dict(plan.cuts)) == (rows < seen), "a cut drops rows, or it is none"
        seen = rows
    assert {layer for layer, _ in plan.cuts} <= {layer for layer, _ in cuts}
    assert list(plan.cuts) == sorted(plan.cuts)


@given(arguments())
@settings(max_examples=400, derandomize=True, deadline=None)
def test_plans(arguments: dict[str, Any]) -> None:
    plan = plan_of(arguments)
    check_plan(plan, arguments["num_kept"], arguments["cuts"])


@given(arguments(), st.integers(0, 3000))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_a_guard_raises_a_plan_to_that_of_its_ceiling(arguments: dict[str, Any], more: int) -> None:
    """Where the budget leaves a prompt alone, so does the guard."""
    ceiling = arguments["num_kept"] + more
    plan, bare = fit(**arguments, most_kept=ceiling), fit(**arguments)
    if not isinstance(bare, PromptPlan):
        assert plan is bare
        return
    assert isinstance(plan, PromptPlan) and plan.planned_pages == bare.num_pages and bare.planned_pages is None
    raised = fit(**arguments | {"num_kept": ceiling})
    if isinstance(raised, PromptPlan):
        assert replace(plan, planned_pages=None) == raised
    else:
        assert plan.num_freed_blocks == 0 and not plan.cuts, "nothing is dropped before the guard has looked"


@given(arguments())
@settings(max_examples=400, derandomize=True, deadline=None)
def test_a_prompt_is_left_alone_for_a_reason(arguments: dict[str, Any]) -> None:
    num_tokens, block_size = arguments["num_tokens"], arguments["block_size"]
    plan = fit(**arguments)
    assert (plan is LeftAlone.SHORT) == (num_tokens < arguments["min_tokens"])
    if plan is LeftAlone.BUDGET_COVERS_PROMPT:
        plain = ceil(num_tokens / block_size)
        window = arguments["window_size"] if arguments["evicts"] else 0
        forced = pages_forced(num_tokens, block_size, arguments["num_recent"], arguments["num_sink"], window)
        covered = ceil(arguments["num_kept"] / block_size) >= plain
        assert covered or forced >= num_tokens // block_size, "a block could have been freed"


@given(
    st.integers(512, 40_000),
    st.floats(0.001, 0.999),
    st.sampled_from(BLOCK_SIZES),
    st.integers(0, 16),
    st.sampled_from(["fastkv", "snapkv", "streamingllm"]),
)
@settings(max_examples=400, derandomize=True, deadline=None)
def test_blocks_held_follow_the_retention_ratio(
    num_tokens: int, ratio: float, block_size: int, num_sink: int, method: str
) -> None:
    plan = CompressionConfig(method, retention_ratio=ratio, num_sink=num_sink).plan(num_tokens, block_size)
    assume(isinstance(plan, PromptPlan))
    assume(num_tokens * ratio >= num_sink + plan.num_tail + plan.window_size + block_size)  # covers forced ones
    held = ceil(num_tokens / block_size) - plan.num_freed_blocks
    assert held <= ratio * ceil(num_tokens / block_size) + 1
    assert abs(plan.num_kept - int(num_tokens * ratio)) < block_size


@given(
    st.sampled_from(["lazyllm", "pyramidinfer"]),
    st.integers(3, 40),
    st.floats(0.26, 0.999),
    st.sampled_from(BLOCK_SIZES),
    st.integers(130, 6000),
    st.integers(1, 128),
    st.integers(0, 64),
)
@settings(max_examples=400, derandomize=True, deadline=None)
def test_layers_that_keep_what_they_see_have_room(
    method: str, num_layers: int, ratio: float, block_size: int, num_tokens: int, window_size: int, num_sink: int
) -> None:
    """Whole pages in each layer, within the mean that the scheduler knows, though it does not know the layers."""
    config = CompressionConfig(
        method, retention_ratio=ratio, window_size=window_size, num_sink=num_sink, min_tokens=window_size + 1
    )
    try:
        config = config.for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=8192)
    except ValueError:
        assume(False)  # less than the method's schedule can leave
    plan = config.plan(num_tokens, block_size)
    assume(isinstance(plan, PromptPlan))
    kept = CUT_BUDGETS[config.layer_budgets](plan, num_layers, BudgetOptions())
    assert plan.cuts and all(n % block_size == 0 and n >= plan.least_pages * block_size for n in kept)
    assert sum(kept) <= plan.num_moved * num_layers


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("window_size", [1, 8, 15, 16, 17, 32])
def test_every_short_prompt(block_size: int, window_size: int) -> None:
    """Prompts of 1 to 300 tokens, every budget in steps, min_tokens at its lowest."""
    compressed = 0
    for num_tokens in range(1, 301):
        for num_kept in (0, 1, window_size, num_tokens // 10, num_tokens // 2, num_tokens - 1, num_tokens):
            plan = fit(
                num_tokens=num_tokens,
                block_size=block_size,
                num_kept=num_kept,
                cuts=[(3, num_tokens // 5)],
                window_size=window_size,
                num_sink=2,
                num_recent=window_size,
                min_tokens=window_size + 1,
            )
            if isinstance(plan, PromptPlan):
                check_plan(plan, num_kept, [(3, num_tokens // 5)])
                compressed += 1
            else:
                assert (plan is LeftAlone.SHORT) == (num_tokens <= window_size)
    assert compressed > 100


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("min_tokens", [9, 15, 16, 17, 31, 32, 33, 96, 127, 128, 129])
def test_min_tokens_is_the_first_length_that_counts(block_size: int, min_tokens: int) -> None:
    config = CompressionConfig("fastkv", min_tokens=min_tokens)
    reasons = [config.plan(n, block_size) for n in range(1, 101)]
    assert [reason is LeftAlone.SHORT for reason in reasons] == [n < min_tokens for n in range(1, 101)]


@given(arguments(), st.integers(1, 400))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_peak_is_what_a_growing_request_holds(arguments: dict[str, Any], num_answer: int) -> None:
    plan = plan_of(arguments)
    peak = 0
    for num_tokens in [*range(1, plan.num_tokens + num_answer + 1, 7), plan.num_tokens, plan.num_tokens + num_answer]:
        # A prompt's blocks are all there when it ends, and the surplus goes back at once.
        held = ceil(num_tokens / plan.block_size) - (plan.num_freed_blocks if num_tokens > plan.num_tokens else 0)
        if plan.evicts:
            held -= max((num_tokens - 1) // plan.block_size - plan.num_whole_blocks, 0)
        before_end = ceil(min(num_tokens, plan.num_tokens) / plan.block_size)
        peak = max(held, before_end)
        assert ceil(plan.peak_tokens(num_tokens) / plan.block_size) == peak
        assert plan.peak_tokens(num_tokens) <= num_tokens


@given(
    st.integers(200, 6000),
    st.floats(0.05, 0.95),
    st.sampled_from(BLOCK_SIZES),
    st.integers(1, 700),
    st.integers(0, 70),
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=3, max_size=3),
    st.booleans(),
    st.integers(0, 400),
    st.sampled_from([1, 2]),
)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_heads_let_go_at_stops(
    num_tokens: int,
    ratio: float,
    block_size: int,
    streaming_tokens: int,
    num_sink: int,
    weights: list[list[float]],
    evicts: bool,
    num_answer: int,
    num_ranks: int,
) -> None:
    """Pages read one after the other and let go at stops: blocks have room for them, none is taken back; the peak.

    On two ranks with a head each, blocks have room for the pages of the rank with the most.
    """
    weights[0][0] = 1.0  # not all are 0
    config = CompressionConfig(
        "duoattention",
        retention_ratio=ratio,
        streaming_tokens=streaming_tokens,
        num_sink=num_sink,
        head_weights=weights,
        evict_while_decoding=evicts,
        min_tokens=200,
    )
    plan = config.plan(num_tokens, block_size)
    assume(isinstance(plan, PromptPlan))
    assert plan.streaming is not None
    plan = replace(plan, num_ranks=num_ranks)
    most = [pages for layer in plan.streaming.pages for pages in layer]
    period = ceil(streaming_tokens / block_size)
    assert min(most) > ceil(num_sink / block_size)
    held, blocks, peak, stops = [0] * len(most), 0, 0, []
    for read in range(1, ceil(num_tokens / block_size) + 1):
        held, blocks = [n + 1 for n in held], blocks + 1
        peak = max(peak, min(blocks * block_size, num_tokens - (read - blocks) * block_size))
        if read % period == 0 and read * block_size < num_tokens and any(map(int.__gt__, held, most)):
            stops.append(read * block_size)
            held = list(map(min, held, most))
            assert plan.streaming.counts(read) == [held[:2], held[2:4], held[4:]]
            of_ranks = [ceil(sum(held[rank::num_ranks]) * num_ranks / 6) for rank in range(num_ranks)]
            assert plan.num_blocks_at(stops[-1]) == max(of_ranks)
            assert plan.num_blocks_at(stops[-1]) <= blocks, "blocks would have to be taken"
            blocks = plan.num_blocks_at(stops[-1])
    assert plan.stops == (*stops, num_tokens)
    left = plan.num_blocks_at(num_tokens)
    pages = config.make_allocator().model_pages(plan, [plan.num_whole_blocks] * 3)
    assert max(ceil(sum(pages[rank::num_ranks]) * num_ranks / 6) for rank in range(num_ranks)) <= left <= blocks
    assert num_ranks > 1 or left == plan.num_pages
    assert plan.peak_tokens(num_tokens) == peak
    later = num_tokens + num_answer - plan.num_freed_blocks * block_size
    later = min(later, (left + 1) * block_size) if evicts else later
    assert num_answer == 0 or plan.peak_tokens(num_tokens + num_answer) == max(peak, later)
    chunks, read = [], 0
    while read < num_tokens:
        assert (plan.stop_at(read) == read) == (read in stops)
        read = plan.stop_after(read)
        chunks.append(read)
    assert chunks == [*stops, num_tokens] and plan.stop_at(num_tokens + 1) == num_tokens


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("method", ["fastkv", "snapkv", "streamingllm"])
def test_retention_one_leaves_every_prompt_alone(method: str, block_size: int) -> None:
    config = CompressionConfig(method, retention_ratio=1.0, min_tokens=9)
    for num_tokens in range(1, 2000):
        assert isinstance(config.plan(num_tokens, block_size), LeftAlone), num_tokens


def test_a_plan_by_hand() -> None:
    """1000 tokens in blocks of 32: 31 whole ones and a tail of 8, which is the window."""
    config = CompressionConfig("fastkv", retention_ratio=0.1, tsp_layer=3)
    plan = config.plan(1000, 32)
    assert plan == PromptPlan(
        1000, 32, num_pages=3, cuts=((3, 200),), window_size=8, num_voters=8, num_sink=0, num_recent=8
    )
    assert (plan.num_whole_blocks, plan.num_tail, plan.forced_from) == (31, 8, 992)
    assert (plan.num_moved, plan.num_kept, plan.num_freed_blocks) == (96, 104, 28)
    assert [plan.peak_tokens(n) for n in (1, 1000, 1001, 1895, 1897)] == [1, 1000, 1000, 1000, 1001]


@pytest.mark.parametrize(
    ("num_tokens", "cuts"),
    [
        (1000, ((2, 600), (4, 400), (5, 200))),
        (600, ((4, 400), (5, 200))),  # the first cut would keep all rows
        (300, ((5, 200),)),
        (200, ()),
    ],
)
def test_cuts_that_keep_all_rows_are_left_out(num_tokens: int, cuts: tuple[tuple[int, int], ...]) -> None:
    config = CompressionConfig("fastkv", budget=64, min_tokens=100, tsp_layer=(2, 4, 5), tsp_tokens=(600, 400, 200))
    plan = config.plan(num_tokens, 32)
    assert isinstance(plan, PromptPlan) and plan.cuts == cuts


def test_every_cut_leaves_what_stays() -> None:
    """The window raises what stays above the last two cuts: the second is raised to it, the third drops nothing."""
    config = CompressionConfig(
        "fastkv", retention_ratio=0.1, window_size=300, tsp_layer=(2, 4, 5), tsp_ratio=(0.6, 0.2, 0.1)
    )
    plan = config.plan(1000, 32)
    assert isinstance(plan, PromptPlan)
    assert (plan.num_kept, plan.cuts) == (328, ((2, 600), (4, 328)))
