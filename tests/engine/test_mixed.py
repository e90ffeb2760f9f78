"""Requests with methods and settings of their own in one batch: each exact, all blocks back."""

from contextlib import ExitStack
from unittest import mock

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from fastkv_vllm.adapter.encoded import EncodedPages, EncodedReads
from fastkv_vllm.adapter.merged import MergedPages
from fastkv_vllm.methods import CUT_BUDGETS, method_names
from tests.engine.harness import sampling
from tests.engine.oracle import BLOCK_SIZE, code_blocks, make_prompts, plan_of, reference
from tests.engine.requests import answer, filled
from tests.engine.settings import CUTS, GEMFILTER, REQUESTS, SERVER, SMALL


@pytest.fixture
def engine(start):
    return start("fastkv", SERVER, max_num_seqs=10, num_gpu_blocks_override=400)


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
    fewer = config.halting_loss is not None or config.layer_budgets in CUT_BUDGETS
    assert pages <= plan.num_pages if fewer else pages == plan.num_pages
    if plan.page_entries is not None:
        later = code_blocks(plan, plan.num_whole_blocks)
        places = plan.num_pages * BLOCK_SIZE + plan.sink_places
        pages = later if plan.encodes else -(-places // plan.page_entries)
    if plan.layer_owners:
        pages = sum(plan.pages_of_layers(plan.num_pages)) / len(plan.layer_owners)
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
    engine = start("fastkv", SERVER, max_num_seqs=10, num_gpu_blocks_override=75)
    with engine.step_tokens(300), engine.watch():
        answer(engine)


def test_requests_without_a_codec_run_none_of_it(engine):
    """Before and after those with one: codes slow nobody who does not use them."""
    plain, encoded = ("none", "snapkv", "adakv"), ("adakv-int8", "kivi", "skvq", "minicache")
    codecs = {"codec": EncodedPages, "layers as one": MergedPages, "copy": EncodedReads}
    with ExitStack() as counted:
        made = {
            name: counted.enter_context(mock.patch.object(cls, "__init__", autospec=True, side_effect=cls.__init__))
            for name, cls in codecs.items()
        }
        answer(engine, plain)
        assert not any(each.call_count for each in made.values())
        answer(engine, encoded)
        assert all(each.call_count for each in made.values())
        for each in made.values():
            each.reset_mock()
        answer(engine, plain, shift=3)
        assert not any(each.call_count for each in made.values())


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


def test_settings_by_name_are_those_of_the_object(engine):
    """One by one, as vLLM passes them: numbers and strings, 1 for true."""
    choice = engine.scheduler._choice

    def chosen(**extra):
        return choice.of(SamplingParams(extra_args=extra))

    settings = {"retention_ratio": 0.3, "value_norms": True, "pooling": "avg"}
    flat = chosen(kv_compression="snapkv", **(settings | {"value_norms": 1}))
    assert flat == chosen(kv_compression="snapkv", kv_compression_config=settings)
    assert chosen(retention_ratio=0.25) == chosen(kv_compression_config={"retention_ratio": 0.25})
    assert chosen(tsp_layer=[2, 4], tsp_ratio=[0.5, 0.3]).tsp_layers == (2, 4)


def test_an_answer_says_what_was_done_for_it(engine):
    """Method, tokens seen and kept; why a prompt was left alone; the halting rule's surplus is not kept."""

    def report(num_tokens, **extra):
        prompt = {"prompt_token_ids": list(make_prompts([num_tokens])[0])}
        (output,) = engine.llm.generate([prompt], sampling(3, extra_args=extra), use_tqdm=False)
        return output.kv_transfer_params["fastkv"]

    kept = engine.config.plan(500, BLOCK_SIZE).num_kept
    assert report(500) == {"method": "fastkv", "prompt_tokens_seen": 500, "prompt_tokens_kept": kept}
    assert report(500, kv_context_tokens=300)["prompt_tokens_seen"] == 300
    assert report(100) == {"method": "none", "left_alone": "short"}
    assert report(500, kv_compression="none") == {"method": "none", "left_alone": "requested"}
    method, settings = REQUESTS["dbudgetkv"]
    halted = report(777, kv_compression=method, kv_compression_config=settings)
    ceiling = filled(method, settings).plan(777, BLOCK_SIZE).num_kept
    assert halted["method"] == method and halted["prompt_tokens_kept"] < ceiling
    engine.require_idle()


def test_a_server_may_keep_the_choice_to_itself(start):
    engine = start("snapkv", SMALL | {"allow_request_override": False})
    prompt = {"prompt_token_ids": list(range(4, 304))}
    for extra in ({"kv_compression": "none"}, {"retention_ratio": 0.5}):
        with pytest.raises(VLLMValidationError, match=r"compresses all requests alike .*; leave out (kv_c|retention_)"):
            engine.llm.generate([prompt], sampling(4, extra_args=extra), use_tqdm=False)
    (output,) = engine.llm.generate([prompt], sampling(4, extra_args={"kv_context_tokens": 200}), use_tqdm=False)
    assert output.kv_transfer_params["fastkv"]["prompt_tokens_seen"] == 200
    engine.require_idle()


def test_a_server_may_set_a_least_ratio(start):
    engine = start("snapkv", SMALL | {"min_retention_ratio": 0.15})
    prompt = {"prompt_token_ids": list(range(4, 304))}
    for extra, message in (
        ({"retention_ratio": 0.1}, r"retention_ratio must be at least min_retention_ratio = 0\.15; got 0\.1"),
        ({"kv_compression": "adakv"}, r"retention_ratio must be at least min_retention_ratio = 0\.15; got 0\.1"),
        ({"budget": 100}, r"budget must be left out: min_retention_ratio = 0\.15 is of a ratio; got 100"),
        ({"min_retention_ratio": 0.01}, "the server's matter; leave out min_retention_ratio"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            engine.llm.generate([prompt], sampling(4, extra_args=extra), use_tqdm=False)
    engine.llm.generate([prompt], sampling(4, extra_args={"retention_ratio": 0.15}), use_tqdm=False)
    engine.require_idle()


def test_what_reads_again_needs_no_memory_set_aside(start):
    engine = start("snapkv", SMALL | {"min_retention_ratio": 0.15})
    with engine.step_tokens(97), engine.watch():
        answer(engine, ("gemfilter", "snapkv", "gemfilter"))


REFUSED = {
    "method": ({"kv_compression": "h3o"}, "unknown compression method 'h3o'"),
    "kind": ({"kv_compression": 3}, "kv_compression of a request must be a string; got 3"),
    "kind of settings": ({"kv_compression_config": [1]}, r"must be a string; got \[1\]"),
    "text": ({"kv_compression_config": "{"}, "kv_compression_config must be a JSON object; got '{'"),
    "list": ({"kv_compression_config": "[]"}, r"kv_compression_config must be a JSON object; got '\[\]'"),
    "key": ({"kv_compression_config": {"ratio": 1}}, "unknown key ratio; known keys: retention_ratio"),
    "value": ({"kv_compression_config": {"retention_ratio": 2}}, r"retention_ratio must be in \(0, 1\]; got 2"),
    "none": ({"kv_compression": "none", "kv_compression_config": {"budget": 9}}, "must be left out where kv_compr"),
    "none by name": ({"kv_compression": "none", "budget": 9}, "settings must be left out where .* 'none'; got budget"),
    "twice": ({"budget": 9, "kv_compression_config": {"budget": 9}}, "budget must be given once, by name or in kv_"),
    "flag": ({"value_norms": 2}, "value_norms must be true or false; got 2"),
    "type": ({"retention_ratio": "0.2"}, r"retention_ratio must be in \(0, 1\]; got '0.2'"),
    "file": ({"kv_compression": "headkv", "kv_compression_config": {"head_weights": "/etc/passwd"}}, "server's matter"),
    "memory": ({"kv_compression_config": {"max_tsp_tokens": 99999}}, "the server's matter; leave out max_tsp_tokens"),
    "weights": ({"kv_compression": "headkv"}, "head_weights must be given for head_budgets 'importance'"),
    "deep": ({"kv_compression_config": "[" * 10**5}, "kv_compression_config must be a JSON object; got "),
    "digits": ({"kv_compression_config": "1" * 5000}, "kv_compression_config must be a JSON object; got "),
    "surrogate": ({"kv_compression_config": '{"\\ud800": 1}'}, r"unknown key \\ud800"),
    "window": ({"window_size": 257, "min_tokens": 300}, "window_size of a request must be at most 256; got 257"),
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
        ("gemfilter", GEMFILTER, r"late layers free of most prompt tokens .* and got prefix caching"),
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


@pytest.mark.parametrize("method", ["none", "snapkv"])
def test_a_seed_gives_the_same_answer_however_the_prompt_is_read(engine, method):
    """A step that reads only a part of its prompt draws nothing from the request's own generator."""
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in make_prompts([700, 401, 90])]

    def answers(step_tokens, seed):
        wanted = sampling(12, temperature=1.0, seed=seed, extra_args={"kv_compression": method})
        with engine.step_tokens(step_tokens):
            outputs = engine.llm.generate(prompts, wanted, use_tqdm=False)
        engine.require_idle()
        return [list(output.outputs[0].token_ids) for output in outputs]

    whole = answers(2048, seed=7)
    assert answers(97, seed=7) == whole
    assert answers(97, seed=8) != whole
