"""vLLM's CPU worker with a compressing runner.

A file of its own: vLLM's, which it imports, puts streams and events that do nothing in the place of torch's for GPUs.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from fastkv_vllm.adapter.runner import CPUCompressionRunner
from fastkv_vllm.adapter.worker import CompressionWorker


class _CPUWorker(CPUWorker):
    """Gives the runner that vLLM makes in the middle of a method our class; with patches/0003 it asks for one."""

    def init_device(self) -> None:
        super().init_device()
        _, theirs = self.runner_class.__bases__
        if type(self.model_runner) is theirs:
            self.model_runner.__class__ = self.runner_class


class CPUCompressionWorker(CompressionWorker, _CPUWorker):
    @property
    def runner_class(self) -> type[Any]:
        if self.use_v2_model_runner:
            from fastkv_vllm.adapter.runner_v2 import CPUCompressionRunnerV2

            return CPUCompressionRunnerV2
        return CPUCompressionRunner
