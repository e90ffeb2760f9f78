"""`page_tables`: each sequence reads its held pages, then those of the blocks written since."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.page_tables import page_tables
from tests.kernels.compare import assert_same

Run = Callable[..., Any]
UNTOUCHED = -7


def arguments(most: int, num_blocks: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """A request of which each layer and head holds up to `most` pages, at random, and one of them as many."""
    draw = random.Random(num_heads + most)
    counts = torch.tensor([[draw.randint(0, most) for _ in range(num_heads)] for _ in range(num_layers)])
    counts[-1, 0] = most
    return {
        "held": torch.tensor(
            [draw.randrange(10**6) for _ in range(num_layers * num_heads * most)], dtype=torch.int64
        ).view(num_layers, num_heads, most),
        "counts": counts,
        "blocks": torch.tensor([draw.randrange(10**5) for _ in range(num_blocks)], dtype=torch.int32),
        "first": torch.tensor([draw.randrange(10**6) for _ in range(num_layers)]),
    }


def buffer(inputs: dict[str, Any], room: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Part of a buffer with room for more heads and pages."""
    num_layers, num_heads, most = inputs["held"].shape
    shape = num_layers, num_heads + room, most + len(inputs["blocks"]) + room
    return torch.full(shape, UNTOUCHED, dtype=dtype)[:, :num_heads]


def expected(inputs: dict[str, Any], room: int, dtype: torch.dtype) -> Tensor:
    """Page by page."""
    out = buffer(inputs, room, dtype)
    num_layers, num_heads, most = inputs["held"].shape
    for layer in range(num_layers):
        for head in range(num_heads):
            pages = inputs["held"][layer, head, : int(inputs["counts"][layer, head])].tolist()
            pages += [int(inputs["first"][layer]) + b * num_heads + head for b in inputs["blocks"].tolist()]
            pages += [0] * (most + len(inputs["blocks"]) - len(pages))
            out[layer, head, : len(pages)] = torch.tensor(pages, dtype=dtype)
    return out


def into(out: Tensor, impl: str, **inputs: Any) -> None:
    """`page_tables` with its output as an argument of its own."""
    page_tables(**inputs, out=out, impl=impl)


def check(form: Run, inputs: dict[str, Any], room: int, dtype: torch.dtype = torch.int32) -> None:
    out, right = buffer(inputs, room, dtype), expected(inputs, room, dtype)
    form(into, out, **inputs)
    assert_same(out._base if room else out, right._base if room else right)


CASES = {
    "one": (1, 1, 1, 1),
    "nothing-since": (5, 0, 2, 3),
    "nothing-held": (0, 7, 2, 2),
    "neither": (0, 0, 2, 2),
    "prime": (31, 97, 3, 7),
    "more-than-a-tile": (300, 270, 2, 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("room", [0, 3])
def test_tables(form: Run, name: str, room: int) -> None:
    check(form, arguments(*CASES[name]), room)


def test_whole_numbers_of_eight_bytes(form: Run) -> None:
    inputs = arguments(5, 4, 2, 2)
    check(form, inputs | {"blocks": inputs["blocks"].long()}, 1, torch.int64)


def test_strided_inputs(form: Run) -> None:
    """A row of the engine's larger table, pages and counts of some heads of each layer."""
    inputs = arguments(6, 9, 2, 4)
    inputs["blocks"] = inputs["blocks"].repeat_interleave(2)[::2]
    inputs["held"] = inputs["held"].repeat(1, 1, 2)[..., ::2]
    inputs["counts"] = inputs["counts"].clamp(max=3).T.contiguous().T
    check(form, inputs, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("held", lambda x: x.int(), r"held must be \[2, 4, 5\] torch.int64; got \[2, 4, 5\] torch.int32"),
        ("counts", lambda x: x[:1], r"counts must be \[2, 4\] torch.int64; got \[1, 4\]"),
        ("blocks", lambda x: x.float(), r"blocks must be \[7\] torch.int32 or torch.int64"),
        ("first", lambda x: x[:1], r"first must be \[2\] torch.int64; got \[1\]"),
        ("out", lambda x: x[..., 1:], "12 columns or more, side by side; got 11"),
        ("out", lambda x: x.repeat(1, 1, 2)[..., ::2], "side by side"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = arguments(5, 7, 2, 4)
    inputs["out"] = buffer(inputs, 0)
    with pytest.raises(ValueError, match=message):
        page_tables(**inputs | {name: change(inputs[name])})


def call() -> None:
    """A request of 32 layers with 8 heads at 128K tokens."""
    page_tables(
        torch.zeros(32, 8, 800, dtype=torch.int64),
        torch.full((32, 8), 800),
        torch.zeros(192, dtype=torch.int32),
        first=torch.zeros(32, dtype=torch.int64),
        out=torch.empty(32, 8, 8192, dtype=torch.int32),
        impl="triton",
    )


def call_of_one() -> None:
    """Triton makes constants of sizes and strides that are 1."""
    inputs = arguments(1, 1, 1, 1)
    page_tables(**inputs, out=buffer(inputs, 0), impl="triton")


CALLS = {"decode": call, "one": call_of_one}
