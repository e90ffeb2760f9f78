"""Every prompt length around every boundary: window, block, min_tokens, budget."""

import pytest

from tests.engine.oracle import make_prompts

# Window 8, blocks of 32, prompts of 16 and more are looked at, the budget is a page or what the tail leaves of it.
EDGES = {"min_tokens": 16, "budget": 33}
ENGINES = {"fastkv": EDGES | {"tsp_layer": 3, "tsp_tokens": 36}, "snapkv": EDGES}
SHORT = make_prompts(list(range(1, 101)))
LONGER = make_prompts([length for edge in (128, 160, 256) for length in range(edge - 2, edge + 10)], seed=1)


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    return start(request.param, ENGINES[request.param], max_num_seqs=16)


def test_lengths_1_to_100(engine):
    """36 tokens after it, each request crosses a block boundary with what it generates, too."""
    engine.check(SHORT)
    assert engine.totals.requests_compressed > 30
    assert set(engine.totals.left_alone) == {"short", "budget_covers_prompt"}


def test_lengths_around_blocks_in_small_chunks(engine):
    with engine.step_tokens(29):
        engine.check(LONGER, max_tokens=4)
