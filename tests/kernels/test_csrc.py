"""csrc/: what nvcc makes of it, and how its library is loaded."""

import ctypes
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch

from fastkv_vllm.kernels import csrc
from fastkv_vllm.kernels.select import select
from tests.kernels.compiler import SHARED_BYTES, Usage
from tests.kernels.csrc_builds import NVCC, ROOT, SOURCES, compile_for_gpu, nvcc_version, on_cpu, runs_on_cpu

# Part of a kernel's name -> instructions it must have: 16-byte loads, counters in shared memory that a warp's equal
# increments reach as one.
EXPECTED = {
    "histogram_kernel": {"LDG.E.128", "ATOMS.POPC.INC.32"},
    "count_kernel": {"LDG.E.128"},
    "scatter_kernel": {"LDG.E.128", "STG.E.64"},
    "measure_kernel": {"LDG.E.128"},
    "merge_kernel": {"LDG.E.128", "STG.E.128"},
    "restore_kernel": {"LDG.E.128", "STG.E.128"},
}


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: csrc/ is not compiled for GPUs here")


@cache
def kernels_for(capability: int) -> list[tuple[str, Usage, set[str]]]:
    """Source and part of the name, usage and instructions of each kernel."""
    found = []
    with TemporaryDirectory() as folder:
        for source in SOURCES:
            usages, instructions = compile_for_gpu(source, capability, Path(folder))
            for usage in usages:
                part = next(part for part in EXPECTED if part in usage.kernel)
                found.append((f"{source.stem}: `{part}`", usage, set(instructions[usage.kernel])))
    return found


@needs_nvcc
@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_kernels_compile_without_spilling(capability: int) -> None:
    for name, usage, instructions in kernels_for(capability):
        assert usage.stack_bytes == 0, f"{usage} spills"
        assert not {i for i in instructions if i.startswith(("LDL", "STL"))}, f"{usage} has local memory"
        assert EXPECTED[name.split("`")[1]] <= instructions, f"{usage.kernel}: {sorted(instructions)}"
    assert {name.split("`")[1] for name, _, _ in kernels_for(capability)} == set(EXPECTED)


@needs_nvcc
def test_table_of_usages_is_the_compilers() -> None:
    if "release 13.0" not in nvcc_version():
        pytest.skip("the table in docs/kernels.md is nvcc 13.0's")
    text = (ROOT / "docs/kernels.md").read_text()
    for name in {name for name, _, _ in kernels_for(80)}:
        found = [[u for n, u, _ in kernels_for(arch) if n == name] for arch in sorted(SHARED_BYTES)]
        cells = [max(u.registers for u in usages) for usages in found] + [
            max(u.shared_bytes for u in usages) for usages in found
        ]
        row = f"| {name} | {' | '.join(map(str, cells))} |"
        assert row in text, row


def test_missing_library_is_one_clear_error(tmp_path: Path) -> None:
    with (
        runs_on_cpu(tmp_path / "libfastkv_kernels.so"),
        pytest.raises(RuntimeError, match=r"libfastkv_kernels\.so, which is not built: run `make csrc`"),
    ):
        select(torch.zeros(1, 9), 2, impl="cuda")


def test_bad_sizes_are_refused(csrc_on_cpu: Path) -> None:
    with (
        mock.patch("fastkv_vllm.kernels.select.cuda.segment_size", lambda num_rows, num_columns: 5),
        pytest.raises(RuntimeError, match="fastkv_select failed on cpu: invalid argument"),
    ):
        on_cpu(csrc_on_cpu, select, torch.zeros(1, 9), 2)


def test_failed_launch_raises(csrc_on_cpu: Path) -> None:
    ctypes.CDLL(str(csrc_on_cpu)).cuda_on_cpu_fail()
    with pytest.raises(RuntimeError, match=r"fastkv_select failed on cpu: invalid configuration .*\(CUDA error 9\)"):
        on_cpu(csrc_on_cpu, select, torch.zeros(1, 9), 2)
    assert on_cpu(csrc_on_cpu, select, torch.zeros(1, 9), 2).tolist() == [[0, 1]], "the error does not stay"


def test_product_is_named_as_the_build_names_it() -> None:
    text = (ROOT / "csrc/CMakeLists.txt").read_text()
    assert f"add_library({csrc.LIBRARY.stem.removeprefix('lib')} SHARED" in text
