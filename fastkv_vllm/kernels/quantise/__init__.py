"""Groups of numbers as codes of a few bits, with the minimum and the step of each group beside them."""

import torch

from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.quantise.reference import dequantise_reference, quantise_reference

HEADER = 4  # bytes of a group: minimum and step, float16 each
WIDTHS = (2, 4, 8)  # bits of a code


def group_bytes(size: int, num_bits: int) -> int:
    """Bytes of a quantised group of `size` numbers.

    Raises:
        ValueError: no such width of codes, or the codes do not fill whole bytes.
    """
    if num_bits not in WIDTHS:
        raise ValueError(f"codes must have {', '.join(map(str, WIDTHS))} bits; got {num_bits}")
    if size < 1 or size * num_bits % 8:
        raise ValueError(f"a group's codes must fill whole bytes; got {size} codes of {num_bits} bits")
    return HEADER + size * num_bits // 8


def quantise(groups: torch.Tensor, num_bits: int, *, impl: str | None = None) -> torch.Tensor:
    """Asymmetric round-to-nearest quantisation of groups of numbers.

    minimum = float16(min x), step = float16((max x - minimum) / (2^bits - 1)),
    code = clamp(round((x - minimum) / step), 0, 2^bits - 1), halves to even; all codes are 0 where step is not
    above 0. Minimum and step are never -0.0. Each implementation gives the same bits.

    Args:
        groups: [..., G], any floating dtype; each within float16's range.
        num_bits: of a code: 2, 4 or 8.
        impl: see `implementations.choose`.

    Returns:
        [..., 4 + G * num_bits / 8] uint8: minimum, step, codes, the first of a byte in its lowest bits.

    Raises:
        ValueError: the codes do not fill whole bytes, or `impl` does not run here.

    Source: KIVI, arXiv 2402.02750, section 3.1; rounding and float16 are ours.
    """
    group_bytes(groups.shape[-1], num_bits)
    if choose(impl, groups.device) == "reference":
        return quantise_reference(groups, num_bits)
    from fastkv_vllm.kernels.quantise.triton import quantise_triton

    return quantise_triton(groups, num_bits)


def dequantise(data: torch.Tensor, num_bits: int, *, impl: str | None = None) -> torch.Tensor:
    """Numbers of quantised groups: code * step + minimum, in float32, the same bits from each implementation.

    Args:
        data: [..., 4 + G * num_bits / 8] uint8, as `quantise` gives it.
        num_bits: of a code.
        impl: see `implementations.choose`.

    Returns:
        [..., G] float32.

    Raises:
        ValueError: not the bytes of such groups, or `impl` does not run here.
    """
    if data.dtype != torch.uint8 or data.shape[-1] <= HEADER:
        raise ValueError(f"data must be uint8 [..., more than {HEADER}]; got {data.dtype} {list(data.shape)}")
    group_bytes((data.shape[-1] - HEADER) * 8 // num_bits, num_bits)
    if choose(impl, data.device) == "reference":
        return dequantise_reference(data, num_bits)
    from fastkv_vllm.kernels.quantise.triton import dequantise_triton

    return dequantise_triton(data, num_bits)
