"""Torch definition of `select`: specification, CPU path and oracle."""

import torch


def select_reference(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """See `select`; a stable descending sort is what makes ties go to the lower column."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=1).values


def select_ragged_reference(scores: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
    """See `select_ragged`."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.cat([row[:count].sort().values for row, count in zip(order, num_kept.tolist(), strict=True)])
