"""The bench itself, on a sample op: what it runs, what it sees, what it leaves alone."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv_vllm.kernels.implementations import IMPLEMENTATIONS, choose
from tests.kernels.compare import assert_accurate, assert_same
from tests.kernels.compiler import compile_launches
from tests.kernels.interpreter import Interpreter
from tests.kernels.sample import double, environment

CPU = torch.device("cpu")


def test_strides_changes_and_unwritten_memory_are_seen(run: Callable[..., Any]) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    view = whole.T[::2, 1:]  # rows 0, 2, 4 of the transposed: [3, 3]
    expected = view * 2
    found = run(double, view, 2)
    assert_same(found[:, :2], expected[:, :2])
    assert found[:, 2].isnan().all(), "memory of torch.empty is NaN"
    assert not view[:, :2].any() and view[:, 2].all(), "the kernel clears what it has doubled"
    assert whole[0].tolist() == [0, 1, 2, 3, 4, 5] and whole[:, 1].tolist() == [1, 7, 13, 19]


def test_the_variable_stays_in_its_process(interpreter: Interpreter) -> None:
    assert interpreter(environment) == "1" and "TRITON_INTERPRET" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_come_back(interpreter: Interpreter) -> None:
    with pytest.raises(ValueError, match="impl must be one of reference, triton; got 'fast'"):
        interpreter(choose, "fast", CPU)


@pytest.mark.parametrize("capability", [80, 90])
def test_launches_are_compiled(capability: int, tmp_path: Path) -> None:
    usages = compile_launches(lambda: double(torch.zeros(2, 4096), 9, impl="triton"), capability, tmp_path)
    assert [usage.kernel for usage in usages] == ["_double_kernel"]
    assert 0 < usages[0].registers < 255 and usages[0].stack_bytes == 0


def test_triton_needs_a_gpu_or_its_interpreter(interpreter: Interpreter) -> None:
    assert choose(None, CPU) == choose("reference", CPU) == "reference"
    assert choose(None, torch.device("cuda")) == "triton" and "triton" in IMPLEMENTATIONS
    assert interpreter(choose, "triton", CPU) == "triton"
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a GPU; these are on cpu: move them or use"):
        choose("triton", CPU)


def test_first_wrong_place_is_named() -> None:
    right = torch.tensor([[0.0, torch.nan, -0.0], [1.0, 2.0, 3.0]])
    assert_same(right, right.clone())
    wrong = right.clone()
    wrong[0, 2] = 0.0  # differs from -0.0 in a bit
    wrong[1, 1] = 5.0
    with pytest.raises(AssertionError, match=r"first of 2 wrong at \[0, 2\]: 0.0, expected -0.0"):
        assert_same(wrong, right)
    with pytest.raises(AssertionError, match=r"torch.float32 \[2, 3\], expected torch.float32 \[2, 2\]"):
        assert_same(right, right[:, :2])


def test_inaccurate_results_are_named() -> None:
    exact = torch.tensor([[1.0, 2.0], [torch.inf, 3.0]], dtype=torch.float64)
    step = 3 * torch.finfo(torch.float32).eps
    assert_accurate(exact.float() + torch.tensor([0, 1.9 * step]), exact, [exact.float()])
    worst, infinity = r"worst at \[1, 1\]", r"wrong at \[0\]: 1.0, expected inf"
    for column, value, words in [(1, 3 + 3 * step, worst), (1, torch.nan, worst), (0, 1.0, infinity)]:
        found = exact.float()
        found[1, column] = value
        with pytest.raises(AssertionError, match=words):
            assert_accurate(found, exact, [exact.float()])
