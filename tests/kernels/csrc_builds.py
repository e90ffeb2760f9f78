"""csrc/ built without a GPU: by g++ to run on the CPU, by nvcc to be looked at."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from fastkv_vllm.kernels import csrc, implementations
from tests.kernels.compiler import Usage

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build_for_cpu(folder: Path) -> Path:
    """The library with kernels that run on the CPU; see cuda_on_cpu/cuda_runtime.h."""
    library = folder / "libfastkv_kernels_on_cpu.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    shim = Path(__file__).parent / "cuda_on_cpu"
    subprocess.run(["g++", *flags, "-I", str(shim), "-x", "c++", *map(str, SOURCES), "-o", str(library)], check=True)
    return library


@contextmanager
def runs_on_cpu(library: Path) -> Iterator[None]:
    """impl="cuda" takes tensors on the CPU and calls this library; memory of `torch.empty` is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with (
        mock.patch.object(csrc, "LIBRARY", library),
        mock.patch.object(implementations, "_runs", lambda impl, device: True),
        mock.patch.object(torch.cuda, "device", nullcontext),
        mock.patch.object(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
    ):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def on_cpu(library: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns with impl="cuda" and this library."""
    with runs_on_cpu(library):
        return function(*args, impl="cuda", **kwargs)


def nvcc_version() -> str:
    assert NVCC is not None
    return subprocess.run([NVCC, "--version"], check=True, capture_output=True, text=True).stdout


def compile_for_gpu(source: Path, capability: int, folder: Path) -> tuple[list[Usage], dict[str, list[str]]]:
    """Usage and instructions of each kernel of a file, as nvcc compiles it for a compute capability."""
    assert NVCC is not None
    cubin = folder / f"{source.stem}_{capability}.cubin"
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{capability}", "-cubin", "-Werror=all-warnings"]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True, capture_output=True, text=True)
    return _usages(_cuobjdump("--dump-resource-usage", cubin)), _instructions(_cuobjdump("-sass", cubin))


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _usages(text: str) -> list[Usage]:
    found = []
    for mangled, line in re.findall(r"Function (\S+):\n\s*(.*)", text):
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        found.append(Usage(mangled, used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"]))
    return found


def _instructions(text: str) -> dict[str, list[str]]:
    parts = re.split(r"Function : (\S+)", text)[1:]
    return {
        name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", body)
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
