"""Requests with methods and settings of their own in one batch: each exact, all blocks back."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from fastkv_vllm.methods import method_names
from tests.engine.harness import sampling
from tests.engine.oracle import BLOCK_SIZE, plan_of, reference
from tests.engine.requests import answer
from tests.engine.settings import CUTS, REQUESTS, SMALL, TSP


@pytest.fixture
def engine(start):
    return start("fastkv", TSP, max_num_seqs=10, num_gpu_blocks_override=400)


@pytest.mark.parametrize("step_tokens", [97, 2048])
def test_all_methods_in_one_batch(engine, step_tokens):
    with engine.step_tokens(step_tokens), engine.watch():
        answer(engine, shift=step_tokens % 3)


@pytest.mark.parametrize("method", method_names())
def test_blocks_held_are_those_of_the_pages_that_stay(engine, monkeypatch, method):
    """While it decodes, a request holds its pages to within a block, however its layers and heads share them."""
    monkeypatch.setitem(REQUESTS, method, REQUESTS.get(method, (method, SMALL)))
    idle = engine.pool.get_num_free_blocks()
    with engine.watch():
        ((prompt, config),) = answer(engine, (method,), max_tokens=4)
        held = idle - engine.free_blocks[-1]
    plan = plan_of(config, len(prompt))
    heads = [len(head) for layer in reference(engine.checkpoint, config, prompt, 4).kept for head in layer]
    pages = (sum(heads) / len(heads) - plan.num_tail) / BLOCK_SIZE
    assert pages < plan.num_pages if config.halting_loss else pages == plan.num_pages
    own = -(-(plan.num_tail + 3) // BLOCK_SIZE)  # of the tail and of three generated tokens
    assert 0 <= held - own - pages < 1, f"{held} blocks held, {pages} pages a layer and head and {own} blocks needed"


def test_preempted_in_prefill_and_after_it(engine):
    def preempt(number):
        if number in (7, 20, 40):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(300), engine.watch(before=preempt):
        answer(engine)
        assert {True, False} == {p.compressed for p in engine.preemptions}


def test_a_small_pool(start):
    """It holds two of the prompts whole: others wait, and take blocks that were given back."""
    engine = start("fastkv", TSP, max_num_seqs=10, num_gpu_blocks_override=75)
    with engine.step_tokens(300), engine.watch():
        answer(engine)


def test_settings_change_the_servers_own(engine):
    choice = engine.scheduler._choice

    def chosen(**extra):
        return choice.of(SamplingParams(extra_args=extra))

    served = engine.config
    assert chosen() is served and chosen(kv_compression="fastkv") == served
    assert chosen(kv_compression="none") is None
    budget = chosen(kv_compression_config={"budget": 100, "tsp_tokens": 200})
    assert (budget.budget, budget.retention_ratio, budget.tsp_tokens, budget.tsp_ratio) == (100, None, 200, None)
    assert (budget.tsp_layer, budget.min_tokens) == (served.tsp_layer, served.min_tokens)
    other = chosen(kv_compression="snapkv")
    assert (other.retention_ratio, other.tsp_layer, other.min_tokens) == (0.1, None, served.min_tokens)
    assert chosen(kv_compression="snapkv", kv_compression_config="{}") is other, "made once"


REFUSED = {
    "method": ({"kv_compression": "h3o"}, "unknown compression method 'h3o'"),
    "kind": ({"kv_compression": 3}, "kv_compression of a request must be a string; got 3"),
    "kind of settings": ({"kv_compression_config": [1]}, r"must be a string; got \[1\]"),
    "text": ({"kv_compression_config": "{"}, "kv_compression_config must be a JSON object; got '{'"),
    "list": ({"kv_compression_config": "[]"}, r"kv_compression_config must be a JSON object; got '\[\]'"),
    "key": ({"kv_compression_config": {"ratio": 1}}, "unknown key ratio; known keys: retention_ratio"),
    "value": ({"kv_compression_config": {"retention_ratio": 2}}, r"retention_ratio must be in \(0, 1\]; got 2"),
    "none": ({"kv_compression": "none", "kv_compression_config": {"budget": 9}}, "must be left out where kv_compr"),
    "file": ({"kv_compression": "headkv", "kv_compression_config": {"head_weights": "/etc/passwd"}}, "server's matter"),
    "memory": ({"kv_compression_config": {"max_tsp_tokens": 99999}}, "the server's matter; leave them out"),
    "weights": ({"kv_compression": "headkv"}, "head_weights must be given for head_budgets 'importance'"),
    "layers": ({"kv_compression_config": {"tsp_layer": 7}}, r"tsp_layer must be in 0\.\.6"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_request_cannot_have_is_refused(engine, name):
    extra, message = REFUSED[name]
    with pytest.raises(VLLMValidationError, match=message):
        engine.llm.generate([{"prompt_token_ids": list(range(4, 304))}], sampling(4, extra_args=extra), use_tqdm=False)
    engine.require_idle()


def test_what_the_server_has_not_made_room_for_is_refused(start):
    engine = start("snapkv", SMALL, enable_prefix_caching=True)
    prompt = {"prompt_token_ids": list(range(4, 304))}
    for method, settings, message in (
        ("fastkv", CUTS, "lets rows wait between chunks, and the server, started with snapkv, has set no memory aside"),
        ("h2o", SMALL, "every query of a prompt computed, since all of them vote and got prefix caching"),
    ):
        extra = {"kv_compression": method, "kv_compression_config": settings}
        with pytest.raises(VLLMValidationError, match=message):
            engine.llm.generate([prompt], sampling(4, extra_args=extra), use_tqdm=False)
    engine.require_idle()


def test_prompt_logprobs_depend_on_what_the_request_asks_for(engine):
    prompt = {"prompt_token_ids": list(range(4, 304))}
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs cannot be had .* let it ask for kv_compression"):
        engine.llm.generate([prompt], sampling(2, prompt_logprobs=0), use_tqdm=False)
    for method in ("snapkv", "none"):
        extra = {"kv_compression": method}
        (output,) = engine.llm.generate([prompt], sampling(2, prompt_logprobs=0, extra_args=extra), use_tqdm=False)
        assert len(output.prompt_logprobs) == 300
