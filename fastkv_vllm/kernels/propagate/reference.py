"""Torch definitions of `gather_stream` and `scatter_rows`: specification, CPU path and oracle."""

import torch


def gather_stream_reference(
    stash: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """See `gather_stream`; arguments are taken as checked."""
    earlier = index < len(stash)
    rows = index[~earlier] - len(stash)
    out = hidden.new_empty(len(index), hidden.shape[1])
    out[earlier] = stash[index[earlier]]
    out[~earlier] = hidden[rows] + residual[rows]
    return out


def scatter_rows_reference(hidden: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """See `scatter_rows`; arguments are taken as checked."""
    out = hidden.new_zeros(num_rows, hidden.shape[1])
    belongs = rows >= 0
    out[rows[belongs]] = hidden[belongs]
    return out
