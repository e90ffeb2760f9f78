"""vLLM's CPU worker with a compressing runner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from fastkv_vllm.adapter.attention import CompressionBackend
from fastkv_vllm.adapter.runner import CPUCompressionRunner
from fastkv_vllm.adapter.wiring import compression_config


class CPUCompressionWorker(CPUWorker):
    """Loads the model on our attention backend and gives its runner our class."""

    def init_device(self) -> None:
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = CPUCompressionRunner
        if type(self.model_runner) is not CPUCompressionRunner:
            raise RuntimeError(
                f"compression runs on vLLM's CPUModelRunner (V1) and got {type(self.model_runner).__name__}; unset "
                "VLLM_USE_V2_MODEL_RUNNER"
            )
        self.model_runner.start_compression()

    def _make_model_runner(self) -> CPUCompressionRunner:
        """What a vLLM with patches/0003 asks for; any other makes its own runner, which then changes its class."""
        return CPUCompressionRunner(self.vllm_config, self.device)

    def last_kept(self) -> dict[str, Any] | None:
        """For the status page: what stayed of the last compressed prompt on this rank."""
        return self.model_runner.last_kept.map

    def load_model(self, **kwargs: Any) -> None:
        with _compression_backend():
            super().load_model(**kwargs)

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available  # said by the user, to the byte
        config = compression_config(self.vllm_config)
        if not config.has_stash:
            return available
        assert config.max_tsp_tokens is not None, "filled in by CompressionConfig.for_model"
        row_bytes = self.model_config.get_hidden_size() * self.model_config.dtype.itemsize
        return available - config.max_tsp_tokens * row_bytes


@contextmanager
def _compression_backend() -> Iterator[None]:
    """Our backend in the place of the platform's while attention layers are made, for this worker's model only.

    The registry and the selector's cache belong to the process, which may serve another model without compression.
    """
    cls = CompressionBackend
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{cls.__module__}.{cls.__qualname__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()
