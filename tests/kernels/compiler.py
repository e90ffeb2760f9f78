"""Kernels compiled for a GPU that is not here, from the launches of an ordinary call."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastkv_vllm.kernels import implementations

# Compute capability -> shared memory of one thread block, bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Fields:
        kernel: name.
        registers: per thread.
        stack_bytes: per thread; registers spill there, so 0 means that none did.
        shared_bytes: per thread block.
    """

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int


class _Target:
    """Stands in for Triton's driver: the device whose code is made."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_launches(call: Callable[[], Any], capability: int, tmp_path: Path) -> list[Usage]:
    """Compile the kernels a call launches, in order, as Triton would on a GPU of this compute capability.

    Nothing is launched: outputs keep what was in memory.
    """
    compiled = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(original(self, *args, grid=grid, warmup=True, **kwargs))

    original = JITFunction.run
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Target(capability)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(implementations, "_is_interpreting", lambda: True),  # so that tensors may be on the CPU
    ):
        call()
    return [_usage(kernel, tmp_path / f"{i}.cubin") for i, kernel in enumerate(compiled)]


def _usage(kernel: Any, path: Path) -> Usage:
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(kernel.metadata.name, found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared)
