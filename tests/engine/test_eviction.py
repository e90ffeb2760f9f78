"""Entries evicted while decoding: the reference's tokens, a bound on what a request holds, all blocks back."""

import pytest

from fastkv_vllm.cache import PromptPlan
from tests.engine.oracle import BLOCK_SIZE, blocks_filled, make_prompts, plan_of
from tests.engine.settings import EVICTING, HALTING, SMALL, TSP

ENGINES = {
    "h2o": ("h2o", SMALL),
    "a2sf": ("a2sf", SMALL),
    "tova": ("tova", SMALL | {"value_norms": True}),
    "streamingllm": ("streamingllm", SMALL),
    "snapkv": ("snapkv", SMALL | EVICTING | {"value_norms": True}),
    "fastkv": ("fastkv", TSP | EVICTING | {"window_size": 45}),  # more than a block votes
    "adakv": ("adakv", SMALL | EVICTING),
    "h2o-pyramid": ("h2o", SMALL | {"layer_budgets": "pyramid", "value_norms": True}),
    "dbudgetkv": ("dbudgetkv", HALTING | EVICTING),
    "pyramidinfer": ("pyramidinfer", {"min_tokens": 128}),
}
PROMPTS = make_prompts([450, 90, 300], seed=2)
MAX_TOKENS = 102  # the first and the last fill three blocks


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    return start(*ENGINES[request.param])


def require_bound(engine):
    """No compressed request holds more than its pages and the block that fills up."""
    for rid, num_nulls in engine.manager.null_blocks.items():
        table = engine.manager.req_to_blocks[rid]
        held = sum(not block.is_null for block in table)
        assert held == len(table) - num_nulls <= engine.manager.plans[rid].num_pages + 1, rid


def test_long_answers(engine):
    """Prompts in chunks beside rows that evict, one left alone; its answer stays whole."""
    before = engine.totals.decode_blocks_freed
    with engine.step_tokens(61), engine.watch(after=lambda _: require_bound(engine)):
        engine.check(PROMPTS, max_tokens=MAX_TOKENS)
    filled = [
        blocks_filled(len(prompt), len(prompt) + MAX_TOKENS)
        for prompt in PROMPTS
        if isinstance(plan_of(engine.config, len(prompt)), PromptPlan)
    ]
    assert filled == [3, 3]
    assert engine.totals.decode_blocks_freed - before == sum(filled)


def test_preempted_while_decoding(engine):
    """The answer is replayed in chunks that end where blocks are full."""
    lengths = []

    def preempt(number):
        if number in (60, 100):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    def look(output):
        require_bound(engine)
        lengths.extend(n for rid, n in output.num_scheduled_tokens.items() if rid in engine.manager.null_blocks)

    with engine.watch(before=preempt, after=look):
        engine.check(PROMPTS, max_tokens=MAX_TOKENS)
    assert [p.compressed for p in engine.preemptions].count(True) >= 3
    assert BLOCK_SIZE in lengths, "no whole block was replayed at once"


def test_a_question_longer_than_a_block(engine):
    before = engine.totals.decode_blocks_freed
    for step_tokens in (50, 2048):
        with engine.step_tokens(step_tokens), engine.watch(after=lambda _: require_bound(engine)):
            engine.check(PROMPTS[:1], contexts=[330], max_tokens=8)
    assert engine.totals.decode_blocks_freed - before == 2 * blocks_filled(330, 458)


def test_prefix_caching(start):
    """Blocks that are given back carry no hash, whoever takes them."""
    engine = start(
        "snapkv", SMALL | EVICTING, enable_prefix_caching=True, num_gpu_blocks_override=60, max_model_len=768
    )
    prompts = [PROMPTS[0], PROMPTS[0][:400] + PROMPTS[1]]
    for _ in range(2):
        outputs = engine.check(prompts, max_tokens=70)
    assert max(output.num_cached_tokens for output in outputs) > 0, "nothing came from the prefix cache"
    assert engine.totals.decode_blocks_freed > 0


def test_answers_longer_than_the_pool(start):
    """Four answers together fill far more blocks than there are; none has to wait for another."""
    engine = start("streamingllm", SMALL, num_gpu_blocks_override=23, max_model_len=640)
    prompts = make_prompts([150] * 4, seed=4)
    with engine.watch():
        engine.check(prompts, max_tokens=200)
        assert not engine.preemptions
    assert engine.totals.decode_blocks_freed == 4 * blocks_filled(150, 350) > 22
