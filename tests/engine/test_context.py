"""`kv_context_tokens`: the context is compressed before the question behind it is read."""

import pytest
from vllm.exceptions import VLLMValidationError

import fastkv_vllm.adapter.compressor
import fastkv_vllm.adapter.cuts
from fastkv_vllm.kernels.select import select
from tests.engine.harness import sampling
from tests.engine.oracle import clear, make_prompts
from tests.engine.settings import METHODS

PROMPTS = make_prompts([1111, 700, 832, 500, 300], seed=3)
CONTEXTS = [1100, 640, None, 499, 96]  # whole, at a block's end, all of it, all but one, below min_tokens


@pytest.fixture(params=["fastkv", "gemfilter", "snapkv", "h2o"], scope="module")
def engine(request, start):
    return start(request.param, METHODS[request.param])


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_contexts_in_one_batch(engine, step_tokens):
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check(PROMPTS, contexts=CONTEXTS)


def test_a_long_question_is_read_in_chunks(engine):
    with engine.step_tokens(50), engine.watch():
        engine.check(PROMPTS[:1], contexts=[400], max_tokens=8)


def test_the_question_has_no_say(engine, monkeypatch):
    """Two questions behind one context: the same entries stay; without the boundary they do not."""
    context, questions = PROMPTS[0][:900], (PROMPTS[1][:40], PROMPTS[2][:40])
    chosen = []
    for module in (fastkv_vllm.adapter.compressor, fastkv_vllm.adapter.cuts):
        monkeypatch.setattr(module, "select", lambda *args: chosen.append(select(*args)) or chosen[-1])

    def kept(question, num_context):
        chosen.clear()
        engine.generate([(*context, *question)], 2, [num_context])
        return [rows.tolist() for rows in chosen]

    first, second = (kept(question, 900) for question in questions)
    assert first == second
    whole = kept(questions[0], None)
    assert len(whole) == len(first)
    assert whole != first


@pytest.mark.parametrize("step", [3, 5, 7, 9])
def test_preempted_before_and_after_the_context(engine, step):
    def preempt(number):
        if number == step:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    prompt = clear(engine.checkpoint, engine.config, PROMPTS[0], 8, 600)
    with engine.step_tokens(100), engine.watch(before=preempt):
        (output,) = engine.generate([prompt], 8, [600])
    engine.require_reference(prompt, output, 8, 600)
    engine.require_idle()
    assert [p.compressed for p in engine.preemptions] == [step > 6]


@pytest.mark.parametrize("value", [0, -1, 301, "200", 12.0, True, [5]])
def test_a_bad_value_is_refused_and_leaves_nothing_behind(engine, value):
    with pytest.raises(VLLMValidationError, match=r"kv_context_tokens must be an integer in 1\.\.300"):
        engine.llm.generate(
            [{"prompt_token_ids": list(PROMPTS[4])}], sampling(4, extra_args={"kv_context_tokens": value})
        )
    engine.require_idle()
