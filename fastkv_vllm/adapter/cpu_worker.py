"""vLLM's CPU worker with a compressing runner.

A file of its own: vLLM's, which it imports, puts streams and events that do nothing in the place of torch's for GPUs.
"""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from fastkv_vllm.adapter.runner import CPUCompressionRunner
from fastkv_vllm.adapter.worker import CompressionWorker


class _CPUWorker(CPUWorker):
    """Gives the runner that vLLM makes in the middle of a method our class; with patches/0003 it asks for one."""

    def init_device(self) -> None:
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = CPUCompressionRunner


class CPUCompressionWorker(CompressionWorker, _CPUWorker):
    runner_class = CPUCompressionRunner
