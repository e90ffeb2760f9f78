"""What cannot run together is refused before anything runs, by a sentence that names both sides."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest
from transformers import MistralConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from fastkv_vllm.adapter import conflicts, version
from fastkv_vllm.adapter.choice import Choice
from fastkv_vllm.adapter.conflicts import CONFLICTS
from fastkv_vllm.adapter.cpu_worker import CPUCompressionWorker
from fastkv_vllm.adapter.wiring import compression_config
from fastkv_vllm.calibrate.artefact import make, save
from tests.engine.oracle import make_prompts
from tests.engine.settings import CHANNELS, TSP, WEIGHTS

# Arguments -> what compression needs and what it got.
REFUSED = {
    "pooling": ({"runner": "pooling"}, "a generating model and got runner pooling"),
    "pipeline": ({"pipeline_parallel_size": 2}, "all layers in one stage and got pipeline_parallel size 2"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "entries it may move and got a kv_transfer_config",
    ),
    "events": (
        {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
        "entries it may move and got KV-cache events",
    ),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "one new token a step, or its own drafts and got a speculative_config",
    ),
    "drafts": (
        {"enable_prompt_embeds": True, "kv_compression_config": {"codec": "int4x2", "draft_tokens": 2}},
        "prompts of tokens alone, since it drafts tokens and got --enable-prompt-embeds",
    ),
    "lora": ({"enable_lora": True}, "base models (not proven with adapters) and got a lora_config"),
    "dtype": (
        {"kv_cache_dtype": "int8_per_token_head"},
        "a KV cache of one dtype, the model's, fp8, fp8_e4m3, fp8_e5m2 (this on a CPU only) and got kv_cache_dtype "
        "int8_per_token_head",
    ),
    "dtypes": (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
        "a KV cache of one dtype, the model's, fp8, fp8_e4m3, fp8_e5m2 (this on a CPU only) and got "
        "--kv-cache-dtype-skip-layers",
    ),
    **{
        f"fp8-{name}": (
            {"kv_cache_dtype": "fp8", **arguments},
            "a KV cache of the model's dtype, to store entries by a codec, share or exchange them and got "
            "kv_cache_dtype fp8",
        )
        for name, arguments in {
            "codec": {"kv_compression_config": {"codec": "int4"}},
            "owners": {"kv_compression_config": {"layer_owners": [0, 0, 2, 3, 4, 5, 6, 7]}},
            "revival": {"kv_compression": "lazyllm"},
        }.items()
    },
    "sharing": ({"kv_sharing_fast_prefill": True}, "a cache per layer and got --kv-sharing-fast-prefill"),
    "scheduler": ({"scheduler_cls": "other.Scheduler"}, "its own scheduler and got other.Scheduler"),
    "worker": ({"worker_cls": "other.Worker"}, "its own worker and got other.Worker"),
    "prefix-caching": (
        {"enable_prefix_caching": True, "kv_compression": "fastkv"},
        "late layers free of most prompt tokens (token-selective propagation) and got prefix caching",
    ),
    "all-queries": (
        {"enable_prefix_caching": True, "kv_compression": "h2o"},
        "every query of a prompt computed, since all of them vote and got prefix caching",
    ),
    "embeddings": (
        {"enable_prompt_embeds": True, "kv_compression": "gemfilter"},
        "prompts of tokens alone, since some are read again and got --enable-prompt-embeds",
    ),
    "ranks": (
        {"tensor_parallel_size": 4, "distributed_executor_backend": "mp", "kv_compression": "adakv"},
        "each KV head on one rank only, to share a budget among heads and got tensor_parallel size 4 for 2 KV heads",
    ),
}
# What no argument reaches on CPU: a configuration that has it.
UNREACHABLE = {
    "prompts of tokens alone, since some are read again": SimpleNamespace(
        model_config=SimpleNamespace(is_multimodal_model=True)
    ),
    "keys and values per head": SimpleNamespace(model_config=SimpleNamespace(use_mla=True)),
    "attention in each layer": SimpleNamespace(model_config=SimpleNamespace(is_hybrid=True)),
    "whole requests on a rank": SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=2)),
    "whole prompts on a rank": SimpleNamespace(parallel_config=SimpleNamespace(prefill_context_parallel_size=2)),
    "Model Runner V1, or V2 where VLLM_USE_V2_MODEL_RUNNER=1 asks for it": SimpleNamespace(use_v2_model_runner=True),
    "whole batches": SimpleNamespace(parallel_config=SimpleNamespace(enable_dbo=True)),
}
ELSEWHERE = (
    "vLLM on a CPU or",
    "attention by one of",
    "one of Llama",
    "full attention in each layer",
    "layers that are called one by one",
)  # tests of their own


def configure(checkpoint, **arguments):
    defaults = {"model": str(checkpoint), "skip_tokenizer_init": True, "max_model_len": 1024}
    return EngineArgs(**(defaults | {"kv_compression": "snapkv"} | arguments)).create_engine_config()


@pytest.mark.parametrize("name", REFUSED)
def test_a_conflict_is_refused(checkpoint, name):
    arguments, sentence = REFUSED[name]
    with pytest.raises(ValueError) as error:
        configure(checkpoint, **arguments)
    head, *lines = str(error.value).splitlines()
    assert re.fullmatch("--kv-compression (snapkv|fastkv|gemfilter|adakv|h2o|lazyllm) cannot run:", head)
    assert len(lines) == 1 and lines[0].startswith(f"- it needs {sentence}") and "; " in lines[0], lines


def test_a_sliding_window_is_refused(tmp_path):
    MistralConfig(
        architectures=["MistralForCausalLM"], num_hidden_layers=2, sliding_window=512, vocab_size=512
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="full attention in each layer and got a sliding window of 512 tokens; serve"):
        configure(tmp_path)
    configure(tmp_path, disable_sliding_window=True, max_model_len=512)


def test_another_platform_is_refused(checkpoint, monkeypatch):
    xpu = SimpleNamespace(device_name="xpu", is_cpu=lambda: False)
    monkeypatch.setattr(conflicts, "current_platform", xpu)
    with pytest.raises(ValueError, match=r"it needs vLLM on a CPU or on a GPU by CUDA and got platform xpu; serve it"):
        configure(checkpoint)


def test_another_attention_backend_is_refused(checkpoint, monkeypatch):
    """What vLLM takes of itself is asked for, not only what an argument names."""
    taken = AttentionBackendEnum.FLEX_ATTENTION.value
    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda *args, **kwargs: taken))
    _cached_get_attn_backend.cache_clear()
    with pytest.raises(ValueError, match="CPU_ATTN, FLASH_ATTN, TRITON_ATTN, FLASHINFER and got FLEX_ATTENTION; "):
        configure(checkpoint)
    _cached_get_attn_backend.cache_clear()


@pytest.mark.parametrize("needs", UNREACHABLE)
def test_a_conflict_no_argument_reaches(needs):
    (conflict,) = (c for c in CONFLICTS if c.needs == needs)
    assert conflict.found(UNREACHABLE[needs])


def test_each_conflict_has_a_test():
    tested = [sentence for _, sentence in REFUSED.values()] + [*UNREACHABLE, *ELSEWHERE]
    assert [c.needs for c in CONFLICTS if not any(c.needs.startswith(t) or t.startswith(c.needs) for t in tested)] == []


def test_all_conflicts_are_named_at_once(checkpoint):
    with pytest.raises(ValueError) as error:
        configure(checkpoint, enable_lora=True, kv_cache_dtype="int8_per_token_head")
    assert len(str(error.value).splitlines()) == 3


def test_the_same_arguments_without_compression_are_vllms_business(checkpoint):
    configure(checkpoint, kv_compression=None, enable_prefix_caching=True, scheduler_cls="other.Scheduler")


def test_no_conflict_no_refusal(checkpoint):
    for method in ("fastkv", "snapkv", "streamingllm"):
        configure(checkpoint, kv_compression=method)


def test_prefix_caching_is_off_under_tsp_unless_asked_for(checkpoint):
    for method, expected in (("fastkv", False), ("h2o", False), ("snapkv", True)):
        assert configure(checkpoint, kv_compression=method).cache_config.enable_prefix_caching is expected
    without_tsp = configure(
        checkpoint, kv_compression="fastkv", kv_compression_config={"tsp_ratio": 1.0}, enable_prefix_caching=True
    )
    assert without_tsp.cache_config.enable_prefix_caching


def test_graphs_that_call_no_layer_are_refused_under_tsp(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match=r"layers that are called one by one, .* got VLLM_USE_BREAKABLE_CUDAGRAPH=1"):
        configure(checkpoint, kv_compression="fastkv")
    configure(checkpoint)


def test_model_runner_v2_is_used_where_the_user_asks_for_it(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="Model Runner V2 requires Triton"):  # vLLM's own sentence
        configure(checkpoint)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    assert configure(checkpoint).use_v2_model_runner
    drafting = {"codec": "int4x2", "draft_tokens": 2}
    with pytest.raises(ValueError, match=r"draft_tokens must be 0 on Model Runner V2, .* got 2; unset VLLM_USE_V2_MO"):
        configure(checkpoint, kv_compression_config=drafting)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1", "left as it was"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    configure(checkpoint, kv_compression_config=drafting)


def test_the_choice_of_runner_is_taken_back(checkpoint, monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert not configure(checkpoint).use_v2_model_runner
    assert "VLLM_USE_V2_MODEL_RUNNER" in os.environ
    configure(checkpoint, kv_compression=None)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    configure(checkpoint, kv_compression=None)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_another_vllm_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(version, "version", lambda name: "0.33.1")
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.32\.x and found 0\.33\.1; install"):
        configure(checkpoint)
    configure(checkpoint, kv_compression=None)


def test_a_stash_smaller_than_a_prompt_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"max_tsp_tokens must be at least the model's maximum length 1024.*got 1023"):
        configure(checkpoint, kv_compression="fastkv", kv_compression_config={"max_tsp_tokens": 1023})
    configure(checkpoint, kv_compression="fastkv", kv_compression_config={"max_tsp_tokens": 1024})


def test_a_tsp_layer_the_model_does_not_have_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"tsp_layer must be in 0\.\.6, .*got 7"):
        configure(checkpoint, kv_compression="fastkv", kv_compression_config={"tsp_layer": 7})


def test_weights_of_heads_come_from_this_models_file(checkpoint, checkpoints, tmp_path):
    """The numbers reach the workers; another model's file, a file of another kind and none at all are refused."""
    data = {"kv_heads": WEIGHTS, "gates": WEIGHTS}
    for kind in ("head-importance", "retrieval-heads"):
        save(make(kind, checkpoint, command="-", settings={}, data=data), tmp_path / f"{kind}.json")
    save(make("head-importance", checkpoints("qwen3"), command="-", settings={}, data=data), tmp_path / "other.json")

    def with_file(method, name):
        return configure(
            checkpoint, kv_compression=method, kv_compression_config={"head_weights": str(tmp_path / name)}
        )

    weights = tuple(map(tuple, WEIGHTS))
    assert compression_config(with_file("headkv", "head-importance.json")).head_weights == weights
    assert compression_config(with_file("duoattention", "retrieval-heads.json")).head_weights == weights
    with pytest.raises(ValueError, match="must have been made for the model it is used with"):
        with_file("headkv", "other.json")
    with pytest.raises(ValueError, match="must be of kind 'retrieval-heads'; it is of kind 'head-importance'"):
        with_file("duoattention", "head-importance.json")
    with pytest.raises(ValueError, match=r"missing\.json is none"):
        with_file("headkv", "missing.json")
    with pytest.raises(ValueError, match="head_weights must be given for head_budgets 'importance'"):
        configure(checkpoint, kv_compression="headkv")
    with pytest.raises(ValueError, match="must be of 8 layers with 2 KV heads each, as the model has; got 1 with 2"):
        configure(checkpoint, kv_compression="headkv", kv_compression_config={"head_weights": [[1.0, 0.0]]})


def test_layers_are_merged_where_a_report_says_that_answers_survive(checkpoint, tmp_path):
    owners, file = [0, 0, 2, 3, 4, 4, 6, 6], tmp_path / "merging.json"
    measured = {"merge_layers": "values", "merge_t": 0.6, "merge_gamma": 0.05}
    save(make("layer-merging", checkpoint, command="-", settings=measured, data={"owners": owners, "lost": 0.06}), file)

    def served(method="minicache", **settings):
        return compression_config(configure(checkpoint, kv_compression=method, kv_compression_config=settings))

    with pytest.raises(ValueError, match=r"merging layers loses 0\.060 of .* more than merge_limit = 0\.05: "):
        served(layer_owners=str(file))
    assert served(layer_owners=str(file), merge_limit=0.06).layer_owners == tuple(owners)
    with pytest.raises(ValueError, match=r"merge_gamma must be as in .*merging\.json, 0\.05; got 0\.1: calibr"):
        served(layer_owners=str(file), merge_limit=0.06, merge_gamma=0.1)
    with pytest.raises(ValueError, match=r"codec must be as in .*merging\.json, 'none'; got 'int4': calibrate merging"):
        served(layer_owners=str(file), merge_limit=0.06, codec="int4")
    measured["codec"] = "int4"
    save(make("layer-merging", checkpoint, command="-", settings=measured, data={"owners": owners, "lost": 0.0}), file)
    assert served(layer_owners=str(file), codec="int4").layer_owners == tuple(owners)
    for method, settings in (("minicache", {"layer_owners": owners}), ("streamingllm", {"merge_layers": "values"})):
        with pytest.raises(ValueError, match="layer_owners must be the path of a file of `fastkv-vllm calibrate merg"):
            served(method, **settings)
        served(method, **settings, merge_limit=1.0)
    assert served(merge_limit=1.0).layer_owners == (0, 1, 2, 3, 4, 4, 6, 6)
    with pytest.raises(ValueError, match="must be of kind 'layer-sharing'; it is of kind 'layer-merging'"):
        served("kvsharer", layer_owners=str(file))


def test_channels_are_stored_as_this_models_file_says(checkpoint, tmp_path):
    file, other = tmp_path / "channels.json", tmp_path / "other.json"
    artefact = make("channel-groups", checkpoint, command="-", settings={}, data=CHANNELS)
    save(artefact, file)
    save(dataclasses.replace(artefact, fingerprint="sha256:0"), other)

    def served(**settings):
        return configure(checkpoint, kv_compression="kivi", kv_compression_config={"codec": "skvq"} | settings)

    assert compression_config(served(channel_groups=str(file))).channel_groups == str(file)
    assert compression_config(served(channel_groups="none")).channel_groups == "none"
    with pytest.raises(ValueError, match="channel_groups must be given for codec 'skvq': the path of a file of `fastk"):
        served()
    with pytest.raises(ValueError, match=r"other\.json must have been made for the model it is used with"):
        served(channel_groups=str(other))
    with pytest.raises(ValueError, match=r"missing\.json is none"):
        served(channel_groups=str(tmp_path / "missing.json"))
    with_file = served(channel_groups=str(file))
    choice = Choice(with_file, compression_config(with_file))

    def chosen(**extra):
        return choice.of(SamplingParams(extra_args=extra))

    assert chosen(kv_compression="snapkv", codec="skvq").channel_groups == str(file), "measured once, for all requests"
    with pytest.raises(
        VLLMValidationError, match=r"files, memory and limits are the server's .*; leave out channel_gr"
    ):
        chosen(channel_groups="none")
    without = configure(checkpoint, kv_compression="snapkv")
    with pytest.raises(VLLMValidationError, match="channel_groups must be given for codec 'skvq'"):
        Choice(without, compression_config(without)).of(SamplingParams(extra_args={"codec": "skvq"}))


def test_requests_draft_what_their_server_does(checkpoint):
    def served(method, **settings):
        vllm_config = configure(checkpoint, kv_compression=method, kv_compression_config=settings)
        choice = Choice(vllm_config, compression_config(vllm_config))
        return vllm_config, lambda **extra: choice.of(SamplingParams(extra_args=extra)).draft_tokens

    vllm_config, drafts = served("quantspec", draft_tokens=3)
    assert vllm_config.speculative_config.num_speculative_tokens == 3
    assert not vllm_config.scheduler_config.async_scheduling
    assert (drafts(), drafts(retention_ratio=0.5), drafts(draft_tokens=0)) == (3, 3, 0)
    assert (drafts(kv_compression="snapkv"), drafts(codec="int8"), drafts(encode_generated=1)) == (0, 0, 0)
    assert drafts(kv_compression="snapkv", codec="int4x2", draft_tokens=2) == 2
    with pytest.raises(VLLMValidationError, match="draft_tokens of a request must be at most the server's, 3; got 4"):
        drafts(draft_tokens=4)
    vllm_config, drafts = served("snapkv")
    assert vllm_config.speculative_config is None
    assert drafts(kv_compression="quantspec") == 0, "the server was started without"
    assert served("quantspec", draft_tokens=0)[0].speculative_config is None
    with pytest.raises(VLLMValidationError, match="at most the server's, 0; got 2"):
        drafts(codec="int4x2", draft_tokens=2)


def test_owners_of_layers_come_from_this_models_file(checkpoint, tmp_path):
    owners, file = [0, 1, 2, 3, 4, 5, 0, 5], tmp_path / "sharing.json"
    save(make("layer-sharing", checkpoint, command="-", settings={}, data={"owners": owners}), file)
    config = configure(checkpoint, kv_compression="snapkv", kv_compression_config={"layer_owners": str(file)})
    assert compression_config(config).layer_owners == tuple(owners)


def test_shares_of_layers_come_from_this_models_file(checkpoint, tmp_path):
    shares, file = [0.9, 0.8, 0.8, 0.7, 0.6, 0.6, 0.5], tmp_path / "decays.json"
    save(make("layer-decays", checkpoint, command="-", settings={}, data={"shares": shares}), file)
    settings = {"layer_shares": str(file)}
    config = compression_config(configure(checkpoint, kv_compression="pyramidinfer", kv_compression_config=settings))
    assert config.layer_shares == config.tsp_ratio == tuple(shares)
    with pytest.raises(ValueError, match=r"must be 7, one for each of the model's 8 layers but the last; got 2"):
        configure(checkpoint, kv_compression="pyramidinfer", kv_compression_config={"layer_shares": [0.9, 0.8]})


def test_settings_without_a_method_are_refused(checkpoint):
    with pytest.raises(ValueError, match="--kv-compression-config is given without --kv-compression"):
        configure(checkpoint, kv_compression=None, kv_compression_config={"retention_ratio": 0.1})


def test_a_worker_refuses_another_runner(monkeypatch):
    class OtherRunner: ...

    monkeypatch.setattr(CPUWorker, "init_device", lambda self: setattr(self, "model_runner", OtherRunner()))
    worker = object.__new__(CPUCompressionWorker)
    worker.use_v2_model_runner = False
    with pytest.raises(RuntimeError, match="compression runs on CPUCompressionRunner and got OtherRunner"):
        worker.init_device()


def test_prompt_logprobs_under_tsp_are_an_error_of_that_request_only(start):
    engine = start("fastkv", TSP)
    llm, (prompt,) = engine.llm.llm_engine, make_prompts([300])
    before = engine.totals.requests_compressed
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs cannot be had .* leave prompt_logprobs out"):
        engine.generate([prompt], 4, prompt_logprobs=0)
    chosen_ones = SamplingParams(prompt_logprob_token_ids=[[5]] * 300)  # Model Runner V2 alone has them
    with pytest.raises(VLLMValidationError, match=r"prompt_logprob_token_ids cannot be had with token-selective"):
        engine.scheduler._choice.require_servable({"prompt_token_ids": prompt}, chosen_ones)
    assert not llm.has_unfinished_requests() and engine.totals.requests_compressed == before
    engine.check([prompt], max_tokens=8)


def test_prompt_logprobs_without_tsp_are_fine(start):
    engine = start("snapkv", {"min_tokens": 128, "retention_ratio": 0.2})
    (output,) = engine.generate(make_prompts([300]), 4, prompt_logprobs=0)
    assert len(output.prompt_logprobs) == 300
