"""Compression makes its tensors where attention's are: the same bits on the CPU and on a GPU in name only."""

import pytest

from tests.named_gpu import OnGPU, named_gpu
from tests.small_decoder import METHODS, run


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_on_a_gpu_in_name(name: str) -> None:
    expected = run(name)
    with named_gpu() as gpu:
        found = run(name, gpu, OnGPU)
    assert found == expected
