"""vLLM's GPU worker with a compressing runner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.gpu_worker import Worker

from fastkv_vllm.adapter.backends import BACKENDS
from fastkv_vllm.adapter.runner import CompressionRunner
from fastkv_vllm.adapter.wiring import compression_config


class CompressionWorker(Worker):
    """Makes our runner and loads the model on our attention backend."""

    @property
    def runner_class(self) -> type[Any]:
        """Of the generation that the configuration asks for; V2 is imported where it is used, as vLLM does."""
        if self.use_v2_model_runner:
            from fastkv_vllm.adapter.runner_v2 import CompressionRunnerV2

            return CompressionRunnerV2
        return CompressionRunner

    def init_device(self) -> None:
        super().init_device()
        if type(self.model_runner) is not self.runner_class:
            raise RuntimeError(
                f"compression runs on {self.runner_class.__name__} and got {type(self.model_runner).__name__}"
            )
        self.model_runner.start_compression()

    def _make_model_runner(self) -> Any:
        return self.runner_class(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        with self.model_runner.warming_up():
            return super().compile_or_warm_up_model()

    def last_kept(self) -> dict[str, Any] | None:
        """For the status page: what stayed of the last compressed prompt on this rank."""
        return self.model_runner.last_kept.map

    def load_model(self, **kwargs: Any) -> None:
        with _compression_backends():
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
def _compression_backends() -> Iterator[None]:
    """Ours in the place of vLLM's backends while attention layers are made, for this worker's model only.

    The registry and the selector's cache belong to the process, which may serve another model without compression.
    """
    backends = {AttentionBackendEnum[name]: path for name, path in BACKENDS.items()}
    for backend, path in backends.items():
        register_backend(backend, path)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        for backend in backends:
            backend.clear_override()
        _cached_get_attn_backend.cache_clear()
