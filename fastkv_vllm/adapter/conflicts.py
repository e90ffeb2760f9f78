"""What cannot work together with compression, refused before anything runs."""

from collections.abc import Iterator

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from fastkv_vllm.config import CompressionConfig

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
)
_STOCK_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker",)


def require_no_conflicts(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    """Refuse a configuration whose parts exclude each other.

    Raises:
        ValueError: one line per conflict, each naming both sides and what to do.
    """
    found = [*_model_conflicts(vllm_config), *_engine_conflicts(vllm_config), *_tsp_conflicts(vllm_config, config)]
    if found:
        raise ValueError(f"--kv-compression {config.method} cannot run:\n" + "\n".join(f"- {line}" for line in found))


def _model_conflicts(vllm_config: VllmConfig) -> Iterator[str]:
    model = vllm_config.model_config
    if model.runner_type != "generate":
        yield f"compression needs a generating model and the runner is {model.runner_type!r}; drop --runner"
    if model.architecture not in ARCHITECTURES:
        yield (
            f"compression is proven for {', '.join(ARCHITECTURES)} and the model is {model.architecture}; "
            "serve it without --kv-compression"
        )
    if model.get_sliding_window() is not None:
        yield (
            f"compression needs full attention and the model has a sliding window of {model.get_sliding_window()} "
            "tokens; serve it without --kv-compression or with --disable-sliding-window"
        )
    if model.use_mla:
        yield "compression needs per-head keys and values and the model uses MLA; serve it without --kv-compression"
    if model.is_hybrid:
        yield "compression needs attention in each layer and the model is a hybrid; serve it without --kv-compression"


def _engine_conflicts(vllm_config: VllmConfig) -> Iterator[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    scheduler = vllm_config.scheduler_config
    if not current_platform.is_cpu():
        yield f"compression runs on vLLM's CPU engine so far and the platform is {current_platform.device_name}"
    if parallel.pipeline_parallel_size > 1:
        yield f"compression needs all layers in one stage and pipeline_parallel_size is {parallel.pipeline_parallel_size}; use tensor parallelism"
    if parallel.decode_context_parallel_size > 1:
        yield f"compression needs a request's blocks on one rank and decode_context_parallel_size is {parallel.decode_context_parallel_size}; set it to 1"
    if parallel.enable_dbo:
        yield "compression needs whole batches and --enable-dbo splits them; drop it"
    if vllm_config.kv_transfer_config is not None:
        yield "compression moves cached entries and a KV connector expects them in place; drop --kv-transfer-config"
    if vllm_config.kv_events_config is not None and vllm_config.kv_events_config.enable_kv_cache_events:
        yield "compression moves cached entries and KV events report them in place; drop --kv-events-config"
    if vllm_config.speculative_config is not None:
        yield "compression needs one new token a step and speculative decoding gives several; drop --speculative-config"
    if vllm_config.lora_config is not None:
        yield "compression is not proven with LoRA adapters; drop --enable-lora"
    if cache.cache_dtype != "auto":
        yield f"compression moves entries of the model's own dtype and kv_cache_dtype is {cache.cache_dtype!r}; drop --kv-cache-dtype"
    if cache.kv_sharing_fast_prefill:
        yield "compression scores each layer's own cache and --kv-sharing-fast-prefill shares it; drop it"
    if scheduler.scheduler_cls is not None:
        yield f"compression brings its own scheduler and scheduler_cls is {scheduler.scheduler_cls!r}; drop --scheduler-cls"
    if parallel.worker_cls not in _STOCK_WORKERS:
        yield f"compression brings its own worker and worker_cls is {parallel.worker_cls!r}; drop --worker-cls"


def _tsp_conflicts(vllm_config: VllmConfig, config: CompressionConfig) -> Iterator[str]:
    if config.uses_tsp and vllm_config.cache_config.enable_prefix_caching:
        yield (
            "token-selective propagation leaves late layers without most prompt tokens and prefix caching would share "
            'those blocks; drop --enable-prefix-caching or set "tsp_ratio": 1.0'
        )
