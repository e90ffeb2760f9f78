"""`page_tables`: each sequence reads its held pages, then those of the blocks written since."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.page_tables import page_tables
from tests.kernels.compare import assert_same

UNTOUCHED = -7


def arguments(
    requests: list[tuple[int, int]], *, num_layers: int, num_heads: int, block_size: int, max_blocks: int
) -> dict[str, Any]:
    """Requests of (whole blocks of the prompt, tokens in all), of which each layer and head holds at random."""
    draw = random.Random(num_heads)
    counts = [[[draw.randint(0, whole) for _ in range(num_heads)] for _ in range(num_layers)] for whole, _ in requests]
    num_held = sum(count for request in counts for layer in request for count in layer)
    return {
        "held": torch.tensor([draw.randrange(10**6) for _ in range(num_held)], dtype=torch.int64),
        "counts": torch.tensor(counts, dtype=torch.int64).view(-1, num_layers, num_heads),
        "block_tables": torch.tensor(
            [[draw.randrange(10**5) for _ in range(max_blocks)] for _ in requests], dtype=torch.int32
        ).view(-1, max_blocks),
        "num_whole": torch.tensor([whole for whole, _ in requests], dtype=torch.int64),
        "seq_lens": torch.tensor([length for _, length in requests], dtype=torch.int32),
        "first": torch.tensor([draw.randrange(10**6) for _ in range(num_layers)], dtype=torch.int64),
        "block_size": block_size,
    }


def buffers(inputs: dict[str, Any], room: int) -> tuple[Tensor, Tensor]:
    """Parts of buffers with room for more requests and pages."""
    num_reqs, num_layers, num_heads = inputs["counts"].shape
    width = inputs["block_tables"].shape[1]
    tables = torch.full((num_layers, num_reqs * num_heads + room, width + room), UNTOUCHED, dtype=torch.int32)
    lengths = torch.full((num_layers, num_reqs * num_heads + room), UNTOUCHED, dtype=torch.int32)
    return tables[:, : num_reqs * num_heads], lengths[:, : num_reqs * num_heads]


def expected(inputs: dict[str, Any], room: int) -> tuple[Tensor, Tensor]:
    """Page by page."""
    tables, lengths = buffers(inputs, room)
    num_reqs, num_layers, num_heads = inputs["counts"].shape
    held, size = iter(inputs["held"].tolist()), inputs["block_size"]
    for r in range(num_reqs):
        whole, length = int(inputs["num_whole"][r]), int(inputs["seq_lens"][r])
        for layer in range(num_layers):
            for head in range(num_heads):
                pages = [next(held) for _ in range(int(inputs["counts"][r, layer, head]))]
                lengths[layer, r * num_heads + head] = (len(pages) - whole) * size + length
                for block in inputs["block_tables"][r, whole : -(-length // size)].tolist():
                    pages.append(int(inputs["first"][layer]) + block * num_heads + head)
                tables[layer, r * num_heads + head, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return tables, lengths


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, impl="reference", **kwargs)


def into(tables: Tensor, lengths: Tensor, impl: str, **inputs: Any) -> None:
    """`page_tables` with its outputs as arguments of their own."""
    page_tables(**inputs, out=(tables, lengths), impl=impl)


def check(function: Callable[..., Any], inputs: dict[str, Any], room: int) -> None:
    tables, lengths = buffers(inputs, room)
    function(into, tables, lengths, **inputs)
    for found, right in zip((tables, lengths), expected(inputs, room), strict=True):
        assert_same(found._base if room else found, right._base if room else right)


CASES = {
    "one": ([(1, 17)], 1, 1, 16),
    "ends-of-blocks": ([(3, 48), (3, 49), (3, 63), (3, 64), (3, 65)], 2, 3, 16),
    "none-held": ([(0, 0), (0, 1), (0, 16), (0, 100)], 2, 2, 16),
    "prime-and-mixed": ([(7, 97 * 16 + 5), (0, 33), (31, 31 * 16)], 3, 8, 16),
    "more-than-a-tile": ([(300, 9700), (5, 9600)], 2, 2, 32),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("room", [0, 3])
def test_tables_and_lengths(run: Callable[..., Any], name: str, room: int) -> None:
    requests, num_layers, num_heads, block_size = CASES[name]
    max_blocks = max(1, *(-(-length // block_size) for _, length in requests))
    inputs = arguments(
        requests, num_layers=num_layers, num_heads=num_heads, block_size=block_size, max_blocks=max_blocks
    )
    for function in (run, reference):
        check(function, inputs, room)


def test_no_requests(run: Callable[..., Any]) -> None:
    inputs = arguments([], num_layers=2, num_heads=2, block_size=16, max_blocks=4)
    for function in (run, reference):
        check(function, inputs, 2)


def test_strided_inputs(run: Callable[..., Any]) -> None:
    """Rows of the engine's larger tables, and counts of some heads of each layer."""
    inputs = arguments([(5, 99), (2, 40)], num_layers=2, num_heads=4, block_size=16, max_blocks=12)
    inputs["block_tables"] = inputs["block_tables"].repeat(1, 2)[:, 3:12]
    inputs["num_whole"] = inputs["num_whole"].repeat_interleave(2)[::2]
    inputs["counts"] = inputs["counts"].transpose(0, 1).contiguous().transpose(0, 1)
    for function in (run, reference):
        check(function, inputs, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("held", lambda x: x.int(), r"held must be \[\d+\] torch.int64; got \[\d+\] torch.int32"),
        ("block_tables", lambda x: x.long(), r"block_tables must be \[2, 12\] torch.int32"),
        ("block_tables", lambda x: x.repeat(1, 2), "tables must be as wide as block_tables, 24; got 12"),
        ("block_tables", lambda x: x.T.contiguous().T, "entries of a row side by side"),
        ("seq_lens", lambda x: x[:1], r"seq_lens must be \[2\] torch.int32; got \[1\]"),
        ("first", lambda x: x[:1], r"first must be \[2\] torch.int64; got \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = arguments([(5, 99), (2, 40)], num_layers=2, num_heads=4, block_size=16, max_blocks=12)
    out = buffers(inputs, 0)
    with pytest.raises(ValueError, match=message):
        page_tables(**{**inputs, name: change(inputs[name])}, out=out)


def call() -> None:
    """64 requests of 32 layers with 8 heads, at 128K tokens."""
    counts = torch.full((64, 32, 8), 800)
    page_tables(
        torch.zeros(int(counts.sum()), dtype=torch.int64),
        counts,
        torch.zeros(64, 8192, dtype=torch.int32),
        num_whole=torch.full((64,), 8000),
        seq_lens=torch.full((64,), 2**17, dtype=torch.int32),
        first=torch.zeros(32, dtype=torch.int64),
        block_size=16,
        out=(torch.empty(32, 512, 8192, dtype=torch.int32), torch.empty(32, 512, dtype=torch.int32)),
        impl="triton",
    )


def call_of_one() -> None:
    """Triton makes constants of sizes and strides that are 1."""
    inputs = arguments([(1, 17)], num_layers=1, num_heads=1, block_size=16, max_blocks=2)
    page_tables(**inputs, out=buffers(inputs, 0), impl="triton")


CALLS = {"decode": call, "one": call_of_one}
