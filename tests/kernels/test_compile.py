"""Every Triton kernel compiles for both GPU architectures, without spilling a register."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import triton
from triton.runtime.jit import JITFunction

import fastkv_vllm.kernels
from tests.kernels.compiler import SHARED_BYTES, Usage, compile_launches

OPS = sorted(path.parent.name for path in Path(fastkv_vllm.kernels.__path__[0]).glob("*/triton.py"))


def calls_of(op: str) -> dict[str, Callable[[], Any]]:
    """Name -> call of an op, declared beside its tests."""
    return importlib.import_module(f"tests.kernels.test_{op}").CALLS


def kernels_of(op: str) -> set[str]:
    functions = vars(importlib.import_module(f"fastkv_vllm.kernels.{op}.triton"))
    return {name for name, value in functions.items() if isinstance(value, JITFunction) and name.endswith("_kernel")}


@functools.cache
def usages_of(op: str, capability: int) -> list[tuple[str, Usage]]:
    """(name of the call, usage) of each launch of an op's calls."""
    with TemporaryDirectory() as folder:
        return [
            (name, usage)
            for name, call in calls_of(op).items()
            for usage in compile_launches(call, capability, Path(folder))
        ]


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_within_limits(op: str, capability: int) -> None:
    for name, usage in usages_of(op, capability):
        assert usage.stack_bytes == 0, f"{name}: {usage} spills"
        assert usage.shared_bytes <= SHARED_BYTES[capability], f"{name}: {usage}"
    seen = {usage.kernel for _, usage in usages_of(op, capability)}
    assert seen == kernels_of(op) != set(), "each kernel is launched by one of CALLS"


def usage_table() -> str:
    """The most that any call takes of each kernel, for docs/kernels.md."""
    rows = ["| kernel | registers 8.0 | 9.0 | shared bytes 8.0 | 9.0 |", "|---|---|---|---|---|"]
    for op in OPS:
        for kernel in sorted(kernels_of(op)):
            found = [[u for _, u in usages_of(op, arch) if u.kernel == kernel] for arch in sorted(SHARED_BYTES)]
            registers = [str(max(u.registers for u in usages)) for usages in found]
            shared = [str(max(u.shared_bytes for u in usages)) for usages in found]
            rows.append(f"| {' | '.join([f'{op}: `{kernel}`', *registers, *shared])} |")
    return "\n".join(rows)


@pytest.mark.skipif(triton.__version__ != "3.9.0", reason="the table in docs/kernels.md is Triton 3.9.0's")
def test_table_of_usages_is_the_compilers() -> None:
    assert usage_table() in (Path(__file__).parents[2] / "docs/kernels.md").read_text(), usage_table()
