"""Entries stored by a codec: the tokens of a reference that rounds the same entries, in the blocks promised."""

import pytest
import torch

from fastkv_vllm.cache import PromptPlan
from tests.engine.oracle import clear, make_prompts, plan_of, reference
from tests.engine.settings import ENCODED

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
    held, blocks = [], []

    def look(output):
        held.extend(pages for rid, pages in engine.compressor.held.items() if rid in output.num_scheduled_tokens)
        blocks.append(sum(not block.is_null for table in engine.manager.req_to_blocks.values() for block in table))

    with engine.watch(after=look):
        engine.check([prompt], max_tokens=4)
    plan = plan_of(engine.config, len(prompt))
    assert isinstance(plan, PromptPlan) and plan.page_entries > plan.block_size
    pages, expected = held[-1], reference(engine.checkpoint, engine.config, prompt, 4)
    counts = torch.tensor([[len(head) - plan.num_tail for head in layer] for layer in expected.kept])
    assert torch.equal(pages.counts * plan.block_size, counts)
    stored = -(-counts // plan.page_entries)
    assert torch.equal(pages.stored.counts, stored)
    in_prompt = -(-int(stored.sum()) // stored.numel())
    assert blocks[-1] == in_prompt + -(-(len(prompt) + 3) // plan.block_size) - plan.num_whole_blocks
    taken = pages.stored.pages[torch.arange(pages.stored.pages.shape[2]) < stored.unsqueeze(-1)]
    assert len(set(taken.tolist())) == len(taken), "a page is held twice"


def test_question_behind_an_encoded_context(engine):
    """Several queries a sequence read from decoded pages."""
    engine.check(make_prompts([611, 704]), max_tokens=5, contexts=[500, 681])


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
