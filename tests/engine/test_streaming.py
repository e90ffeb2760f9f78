"""Heads that let go while a prompt is read: the reference's tokens, few blocks, all back, whatever happens then."""

import pytest

from tests.engine.harness import sampling
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, plan_of
from tests.engine.settings import DUO, EVICTING, WEIGHTS

STREAMING = {"min_tokens": 100, "retention_ratio": 0.4, "streaming_tokens": 100, "num_sink": 40}
ENGINES = {  # four sinks in a page, stops every 2 blocks; forty sinks in two pages, every 4; that and eviction later
    "few-sinks": DUO | {"head_weights": WEIGHTS},
    "many-sinks": STREAMING | {"head_weights": WEIGHTS},
    "evicting": STREAMING | EVICTING | {"head_weights": WEIGHTS},
}
PROMPTS = make_prompts(
    [1000, 90, 513, 640], seed=3
)  # one left alone, one that ends behind a stop, one that ends at one
STEP = 100


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    return start("duoattention", ENGINES[request.param])


def num_held(engine, rid):
    return sum(not block.is_null for block in engine.manager.req_to_blocks[rid])


@pytest.mark.parametrize("step_tokens", [37, 300, 2048])
def test_mixed_requests(engine, step_tokens):
    """However chunks are cut; rows that stream beside rows whose prompt has ended and one that is left alone."""
    ends = set()

    def look(output):
        ends.update(engine.scheduler.requests[rid].num_computed_tokens for rid in output.num_scheduled_tokens)

    with engine.step_tokens(step_tokens), engine.watch(after=look):
        engine.check(PROMPTS, max_tokens=40)
    assert ends.issuperset(plan_of(engine.config, 1000).stops), "a chunk went past a stop"


def test_blocks_held_while_a_prompt_is_read(engine):
    """Never more than planned, which is far less than the prompt; what is said of it stays true."""
    (prompt,) = make_prompts([1900], seed=5)
    plan = plan_of(engine.config, len(prompt))
    held = []

    def look(output):
        held.extend(num_held(engine, rid) for rid in output.num_scheduled_tokens)

    freed = engine.totals.blocks_freed
    prompt = clear(engine.checkpoint, engine.config, prompt, 4)
    with engine.step_tokens(STEP), engine.watch(after=look):
        (output,) = engine.check([prompt], max_tokens=4)
    # The blocks of a step are there before it, and those given back are gone after it: the free ones tell the most.
    most = engine.pool.num_gpu_blocks - 1 - min(engine.free_blocks)
    assert max(held) == most <= -(-plan.peak_tokens(len(prompt) + 4) // BLOCK_SIZE) < 0.6 * plan.num_whole_blocks
    assert held[-1] == plan.num_pages + 1
    assert engine.totals.blocks_freed - freed == plan.num_freed_blocks
    assert output.kv_transfer_params["fastkv"]["prompt_tokens_kept"] == plan.num_kept


@pytest.mark.parametrize("every", [3, 7])
def test_preempted_over_and_over(engine, every):
    """Within a prompt and after it; what is read anew is let go of anew."""
    before = {}

    def preempt(number):
        if number % every == every - 1 and number < 40:
            mid = engine.manager.null_blocks.keys() - engine.manager.ended
            before[number] = len(mid)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(300), engine.watch(before=preempt):
        engine.check(PROMPTS, max_tokens=24)
    assert any(before.values()), "none had let go of anything while its prompt was read"


@pytest.mark.parametrize("num_steps", [3, 6, 8])
def test_abort_within_a_prompt(engine, num_steps):
    llm = engine.llm.llm_engine
    llm.add_request("victim", {"prompt_token_ids": list(PROMPTS[0])}, sampling(40))
    other = clear(engine.checkpoint, engine.config, PROMPTS[2], 8)
    llm.add_request("other", {"prompt_token_ids": list(other)}, sampling(8))
    finished = []
    with engine.step_tokens(STEP):
        for _ in range(num_steps):
            finished += llm.step()
        assert engine.manager.null_blocks and not engine.manager.ended
        finished += engine.abort("victim")
    (answer,) = [output for output in finished if output.finished]
    engine.require_reference(other, answer, 8)


def test_prompts_that_fit_only_while_they_let_go(start):
    """Either alone is longer than the pool, whose plain requests would never be let in."""
    engine = start("duoattention", ENGINES["few-sinks"], num_gpu_blocks_override=41, max_model_len=1280)
    prompts = make_prompts([1200, 1100], seed=6)
    peaks = [plan_of(engine.config, len(prompt)).peak_tokens(len(prompt)) for prompt in prompts]
    assert sum(map(len, prompts)) > 40 * BLOCK_SIZE >= sum(peaks)
    together = []
    with engine.step_tokens(64), engine.watch(after=lambda output: together.append(len(output.num_scheduled_tokens))):
        engine.check(prompts, max_tokens=8)
    assert not engine.preemptions and max(together) == 2


def test_prefix_caching(start):
    """Up to its first stop a prompt is anyone's; from there on its own heads read it, and nothing of it is shared."""
    config = ENGINES["few-sinks"]
    engine = start("duoattention", config, enable_prefix_caching=True, num_gpu_blocks_override=120)
    first = make_prompts([900], seed=9)[0]
    prompts = [first, first[:800] + make_prompts([77], seed=10)[0], *make_prompts([640], seed=11)]
    shared = plan_of(engine.config, 900).stops[0] - BLOCK_SIZE
    assert shared > 0
    for number in range(2):
        with engine.step_tokens(200):
            outputs = engine.check(prompts, max_tokens=20)
        assert {output.num_cached_tokens for output in outputs[:2]} <= {0, shared}
        assert number == 0 or all(output.num_cached_tokens == shared for output in outputs)
    (plain,) = engine.llm.generate(
        [{"prompt_token_ids": list(first)}], sampling(8, extra_args={"kv_compression": "none"}), use_tqdm=False
    )
    assert plain.num_cached_tokens == shared + BLOCK_SIZE, "blocks read before the first stop are as vLLM's"
    engine.require_reference(first, plain, 8, config=None)
    again = engine.check([first], max_tokens=20)
    assert again[0].num_cached_tokens == shared, "a plain request's blocks hold what other heads read"
