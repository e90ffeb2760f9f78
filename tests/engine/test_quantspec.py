"""Tokens drafted by a coarser view of the cache: answers are those of the same cache without drafts."""

from contextlib import contextmanager

import pytest

from fastkv_vllm.adapter.drafting import SelfDrafter
from fastkv_vllm.codecs import HierarchicalCodec
from tests.engine.harness import sampling
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, reference
from tests.engine.settings import DRAFTING

LENGTHS = [611, 400, 90, 705]  # 90 is below min_tokens
PROPOSE = SelfDrafter.propose


@pytest.fixture
def engine(start):
    return start("quantspec", DRAFTING, enable_prefix_caching=True)


@contextmanager
def watch_drafts(engine, before=None):
    """Within it, the list gets the drafts that each step verifies, request -> tokens; blocks are looked at."""
    requests = engine.scheduler.requests
    steps, most = [], {}

    def look(output):
        steps.append({external(rid): drafts for rid, drafts in output.scheduled_spec_decode_tokens.items()})
        for rid in engine.manager.ended & engine.manager.null_blocks.keys():
            plan, table, request = engine.manager.plans[rid], engine.manager.req_to_blocks[rid], requests[rid]
            key = rid, request.num_preemptions
            most[key] = max(most.get(key, 0), request.num_computed_tokens)  # drafts that are verified among them
            num_blocks = -(-most[key] // BLOCK_SIZE) - plan.num_whole_blocks + plan.num_stored_blocks
            assert sum(not block.is_null for block in table) == num_blocks, "drafts take blocks that they do not need"

    with engine.watch(before=before, after=look):
        yield steps


def external(rid):
    """The name under which a request was sent, out of vLLM's own."""
    return rid.rpartition("-")[0]


def counted(engine):
    """Tokens drafted and accepted since the start, as vLLM's own metrics say."""
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    found = {metric.name: metric.value for metric in engine.llm.get_metrics() if metric.name in names}
    return [found[name] for name in names]


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Prompts in chunks, one left alone, and drafts, in the same steps."""
    before = counted(engine)
    with engine.step_tokens(step_tokens), watch_drafts(engine) as steps:
        outputs = engine.check(make_prompts(LENGTHS), max_tokens=9)
    drafted, accepted = (now - then for now, then in zip(counted(engine), before, strict=True))
    assert drafted == sum(len(tokens) for step in steps for tokens in step.values())
    assert max(len(tokens) for step in steps for tokens in step.values()) == DRAFTING["draft_tokens"]
    assert 0 < accepted < drafted, "random weights: some tokens hang on the lower bits"
    drafting = {rid for step in steps for rid in step}
    assert drafting == {outputs[i].request_id for i in (0, 1, 3)}, "a prompt left alone has one view only"


def test_drafts_by_the_whole_view_are_all_accepted(engine, monkeypatch):
    """Were the coarser view as fine as the other, a draft would be the very token."""
    monkeypatch.setattr(HierarchicalCodec, "draft_view", lambda self: self)
    before = counted(engine)
    engine.check(make_prompts(LENGTHS), max_tokens=9)
    drafted, accepted = (now - then for now, then in zip(counted(engine), before, strict=True))
    assert drafted == accepted > 15


def test_drafts_that_are_not_accepted(engine, monkeypatch):
    """They leave nothing behind, whichever of them are wrong."""
    monkeypatch.setattr(HierarchicalCodec, "draft_view", lambda self: self)
    wrong = iter(range(10**6))

    def propose(self, *args, **kwargs):
        drafts = PROPOSE(self, *args, **kwargs)
        return [[token if next(wrong) % 3 else 4 + (token - 3) % 496 for token in tokens] for tokens in drafts]

    monkeypatch.setattr(SelfDrafter, "propose", propose)
    before = counted(engine)
    with engine.step_tokens(200), watch_drafts(engine):
        engine.check(make_prompts(LENGTHS, seed=5), max_tokens=12)
    drafted, accepted = (now - then for now, then in zip(counted(engine), before, strict=True))
    assert 0 < accepted < drafted * 0.8


def test_preempted_with_drafts_under_way(engine):
    preempted = []

    def preempt(number):
        drafts = [request.spec_token_ids for request in engine.scheduler.running if request.spec_token_ids]
        if drafts and len(preempted) < 2 and number > 5:
            preempted.append(drafts)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(200), watch_drafts(engine, before=preempt):
        engine.check(make_prompts([450, 90, 321], seed=1), max_tokens=10)
    assert len(preempted) == 2 and any(p.compressed for p in engine.preemptions)


def test_question_behind_an_encoded_context(engine):
    with watch_drafts(engine) as steps:
        engine.check(make_prompts([611, 704], seed=2), max_tokens=6, contexts=[500, 681])
    assert any(steps)


def test_a_prompt_of_which_one_token_is_not_cached(engine):
    """vLLM takes it for a token to decode and fills up with drafts; the prompt must be read to its end first."""
    (prompt,) = make_prompts([641], seed=9)
    prompt = clear(engine.checkpoint, engine.config, prompt, 3)
    for _ in range(2):
        (output,) = engine.check([prompt], max_tokens=3)
    assert output.num_cached_tokens == 640


def test_only_greedy_requests_draft(engine):
    prompts = [clear(engine.checkpoint, engine.config, prompt, 8) for prompt in make_prompts([300, 330], seed=3)]
    parameters = [sampling(8), sampling(8, temperature=1.0, seed=1)]
    with watch_drafts(engine) as steps:
        outputs = engine.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)
    engine.require_reference(prompts[0], outputs[0], 8)
    assert len(outputs[1].outputs[0].token_ids) == 8
    assert {rid for step in steps for rid in step} == {outputs[0].request_id}


@pytest.mark.parametrize("stop", ["stop token", "max_tokens"])
def test_an_answer_ends_where_it_would(engine, stop):
    """A stop token among accepted drafts ends it; drafts behind the longest answer are not made."""
    (prompt,) = make_prompts([400], seed=4)
    prompt = clear(engine.checkpoint, engine.config, prompt, 9)
    tokens = list(reference(engine.checkpoint, engine.config, prompt, 9).tokens)
    end = tokens.index(tokens[3]) + 1 if stop == "stop token" else 3
    parameters = {"max_tokens": 9, "stop_token_ids": [tokens[3]]} if stop == "stop token" else {"max_tokens": 3}
    with watch_drafts(engine) as steps:
        (output,) = engine.generate([prompt], **parameters)
    assert list(output.outputs[0].token_ids) == tokens[:end]
    if stop == "max_tokens":
        assert max(len(drafts) for step in steps for drafts in step.values()) <= 1, "the first token needs no draft"
    engine.require_idle()
