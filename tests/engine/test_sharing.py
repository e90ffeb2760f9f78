"""Layers that read the entries of others or are merged with them: a reference's tokens, in fewer blocks."""

import math

import pytest
import torch

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import PairCodec
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, plan_of, reference
from tests.engine.requests import answer, ask, filled
from tests.engine.settings import MERGED, REQUESTS, SHARING

LENGTHS = [611, 400, 90, 704, 385]  # 90 is below min_tokens


@pytest.fixture(scope="module")
def engine(start):
    return start(*SHARING["fastkv-sharing"])


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Prompts left alone, prefill and decode in the same steps as shared reads."""
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check(make_prompts(LENGTHS), max_tokens=8)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("num_tokens", [700, 704, 1001])
def test_layers_that_read_others_hold_no_pages(engine, monkeypatch, name, num_tokens):
    """The blocks held are those of the other layers' pages, each held once; tables name the owner's pages.

    Nor are they rated, unless rows are cut after them.
    """
    rated, inputs = set(), engine.compressor.votes.inputs
    monkeypatch.setattr(engine.compressor.votes, "inputs", lambda *a: rated.add(a[1].layer) or inputs(*a))
    method, settings = SHARING[name]
    config = filled(method, settings)
    prompt = clear(engine.checkpoint, config, *make_prompts([num_tokens], seed=num_tokens), 4)
    with engine.watch_held() as (held, blocks), engine.watch_kept() as watched:
        ask(engine, [(prompt, method, settings)], 4)
    expected = reference(engine.checkpoint, config, prompt, 4)
    assert watched == [[head.tolist() for head in layer] for layer in expected.kept], "a layer has its owner's entries"
    plan = plan_of(config, num_tokens)
    assert isinstance(plan, PromptPlan)
    owned, owners = held[-1].owned, plan.layer_owners
    follows = [layer != owner for layer, owner in enumerate(owners)]
    assert not owned.counts[follows].any()
    assert rated == {layer for layer in range(8) if not follows[layer] or layer in dict(plan.cuts)}
    num_owning = len(owners) - sum(follows)
    assert owned.counts.sum() == plan.num_pages * num_owning * owned.counts.shape[1]
    in_prompt = -(-plan.num_pages * num_owning // len(owners))
    assert blocks[-1] == in_prompt + -(-(num_tokens + 3) // BLOCK_SIZE) - plan.num_whole_blocks
    taken = owned.pages[torch.arange(owned.pages.shape[2]) < owned.counts.unsqueeze(-1)]
    assert len(set(taken.tolist())) == len(taken), "a page is held twice"
    table = held[-1].table(engine.compressor.pool, torch.tensor([7, 9]))
    assert torch.equal(table, table[list(owners)])


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("num_tokens", [700, 704])
def test_merged_layers_hold_records_and_what_is_retained(engine, monkeypatch, name, num_tokens):
    """Each pair comes back once a step."""
    restored, restore = [], PairCodec.restore
    monkeypatch.setattr(PairCodec, "restore", lambda *a: restored.append(a) or restore(*a))
    method, settings = MERGED[name]
    config = filled(method, settings)
    prompt = clear(engine.checkpoint, config, *make_prompts([num_tokens], seed=num_tokens), 4)
    with engine.watch_held() as (held, blocks):
        ask(engine, [(prompt, method, settings)], 4)
    plan = plan_of(config, num_tokens)
    assert isinstance(plan, PromptPlan) and plan.layer_owners == config.layer_owners
    num_vectors, num_magnitudes = (3, 2) if config.merge_layers == "values" else (2, 4)
    vector_bytes = {"none": 4 * 32, "int8": 4 + 32, "int4": 4 + 16}[config.codec]
    page_bytes, num_entries = BLOCK_SIZE * 2 * 4 * 32, plan.num_pages * BLOCK_SIZE
    num_records = -(-num_entries // (page_bytes // (num_vectors * vector_bytes + 4 * num_magnitudes)))
    per_page = page_bytes // (2 * vector_bytes)
    num_retained = -(-math.ceil(plan.num_pages * config.merge_gamma) * BLOCK_SIZE // per_page)
    expected = [-(-num_entries // per_page)] * 8
    for layer, owner in enumerate(plan.layer_owners):
        if layer != owner:
            expected[owner], expected[layer] = num_records, num_retained
    stored = held[-1].stored
    assert stored.counts.tolist() == [[count, count] for count in expected]
    assert blocks[-1] == -(-sum(expected) // 8) + -(-(num_tokens + 3) // BLOCK_SIZE) - plan.num_whole_blocks
    assert sum(expected) < 8 * plan.num_pages
    assert len(restored) == 3 * (8 - len(set(plan.layer_owners))), "in the steps after the prompt's"
    taken = stored.pages[torch.arange(stored.pages.shape[2]) < stored.counts.unsqueeze(-1)]
    assert len(set(taken.tolist())) == len(taken), "a page is held twice"


@pytest.mark.parametrize("name", MERGED)
def test_merged_layers_in_mixed_batches(engine, name):
    """In chunks, beside a prompt that a codec stores and one whose layers read others' entries."""
    with engine.step_tokens(200), engine.watch():
        asked = [(name, MERGED[name]), *((other, REQUESTS[other]) for other in ("adakv-int8", "kvsharer", "none"))]
        prompts = make_prompts([611, 500, 400, 300], seed=5)
        ready = [
            (clear(engine.checkpoint, filled(*settings), prompt, 8), *settings)
            for prompt, (_, settings) in zip(prompts, asked, strict=True)
        ]
        ask(engine, ready, 8)


def test_question_behind_a_context(engine):
    """Several queries a sequence read another layer's pages."""
    engine.check(make_prompts([611, 704]), max_tokens=5, contexts=[500, 681])


def test_preempted(engine):
    """Compressed again, they answer alike."""

    def preempt(number):
        if number in (13, 24):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        answer(engine, ["fastkv-sharing", "kvsharer", "minicache-keys", "adakv-int8"], max_tokens=8)
    assert any(p.compressed for p in engine.preemptions), "none was preempted after its compaction"


def test_prefix_caching(start):
    engine = start(*SHARING["kvsharer"], enable_prefix_caching=True, num_gpu_blocks_override=120)
    first = make_prompts([640], seed=9)[0]
    prompts = [first, first[:500] + make_prompts([77], seed=10)[0]]
    for _ in range(2):
        outputs = engine.check(prompts, max_tokens=6)
    assert max(output.num_cached_tokens for output in outputs) > 0, "nothing came from the prefix cache"
