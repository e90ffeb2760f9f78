"""Torch definitions of `quantise` and `dequantise`: specification, CPU path and oracle."""

import torch


def quantise_reference(groups: torch.Tensor, num_bits: int) -> torch.Tensor:
    """See `quantise`; arguments are taken as checked."""
    x, top = groups.float(), 2**num_bits - 1
    # Adding 0 makes zeros positive: which zero of a group is least is not defined.
    low = x.amin(dim=-1, keepdim=True).half().add_(0.0)
    step = ((x.amax(dim=-1, keepdim=True) - low) / top).half().add_(0.0)
    # A minimum rounded up leaves numbers below it: they are clamped to it.
    scaled = torch.where(step > 0, (x - low) / step, 0)
    codes = scaled.round_().clamp_(0, top).to(torch.uint8)
    return torch.cat([torch.cat([low, step], dim=-1).view(torch.uint8), _pack(codes, num_bits)], dim=-1)


def dequantise_reference(data: torch.Tensor, num_bits: int) -> torch.Tensor:
    """See `dequantise`; arguments are taken as checked."""
    header = data[..., :4].clone(memory_format=torch.contiguous_format)  # a single group may begin at an odd byte
    low, step = header.view(torch.float16).float().unbind(dim=-1)
    codes = _unpack(data[..., 4:], num_bits)
    return codes.float().mul_(step.unsqueeze(-1)).add_(low.unsqueeze(-1))


def _pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes [..., G] uint8 -> bytes [..., G * num_bits / 8], the first code in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // num_bits)).unbind(dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (i * num_bits)
    return packed


def _unpack(data: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Bytes [..., B] -> codes [..., B * 8 / num_bits] uint8."""
    mask = 2**num_bits - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, 8, num_bits)], dim=-1).flatten(-2)
