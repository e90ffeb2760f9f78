"""What cannot work together with compression, refused before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.selector import get_attn_backend

from fastkv_vllm.adapter.backends import BACKENDS
from fastkv_vllm.adapter.pages import FLOAT8
from fastkv_vllm.codecs import NO_CODEC
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import method_class

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "Idefics3ForConditionalGeneration",
)
DRAFTER = "fastkv_vllm.adapter.drafting.SelfDrafter"
_STOCK_WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}


@dataclass(frozen=True)
class Conflict:
    """Something compression needs and a vLLM configuration may not have.

    Fields:
        needs: what must hold.
        found: (vLLM's configuration) -> what is there instead; None where it holds.
        remedy: what the user can do.
        concerns: (our configuration) -> whether it needs this at all; None: each does.
    """

    needs: str
    found: Callable[[Any], str | None]
    remedy: str
    concerns: Callable[[CompressionConfig], bool] | None = None

    def line(self, vllm_config: VllmConfig) -> str | None:
        """One sentence where the configuration does not have what is needed."""
        found = self.found(vllm_config)
        return None if found is None else f"it needs {self.needs} and got {found}; {self.remedy}"


def _unless(holds: bool, found: str) -> str | None:
    return None if holds else found


def _platform(config: Any) -> str | None:
    return _unless(current_platform.device_name in _STOCK_WORKERS, f"platform {current_platform.device_name}")


def _backend(config: Any) -> str | None:
    """Asks vLLM what it will take, before it loads anything."""
    if config.model_config.use_mla or _platform(config) is not None:
        return None  # said elsewhere
    with set_current_vllm_config(config):
        chosen = get_attn_backend(
            config.model_config.get_head_size(), config.model_config.dtype, config.cache_config.cache_dtype
        ).get_name()
    return _unless(chosen in BACKENDS, chosen)


def _window(config: Any) -> str | None:
    window = config.model_config.get_sliding_window()
    return _unless(window is None, f"a sliding window of {window} tokens")


def _parallel(name: str) -> Callable[[Any], str | None]:
    return lambda config: _unless(
        (size := getattr(config.parallel_config, name)) == 1, f"{name.removesuffix('_size')} size {size}"
    )


def _copied_heads(config: Any) -> str | None:
    ranks, heads = config.parallel_config.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    return _unless(ranks <= heads, f"tensor_parallel size {ranks} for {heads} KV heads")


def _given(name: str) -> Callable[[Any], str | None]:
    return lambda config: _unless(getattr(config, name) is None, f"a {name}")


def _other_drafter(config: Any) -> str | None:
    drafter = config.speculative_config
    return _unless(drafter is None or drafter.model == DRAFTER, "a speculative_config")


def _cache_of_another_dtype(config: Any) -> str | None:
    return _unless(config.cache_config.cache_dtype == "auto", f"kv_cache_dtype {config.cache_config.cache_dtype}")


def _cache_not_served(config: Any) -> str | None:
    dtype = config.cache_config.cache_dtype
    if dtype in FLOAT8 and (current_platform.is_cpu() or dtype != "fp8_e5m2"):
        return _unless(not config.cache_config.kv_cache_dtype_skip_layers, "--kv-cache-dtype-skip-layers")
    return _cache_of_another_dtype(config)


def _stores_otherwise(config: CompressionConfig) -> bool:
    """Whether entries do not stay as the engine stored them, or are read by another layer than the one that did."""
    cls = method_class(config.method)
    shares = config.layer_owners is not None or config.merge_layers is not None or cls.shares_layers
    return shares or cls.revives or config.codec != NO_CODEC


def _other_than_tokens(config: Any) -> str | None:
    if config.model_config.is_multimodal_model:
        return "a model that reads images"
    return _unless(not config.model_config.enable_prompt_embeds, "--enable-prompt-embeds")


WITHOUT = "serve it without --kv-compression"
CONFLICTS = (
    Conflict("vLLM on a CPU or on a GPU by CUDA", _platform, WITHOUT),
    Conflict(
        f"attention by one of {', '.join(BACKENDS)}",
        _backend,
        f"use --attention-backend {' or '.join(name for name in BACKENDS if name != 'CPU_ATTN')}",
    ),
    Conflict(
        f"one of {', '.join(ARCHITECTURES)}",
        lambda c: _unless(c.model_config.architecture in ARCHITECTURES, f"{c.model_config.architecture}"),
        WITHOUT,
    ),
    Conflict(
        "a generating model",
        lambda c: _unless(c.model_config.runner_type == "generate", f"runner {c.model_config.runner_type}"),
        "drop --runner",
    ),
    Conflict("full attention in each layer", _window, f"{WITHOUT} or with --disable-sliding-window"),
    Conflict("keys and values per head", lambda c: _unless(not c.model_config.use_mla, "MLA"), WITHOUT),
    Conflict("attention in each layer", lambda c: _unless(not c.model_config.is_hybrid, "a hybrid model"), WITHOUT),
    Conflict("all layers in one stage", _parallel("pipeline_parallel_size"), "use --tensor-parallel-size"),
    Conflict(
        "whole requests on a rank",
        _parallel("decode_context_parallel_size"),
        "drop --decode-context-parallel-size",
    ),
    Conflict(
        "whole prompts on a rank",
        _parallel("prefill_context_parallel_size"),
        "drop --prefill-context-parallel-size",
    ),
    Conflict(
        "Model Runner V1, or V2 where VLLM_USE_V2_MODEL_RUNNER=1 asks for it",
        lambda c: _unless(c.use_v2_model_runner == bool(envs.VLLM_USE_V2_MODEL_RUNNER), "V2, without being asked"),
        "drop what only V2 has (watermarks, HiSparse)",
    ),
    Conflict("whole batches", lambda c: _unless(not c.parallel_config.enable_dbo, "--enable-dbo"), "drop --enable-dbo"),
    Conflict("entries it may move", _given("kv_transfer_config"), "drop --kv-transfer-config"),
    Conflict(
        "entries it may move",
        lambda c: _unless(not (c.kv_events_config and c.kv_events_config.enable_kv_cache_events), "KV-cache events"),
        "drop --kv-events-config",
    ),
    Conflict(
        "one new token a step, or its own drafts",
        _other_drafter,
        'drop --speculative-config; "draft_tokens" brings its own',
    ),
    Conflict("base models (not proven with adapters)", _given("lora_config"), "drop --enable-lora"),
    Conflict(
        f"a KV cache of one dtype, the model's, {', '.join(FLOAT8)} (this on a CPU only)",
        _cache_not_served,
        "drop what asks for others",
    ),
    Conflict(
        "a cache per layer",
        lambda c: _unless(not c.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        "drop --kv-sharing-fast-prefill",
    ),
    Conflict(
        "its own scheduler",
        lambda c: _unless(c.scheduler_config.scheduler_cls is None, f"{c.scheduler_config.scheduler_cls}"),
        "drop --scheduler-cls",
    ),
    Conflict(
        "its own worker",
        lambda c: _unless(c.parallel_config.worker_cls in _STOCK_WORKERS.values(), f"{c.parallel_config.worker_cls}"),
        "drop --worker-cls",
    ),
    Conflict(
        "late layers free of most prompt tokens (token-selective propagation)",
        lambda c: _unless(not c.cache_config.enable_prefix_caching, "prefix caching, which would share those blocks"),
        'drop --enable-prefix-caching or (fastkv, asl) set "tsp_ratio": 1.0',
        concerns=lambda config: config.uses_tsp,
    ),
    Conflict(
        "layers that are called one by one, for token-selective propagation",
        lambda c: _unless(not envs.VLLM_USE_BREAKABLE_CUDAGRAPH, "VLLM_USE_BREAKABLE_CUDAGRAPH=1"),
        "unset VLLM_USE_BREAKABLE_CUDAGRAPH",
        concerns=lambda config: config.uses_tsp,
    ),
    Conflict(
        "prompts of tokens alone, since some are read again",
        _other_than_tokens,
        "use another method",
        concerns=lambda config: method_class(config.method).reads_again,
    ),
    Conflict(
        "prompts of tokens alone, since it drafts tokens",
        _other_than_tokens,
        'set "draft_tokens": 0',
        concerns=lambda config: bool(config.draft_tokens),
    ),
    Conflict(
        "every query of a prompt computed, since all of them vote",
        lambda c: _unless(not c.cache_config.enable_prefix_caching, "prefix caching, which would skip some"),
        "drop --enable-prefix-caching",
        concerns=lambda config: config.all_queries_vote,
    ),
    Conflict(
        "a KV cache of the model's dtype, to store entries by a codec, share or exchange them",
        _cache_of_another_dtype,
        'drop --kv-cache-dtype, or use another method, "codec": "none" and no layer_owners or merge_layers',
        concerns=_stores_otherwise,
    ),
    Conflict(
        "each KV head on one rank only, to share a budget among heads",
        _copied_heads,
        'use a --tensor-parallel-size of at most the KV heads or set "head_budgets": "uniform"',
        concerns=lambda config: config.head_budgets != "uniform",
    ),
)


def require_no_conflicts(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    """Refuse a configuration whose parts exclude each other.

    Raises:
        ValueError: one line per conflict, each naming both sides and what to do.
    """
    lines = [line for conflict in CONFLICTS if conflict.concerns is None and (line := conflict.line(vllm_config))]
    lines += conflicts_of_method(vllm_config, config)
    if lines:
        raise ValueError("\n".join([f"--kv-compression {config.method} cannot run:", *(f"- {line}" for line in lines)]))


def conflicts_of_method(vllm_config: VllmConfig, config: CompressionConfig) -> list[str]:
    """What this method or its settings need, beyond what all compression does, and the configuration has not."""
    return [
        line
        for conflict in CONFLICTS
        if conflict.concerns is not None and conflict.concerns(config) and (line := conflict.line(vllm_config))
    ]
