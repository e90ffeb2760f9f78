"""Every Triton kernel compiles for both GPU architectures, without spilling a register."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

import fastkv_vllm.kernels
from tests.kernels.compiler import SHARED_BYTES, compile_launches

OPS = sorted(path.parent.name for path in Path(fastkv_vllm.kernels.__path__[0]).glob("*/triton.py"))


def calls_of(op: str) -> dict[str, Callable[[], Any]]:
    """Name -> call of an op, declared beside its tests."""
    return importlib.import_module(f"tests.kernels.test_{op}").CALLS


def kernels_of(op: str) -> set[str]:
    functions = vars(importlib.import_module(f"fastkv_vllm.kernels.{op}.triton"))
    return {name for name, value in functions.items() if isinstance(value, JITFunction) and name.endswith("_kernel")}


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_within_limits(op: str, capability: int, tmp_path: Path) -> None:
    seen = set()
    for name, call in calls_of(op).items():
        for usage in compile_launches(call, capability, tmp_path):
            seen.add(usage.kernel)
            assert usage.stack_bytes == 0, f"{name}: {usage} spills"
            assert usage.shared_bytes <= SHARED_BYTES[capability], f"{name}: {usage}"
    assert seen == kernels_of(op) != set(), "each kernel is launched by one of CALLS"
