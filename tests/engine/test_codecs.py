"""Entries stored by a codec: the tokens of a reference that rounds the same entries, in the blocks promised."""

import pytest
import torch

from fastkv_vllm.cache import PromptPlan
from tests.engine.oracle import BLOCK_SIZE, blocks_encoded, clear, code_blocks, make_prompts, plan_of, reference
from tests.engine.settings import ENCODED, ENCODING, KIVI

LENGTHS = [611, 400, 90, 704, 385]  # 90 is below min_tokens


@pytest.fixture(params=ENCODED, scope="module")
def engine(request, start):
    return start(*ENCODED[request.param])


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Prompts left alone, prefill and decode in the same steps as decoded reads."""
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check(make_prompts(LENGTHS), max_tokens=8)


def test_blocks_hold_encoded_pages(engine):
    """What layers and heads keep is the reference's; its bytes fill the blocks that were not freed."""
    (prompt,) = make_prompts([704], seed=3)
    prompt = clear(engine.checkpoint, engine.config, prompt, 4)
    with engine.watch_held() as (held, blocks), engine.watch_kept() as watched:
        engine.check([prompt], max_tokens=4)
    plan = plan_of(engine.config, len(prompt))
    assert isinstance(plan, PromptPlan) and plan.page_entries > plan.block_size
    pages, expected = held[-1], reference(engine.checkpoint, engine.config, prompt, 4)
    assert watched == [[head.tolist() for head in layer] for layer in expected.kept], "the very entries"
    counts = torch.tensor([[len(head) - plan.num_tail for head in layer] for layer in expected.kept])
    assert torch.equal(pages.counts * plan.block_size, counts)
    stored = -(-(counts + plan.sink_places) // plan.page_entries)
    assert torch.equal(pages.stored.counts, stored)
    in_prompt = -(-int(stored.sum()) // stored.numel())
    assert blocks[-1] == in_prompt + -(-(len(prompt) + 3) // plan.block_size) - plan.num_whole_blocks
    taken = pages.stored.pages[torch.arange(pages.stored.pages.shape[2]) < stored.unsqueeze(-1)]
    assert len(set(taken.tolist())) == len(taken), "a page is held twice"


def test_question_behind_an_encoded_context(engine):
    """Several queries a sequence read from decoded pages."""
    engine.check(make_prompts([611, 704]), max_tokens=5, contexts=[500, 681])


# Prompts and contexts: questions stand for generated tokens; the second answers end a block, the third is left alone.
# Float noise grows from one block of two bits to the next, so that few of them can be told from errors.
ENCODED_LATER = {
    "kivi": ([400, 389, 90], [330, None, None]),
    "skvq": ([400, 389, 90], [300, None, None]),
    "fastkv-int8": ([500, 640, 90], [200, None, None]),
}


@pytest.fixture(params=ENCODED_LATER, scope="module")
def encoding(request, start):
    return start(*ENCODING[request.param]), *ENCODED_LATER[request.param]


def look_at_codes(engine):
    """Requests hold what codes need and the blocks after those encoded; gives the blocks encoded since each prompt."""
    found = {}
    for rid in engine.manager.ended & engine.manager.null_blocks.keys():
        plan, table = engine.manager.plans[rid], engine.manager.req_to_blocks[rid]
        num_encoded = (engine.scheduler.requests[rid].num_computed_tokens - plan.residual) // BLOCK_SIZE
        held = [not block.is_null for block in table]
        assert sum(held) == code_blocks(plan, num_encoded) + len(table) - num_encoded
        assert held == sorted(held), "null blocks come first"
        found[rid] = num_encoded - plan.num_whole_blocks
    return found


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_what_leaves_the_window_is_encoded(encoding, step_tokens):
    engine, lengths, contexts = encoding
    before, encoded = engine.totals.decode_blocks_freed, {}
    with engine.step_tokens(step_tokens), engine.watch(after=lambda _: encoded.update(look_at_codes(engine))):
        engine.check(make_prompts(lengths, seed=4), max_tokens=6, contexts=contexts)
    plans = [plan_of(engine.config, context or length) for length, context in zip(lengths[:2], contexts, strict=False)]
    freed = sum(blocks_encoded(plan, length + 6) for plan, length in zip(plans, lengths, strict=False))
    assert engine.totals.decode_blocks_freed - before == freed < sum(encoded.values()), "none is a place for codes"


def test_encoded_blocks_of_a_preempted_request(encoding):
    """The answer is replayed in a step that ends where a block is encoded, and another."""
    engine, lengths, _ = encoding

    def preempt(number):
        if number in (9, 14):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    before = engine.totals.decode_blocks_freed
    with engine.step_tokens(200), engine.watch(before=preempt):
        engine.check(make_prompts(lengths[1:], seed=4), max_tokens=9)
    assert any(p.compressed for p in engine.preemptions)
    assert engine.totals.decode_blocks_freed > before + 1


def test_preempted_and_their_blocks_given_to_others(start):
    """Codes read as any number; attention of the next owner of a block must not meet them behind its last entry."""
    engine = start(*ENCODED["snapkv-int8"], num_gpu_blocks_override=41, max_model_len=768)

    def preempt(number):
        if number in (6, 11):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        engine.check(make_prompts([450, 90, 300], seed=1), max_tokens=8)
    assert any(p.compressed for p in engine.preemptions), "none was preempted after its compaction"
    for _ in range(3):
        engine.check(make_prompts([600], seed=2), max_tokens=6)
        engine.check(make_prompts([90, 70, 110], seed=3), max_tokens=6)


def test_prefix_caching(start):
    engine = start(*ENCODED["adakv-int2"], enable_prefix_caching=True, num_gpu_blocks_override=120)
    first = make_prompts([640], seed=9)[0]
    prompts = [first, first[:500] + make_prompts([77], seed=10)[0]]
    for _ in range(2):
        outputs = engine.check(prompts, max_tokens=6)
    assert max(output.num_cached_tokens for output in outputs) > 0, "nothing came from the prefix cache"


def test_prefix_caching_of_what_is_encoded_later(start):
    """The prompt's blocks in the window are shared when they are encoded; the places of their codes are not."""
    settings = KIVI | {"residual_window": 100}
    engine = start("kivi", settings, enable_prefix_caching=True, num_gpu_blocks_override=120)
    first = make_prompts([640], seed=9)[0]
    for length, context in ((560, 500), (640, 600), (640, 600)):
        with engine.watch(after=lambda _: look_at_codes(engine)):
            (output,) = engine.check([first[:length]], max_tokens=4, contexts=[context])
    assert output.num_cached_tokens > 0, "nothing came from the prefix cache"
