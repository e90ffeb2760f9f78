"""A preempted request goes on as if nothing had happened, whenever it was preempted."""

import pytest

from tests.engine.oracle import BLOCK_SIZE, make_prompts, plan_of
from tests.engine.settings import EXACT

ENGINES = pytest.mark.parametrize("name", ["fastkv", "fastkv-cuts", "gemfilter", "snapkv"])
CROWD = make_prompts([250] * 9, seed=7)
STEP = 100


@ENGINES
def test_a_crowd_in_a_small_pool(start, name):
    """vLLM preempts by itself: compressed requests outgrow the pool while others prefill."""
    engine = start(*EXACT[name], num_gpu_blocks_override=21, max_model_len=640, max_num_seqs=9)
    with engine.step_tokens(STEP), engine.watch():
        engine.check(CROWD, max_tokens=120)
    assert any(p.compressed for p in engine.preemptions), "none was preempted after its compaction"


@pytest.mark.parametrize("step", range(1, 12))
@ENGINES
def test_all_are_preempted_before_a_step(start, name, step):
    """vLLM's own reset preempts what runs: before, amid and after compaction."""
    engine = start(*EXACT[name])
    prompts = make_prompts([450, 90, 300])

    def preempt(number):
        if number == step:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(STEP), engine.watch(before=preempt):
        engine.check(prompts, max_tokens=16)
    assert engine.preemptions
    # 840 tokens: the first prompt ends in step 4 (counted from 0), the last one in step 8.
    assert any(p.compressed for p in engine.preemptions) == (step > 4)
    assert any(not p.prompt_ended for p in engine.preemptions) == (step < 9)


@ENGINES
def test_preempted_over_and_over(start, name):
    engine = start(*EXACT[name])
    prompts = make_prompts([450, 700], seed=1)

    def preempt(number):
        if number % 17 == 16:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(STEP), engine.watch(before=preempt):
        engine.check(prompts, max_tokens=36)
    assert sum(p.compressed for p in engine.preemptions) >= 4


@ENGINES
def test_a_resumed_request_that_fits_compressed_only(start, name):
    """Prompt and answer together are more than the pool; a request that goes on must still be let in."""
    engine = start(*EXACT[name], num_gpu_blocks_override=21, max_model_len=639, max_num_seqs=9)
    (prompt,) = make_prompts([500])
    num_blocks = 20
    assert plan_of(engine.config, 500).peak_tokens(500 + 130) <= num_blocks * BLOCK_SIZE

    def preempt(number):
        if number == 125:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.watch(before=preempt):
        engine.check([prompt], max_tokens=130)
    assert [p.compressed for p in engine.preemptions] == [True]
