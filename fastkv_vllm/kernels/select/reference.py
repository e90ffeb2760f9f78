"""Torch definition of `select`: specification, CPU path and oracle."""

import torch


def select_reference(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """See `select`; a stable descending sort is what makes ties go to the lower column."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=1).values


def select_ragged_reference(
    scores: torch.Tensor, num_kept: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """See `select_ragged`; columns behind a row's length come last, behind those at -inf."""
    if lengths is not None:
        columns = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(columns >= lengths.unsqueeze(1), float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rows = [row[:count].sort().values for row, count in zip(order, num_kept.tolist(), strict=True)]
    return torch.cat([order.new_empty(0), *rows])
