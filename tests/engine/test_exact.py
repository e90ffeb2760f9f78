"""Any chunking, any batch mix: the tokens of a reference that drops the same entries."""

import pytest

from fastkv_vllm.cache import PromptPlan
from tests.engine.oracle import make_prompts, plan_of
from tests.engine.settings import EXACT, MIXED


@pytest.fixture(params=EXACT, scope="module")
def engine(request, start):
    return start(*EXACT[request.param])


def test_prompts_one_by_one_in_one_chunk(engine):
    for prompt in MIXED[:3]:
        engine.check([prompt])


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Six requests, two of them left alone, prefill and decode in the same steps."""
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check(MIXED)
        assert len(engine.free_blocks) >= sum(map(len, MIXED)) / step_tokens, "prompts were not cut into chunks"


def test_rows_are_counted_before_the_first_cut_and_after_the_last(engine):
    worker = engine.totals.worker
    before = worker.tsp_rows_in, worker.tsp_rows_out
    with engine.step_tokens(100):
        engine.check(MIXED[:3], max_tokens=2)
    plans = [plan_of(engine.config, len(prompt)) for prompt in MIXED[:3]]
    cut = [plan for plan in plans if isinstance(plan, PromptPlan) and plan.cuts]
    assert worker.tsp_rows_in - before[0] == sum(plan.num_tokens for plan in cut)
    assert worker.tsp_rows_out - before[1] == sum(plan.cuts[-1][1] for plan in cut)


@pytest.mark.parametrize("last", [1, 4, 7])
def test_the_window_lies_in_two_chunks(engine, last):
    """The last chunk has 1 to window_size - 1 tokens."""
    prompt = MIXED[1]
    step_tokens = next(n for n in range(90, 700) if len(prompt) % n == last)
    with engine.step_tokens(step_tokens):
        engine.check([prompt], max_tokens=4)


def test_the_window_lies_in_three_chunks(engine):
    with engine.step_tokens(3):
        engine.check(make_prompts([263]), max_tokens=4)
