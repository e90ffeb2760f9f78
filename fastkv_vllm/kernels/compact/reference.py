"""Torch definition of `compact`: specification, CPU path and oracle."""

import torch


def compact_reference(cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor) -> None:
    """See `compact`; arguments are taken as checked."""
    block_size = cache.shape[2]
    page, offset = (sources >= 0).nonzero(as_tuple=True)
    slots = sources[page, offset]
    entries = cache[slots // block_size, :, slots % block_size]  # a copy, [moved, num_parts, width]
    cache[pages[page], :, offset] = entries
