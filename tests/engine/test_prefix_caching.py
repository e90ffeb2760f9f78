"""Compression beside vLLM's prefix cache: originals stay hittable, compressed blocks are never hashed."""

import pytest

from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts
from tests.engine.settings import SMALL

METHODS = ("snapkv", "streamingllm", "vatp")


@pytest.fixture(params=METHODS, scope="module")
def engine(request, start):
    return start(request.param, SMALL, enable_prefix_caching=True, num_gpu_blocks_override=400)


def most_cached(engine, num_tokens):
    """Longest hit that leaves the window's queries to be computed."""
    return (num_tokens - engine.config.window_size) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("num_tokens", [640, 644, 648, 700])
def test_a_repeated_prompt_hits_its_originals(engine, num_tokens):
    """The first run was compressed and finished; its prompt's blocks are still found, and never the compressed."""
    prompt = make_prompts([num_tokens], seed=num_tokens)
    assert engine.check(prompt)[0].num_cached_tokens == 0
    for _ in range(2):
        cached = engine.check(prompt)[0].num_cached_tokens
        assert cached == most_cached(engine, num_tokens)
        assert num_tokens - cached >= engine.config.window_size


def test_a_repeated_short_prompt_is_vllms_business(engine):
    prompt = make_prompts([100], seed=3)
    engine.check(prompt)
    assert engine.check(prompt)[0].num_cached_tokens == 96


@pytest.mark.parametrize("step_tokens", [100, 2048])
def test_shared_prefixes(engine, step_tokens):
    """Siblings run at the same time on the same originals; each keeps its own."""
    base = make_prompts([500], seed=step_tokens)[0]
    tails = make_prompts([30, 200, 3, 400, 90], seed=5)
    with engine.step_tokens(step_tokens):
        first = engine.check([base + tail for tail in tails])
        again = engine.check([base + tail for tail in tails])
        assert sum(output.num_cached_tokens for output in first) > 0, "no sibling hit another's blocks"
    assert all(output.num_cached_tokens >= 480 for output in again)


def test_turns_of_a_conversation(engine):
    """A turn finds the prompt of the turn before; answers of compressed requests are not cached."""
    questions = make_prompts([400, 90, 200, 61], seed=11)
    prompt, cached_before = questions[0], 0
    for question in questions[1:]:
        prompt = clear(engine.checkpoint, engine.config, prompt, 40)
        (output,) = engine.check([prompt], max_tokens=40)
        assert output.num_cached_tokens == cached_before
        cached_before = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
        prompt = prompt + tuple(output.outputs[0].token_ids) + question


def test_preempted_requests_hit_their_own_originals(engine):
    prompts = make_prompts([450, 700], seed=13)

    def preempt(number):
        if number in (3, 12, 20):
            for request in list(engine.scheduler.running):
                engine.scheduler.running.remove(request)
                engine.scheduler._preempt_request(request, 0.0, drop_stale_output=True)
            engine.scheduler.prev_step_scheduled_req_ids.clear()

    hits = []
    with engine.step_tokens(200), engine.watch(before=preempt, after=lambda output: hits.append(resumed(output))):
        engine.check(prompts)
    assert any(p.compressed for p in engine.preemptions)
    assert any(not p.prompt_ended for p in engine.preemptions)
    assert max(max(step, default=0) for step in hits) >= 416


def resumed(output):
    """Cached tokens of the requests that go on after a preemption."""
    return [
        cached
        for rid, cached in zip(
            output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True
        )
        if rid in output.scheduled_cached_reqs.resumed_req_ids
    ]


# 24 usable blocks. The first prompt takes 21 and gives 1 back where a sibling holds its first 19, but its 4 pages need
# fresh blocks. That sibling fits beside it, and its first chunk in the same step would take 2 of the 3 free ones.
TIGHT = {"enable_prefix_caching": True, "num_gpu_blocks_override": 25, "max_model_len": 768, "max_num_seqs": 6}
TIGHT_STEP = 700


def tight_load():
    base = make_prompts([608], seed=17)[0]
    tails = zip((608, 608, 320, 608, 0), make_prompts([37, 96, 300, 60, 645], seed=18), strict=True)
    return [base[:cut] + tail for cut, tail in tails]


@pytest.mark.parametrize("method", METHODS)
def test_a_tight_pool_compresses_all(start, method):
    """Never silently uncompressed: `check` counts, and the reference drops."""
    engine = start(method, SMALL, **TIGHT)
    reserve, reserved = engine.manager._reserved_blocks, []
    engine.manager._reserved_blocks = lambda *args: reserved.append(reserve(*args)) or reserved[-1]
    with engine.step_tokens(TIGHT_STEP):
        for _ in range(2):
            outputs = engine.check(tight_load())
            assert max(reserved) > 0, "the pool was not tight"
            reserved.clear()
    assert sum(output.num_cached_tokens for output in outputs) > 0


def test_the_reservation_is_what_makes_room(start, monkeypatch):
    """The same load without it finds no block for a prompt that must be moved."""
    engine = start("snapkv", SMALL | {"window_size": 9}, **TIGHT)  # an engine of its own: it does not survive
    monkeypatch.setattr(type(engine.manager), "_reserved_blocks", lambda *args: 0)
    with engine.step_tokens(TIGHT_STEP), pytest.raises(ValueError, match="free blocks"):
        engine.generate(tight_load(), 36)
