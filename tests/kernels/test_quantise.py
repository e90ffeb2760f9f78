"""`quantise` and `dequantise`: the reference's bits, which `tests/test_codecs.py` has by hand, wherever groups lie."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastkv_vllm.codecs import CODECS, EntryShape
from fastkv_vllm.kernels import quantise as op
from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise
from tests.kernels.compare import assert_same

Run = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_width = pytest.mark.parametrize("num_bits", [2, 4, 8])


def groups_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys as models have them: some channels are large."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    numbers[..., ::7] = numbers[..., ::7] * 9 + 20
    return numbers.to(dtype)


def check(run: Run, groups: Tensor, num_bits: int) -> Tensor:
    """Both ways give the reference's bits; returns the bytes."""
    data = quantise(groups, num_bits, impl="reference")
    assert_same(run(quantise, groups, num_bits), data)
    assert_same(run(dequantise, data, num_bits), dequantise(data, num_bits, impl="reference"))
    return data


@each_width
@pytest.mark.parametrize(
    "shape",
    [(8,), (1, 4), (31, 64), (33, 20), (257, 12), (3, 2, 40), (2, 3, 5, 32), (7, 1, 96), (2, 5000)],
    ids=str,
)
def test_shapes(run: Run, shape: tuple[int, ...], num_bits: int) -> None:
    """Groups of a power of two and others, whose bytes begin at odd addresses; a tile of them and its neighbours."""
    check(run, groups_of(*shape), num_bits)


@each_width
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(run: Run, dtype: torch.dtype, num_bits: int) -> None:
    check(run, groups_of(19, 2, 64, dtype=dtype), num_bits)


@each_width
def test_halves_go_to_the_even_code(run: Run, num_bits: int) -> None:
    """Extremes 0 and the highest code make steps of 1; one step below, the numbers are those that round otherwise."""
    top = 2**num_bits - 1
    halves = torch.cat([torch.tensor([0.0, top]), torch.arange(62) % top + 0.5])
    data = check(run, torch.stack([halves, halves.nextafter(torch.tensor(0.0)), halves * -3]), num_bits)
    codes = dequantise(data, num_bits)[0]
    assert torch.equal(codes[2:], halves[2:].round()) and set(codes[2:].tolist()) <= set(range(0, top + 2, 2))


@each_width
def test_extremes(run: Run, num_bits: int) -> None:
    """Equal numbers, zeros of both signs, steps that are subnormal or none in float16, minima that are rounded up."""
    cases = [
        [0.25] * 8,
        [-0.0] * 8,
        [0.0, -0.0] * 4,
        [1e-9, -1e-9] * 4,
        [-0.0, 3.0] * 4,
        [0.0, 1e-7, 3e-6, 2e-5] * 2,
        [60020.0, 60025.0] * 4,
        [60020.0, 60040.0, 60100.0, 60025.0] * 2,
        [-65504.0, 65504.0, 0.5, -1.0] * 2,
        [2049.0, 2051.0, 2050.0, 2049.5] * 2,
    ]
    data = check(run, torch.tensor(cases), num_bits)
    steps = data[:, 2:4].contiguous().view(torch.float16).flatten()
    assert not data[:4, 4:].any() and bool((steps[6] < 0).all()), "no step, or one below 0: all codes are 0"
    assert bool((steps[5] < 6.1e-5) & (steps[5] > 0)), "subnormal"
    assert not bool((data[:, [1, 3]] == 0x80).logical_and(data[:, [0, 2]] == 0).any()), "no -0.0"


@each_width
def test_groups_apart(run: Run, num_bits: int) -> None:
    """Channels of 32 neighbouring tokens, every other number, bytes between others, one group many times."""
    keys = groups_of(96, 24)
    by_channel = keys.unflatten(0, (-1, 32)).transpose(1, 2)
    check(run, by_channel, num_bits)
    check(run, groups_of(9, 2, 64)[:, :, ::2], num_bits)
    check(run, groups_of(5, 3, 2, 16).transpose(1, 2), num_bits)
    check(run, groups_of(1, 16).expand(7, 16), num_bits)
    size = group_bytes(16, num_bits)
    wide = torch.randint(256, (11, 5 + 3 * size + 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide[:, 6::size], wide[:, 8::size] = 60, 60  # whose minimum and step are finite
    inner = wide[:, 5 : 5 + 3 * size].unflatten(1, (3, size))
    assert dequantise(inner, num_bits).isfinite().all()
    assert_same(run(dequantise, inner, num_bits), dequantise(inner, num_bits))
    apart = inner.transpose(0, 1)[:, ::2]
    assert_same(run(dequantise, apart, num_bits), dequantise(apart, num_bits))


@each_width
def test_no_groups(run: Run, num_bits: int) -> None:
    for shape in ((0, 8), (3, 0, 8)):
        assert list(check(run, groups_of(*shape), num_bits).shape) == [*shape[:-1], group_bytes(8, num_bits)]


def through(name: str, keys: Tensor, values: Tensor, *, impl: str | None = None) -> Tensor:
    """Keys and values as a codec gives them back, [2, N, D], when `impl` is what it gets that asks for none."""
    codec, entry = CODECS[name], EntryShape(keys.shape[1], keys.dtype)
    with mock.patch.object(op, "choose", lambda asked, device: choose(asked or impl, device)):
        return torch.stack(codec.decode(codec.encode(keys, values), entry))


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "kivi4", "kivi2"])
def test_codecs_take_it(run: Run, name: str) -> None:
    keys, values = groups_of(2, 64, 128, dtype=torch.bfloat16)
    assert_same(run(through, name, keys, values), through(name, keys, values, impl="reference"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_numbers_than_int32_counts() -> None:
    groups = torch.zeros(2**25 + 3, 64, dtype=torch.float16, device="cuda")
    groups[-1] = torch.arange(64)
    data = quantise(groups, 8)
    assert_same(data[-2:].cpu(), quantise(groups[-2:].cpu(), 8))
    assert_same(dequantise(data, 8)[-2:].cpu(), dequantise(data[-2:].cpu(), 8))


def call(num_bits: int, dtype: torch.dtype) -> Callable[[], None]:
    """Entries of 8 heads of a prompt by token, and keys by channel; groups of one row, where sizes are constants."""

    def run() -> None:
        vectors = torch.zeros(4096, 128, dtype=dtype)
        by_channel = vectors.unflatten(0, (-1, 32)).transpose(1, 2)
        for groups in (vectors.unflatten(1, (2, 64)), by_channel, vectors[:1, :8], vectors[:, :80]):
            dequantise(quantise(groups, num_bits, impl="triton"), num_bits, impl="triton")

    return run


CALLS = {
    f"{num_bits} bits, {dtype}": call(num_bits, dtype)
    for num_bits in (2, 4, 8)
    for dtype in (torch.bfloat16, torch.float32)
}
