"""A process whose Triton interprets kernels on the CPU."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


class Interpreter:
    """Calls functions in a process of its own, started by the first call.

    TRITON_INTERPRET must be set before Triton is imported, and a kernel interpreted once leaves triton.language
    changed: neither may reach the engines and compilations of the other tests.
    """

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns; tensors travel in shared memory, so changes in place are seen."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


def _prepare() -> None:
    assert "triton" not in sys.modules, "the variable comes first"
    os.environ["TRITON_INTERPRET"] = "1"
    _sum_products_in_float64()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # this is what fills the memory of torch.empty


def _sum_products_in_float64() -> None:
    """Products as they are defined, not as numpy's library for the host's CPU adds them up.

    Triton 3.9 interprets bfloat16 as integers there, and where a CPU has AVX2 alone equal columns get unequal sums.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype("uint32") << 16).view("float32").astype("float64")
        return handle.data.astype("float64")

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *settings: Any
    ) -> TensorHandle:
        return TensorHandle((widened(a) @ widened(b) + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
