"""Torch definition of `page_tables`: specification, CPU path and oracle."""

import torch


def page_tables_reference(
    held: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor, first: torch.Tensor, out: torch.Tensor
) -> None:
    """See `page_tables`; arguments are taken as checked."""
    _, num_heads, most = held.shape
    since = first[:, None, None] + blocks * num_heads + torch.arange(num_heads, device=out.device)[:, None]
    place = counts.unsqueeze(-1) + torch.arange(len(blocks), device=out.device)
    is_held = torch.arange(most, device=out.device) < counts.unsqueeze(-1)
    out[..., :most] = held * is_held
    out[..., most : most + len(blocks)] = 0
    out.scatter_(2, place, since.to(out.dtype))
