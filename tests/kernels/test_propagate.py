"""`gather_stream` and `scatter_rows`: the right rows, the sum of the layer, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.propagate import gather_stream, scatter_rows
from tests.kernels.compare import assert_same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers; in bfloat16 quarters up to 8, whose sums are exact: Triton's interpreter cuts off what is not."""
    generator = torch.Generator().manual_seed(num_rows + seed)
    if dtype == torch.bfloat16:
        return torch.randint(-32, 33, (num_rows, width), generator=generator).to(dtype) / 4
    return torch.randn(num_rows, width, generator=generator).to(dtype)


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, impl="reference", **kwargs)


GATHERED = {  # stash, rows of the step, width, index
    "one": (0, 1, 1, [0]),
    "no-stash": (0, 9, 64, [1, 2, 8]),
    "stash-only": (7, 2, 64, [0, 6]),
    "border": (16, 17, 1023, [0, 14, 15, 16, 17, 31, 32]),
    "prime": (97, 31, 1025, list(range(0, 128, 3))),
    "again": (3, 3, 2050, [5, 0, 5, 0]),
    "none": (3, 3, 8, []),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_rows(run: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    num_stashed, num_rows, width, index = GATHERED[name]
    stash, hidden = rows(num_stashed, width, dtype), rows(num_rows, width, dtype, 1)
    residual = rows(num_rows, width, dtype, 2)
    stream = torch.cat([stash, hidden + residual])
    for function in (run, reference):
        found = function(gather_stream, stash, hidden, residual, torch.tensor(index, dtype=torch.int64))
        assert_same(found, stream[index] if index else stream[:0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sums_are_rounded_as_torch_rounds_them() -> None:
    hidden, residual = torch.randn(2, 999, 4096, device="cuda").bfloat16()
    found = gather_stream(hidden[:0], hidden, residual, torch.arange(999, device="cuda"))
    assert_same(found, hidden + residual)


def test_gathered_from_views(run: Callable[..., Any]) -> None:
    """A part of a longer stash, a slice of a fused projection, a transposed tensor, every other index."""
    stash, wide = rows(30, 96, torch.bfloat16)[4:12], rows(6, 3 * 96, torch.bfloat16)
    hidden, residual = wide[:, 96:192], rows(96, 6, torch.bfloat16).T
    index = torch.tensor([0, 9, 7, 9, 8, 9, 13, 9])[::2]
    for function in (run, reference):
        found = function(gather_stream, stash, hidden, residual, index)
        assert_same(found, torch.cat([stash, hidden + residual])[index])


SCATTERED = {  # width, places, rows of the result
    "one": (1, [0], 1),
    "some-nowhere": (1025, [3, -1, 0, -1, 6], 7),
    "backwards": (64, list(range(30, -1, -1)), 31),
    "none-placed": (64, [-1, -1], 3),
    "no-rows": (64, [], 3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCATTERED)
def test_scattered_rows(run: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    width, places, num_rows = SCATTERED[name]
    hidden = rows(len(places), width, dtype)
    right = torch.zeros(num_rows, width, dtype=dtype)
    for i, place in enumerate(places):
        if place >= 0:
            right[place] = hidden[i]
    for function in (run, reference):
        found = function(scatter_rows, hidden, torch.tensor(places, dtype=torch.int64), num_rows)
        assert_same(found, right)


def test_what_was_gathered_can_be_put_back(run: Callable[..., Any]) -> None:
    hidden, index = rows(40, 48, torch.float32), torch.tensor([2, 3, 5, 7, 39])
    chosen = run(gather_stream, hidden[:0], hidden, torch.zeros_like(hidden), index)
    kept = torch.zeros(40, 1).index_fill(0, index, 1.0)
    assert_same(run(scatter_rows, chosen, index, 40), torch.where(kept > 0, hidden, 0.0))


def test_strided_rows_are_scattered(run: Callable[..., Any]) -> None:
    hidden, places = rows(5, 64, torch.bfloat16)[:, ::2], torch.tensor([4, -1, 2, 0, 1])
    for function in (run, reference):
        found = function(scatter_rows, hidden, places, 6)
        assert_same(found, scatter_rows(hidden.contiguous(), places, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stash": torch.zeros(2, 7)}, r"must share d and T; got \[2, 7\], \[3, 8\], \[3, 8\]"),
        ({"residual": torch.zeros(4, 8)}, r"must share d and T; got \[2, 8\], \[3, 8\], \[4, 8\]"),
        ({"stash": torch.zeros(2, 8).half()}, "all rows must have one dtype; got torch.float16"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, r"index must be \[K\] int64; got \[2\] torch.int32"),
    ],
)
def test_a_gather_that_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    fits = {"stash": torch.zeros(2, 8), "hidden": torch.zeros(3, 8), "residual": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=message):
        gather_stream(**{**fits, "index": torch.arange(2), **change})


def test_a_scatter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden must be \[T, d\] and rows \[T\] int64; got \[3, 8\], \[2\]"):
        scatter_rows(torch.zeros(3, 8), torch.arange(2), 4)


def call(dtype: torch.dtype) -> None:
    """A chunk of 8192 rows, of which 1638 go on."""
    hidden = torch.zeros(8192, 4096, dtype=dtype)
    chosen = gather_stream(hidden, hidden, hidden, torch.arange(1638), impl="triton")
    scatter_rows(chosen, torch.arange(1638), 8192, impl="triton")


def call_of_one() -> None:
    """Triton makes constants of sizes and strides that are 1."""
    one = torch.zeros(1, 1)
    first = torch.zeros(1, dtype=torch.int64)
    scatter_rows(gather_stream(one, one, one, first, impl="triton"), first, 1, impl="triton")


CALLS = {"one": call_of_one, **{str(dtype): lambda dtype=dtype: call(dtype) for dtype in DTYPES}}
