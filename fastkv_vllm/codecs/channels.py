"""Which channels of its keys and values a head stores."""

import torch


def best_channels(queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Channels of keys with the largest part in the logits of some queries.

    part of channel i = |Q[:, i]| |K[:, i]|, the Frobenius norm of the logits it alone makes.

    Args:
        queries: of the query heads of one KV head, [W, G, D], roped.
        keys: that are to be stored, [N, D], roped.
        count: channels that stay.

    Returns:
        [count] int64, ascending; ties go to the lower channel.

    Source: ThinK, arXiv 2407.21018, section 3; for all query heads of a group at once.
    """
    return _largest(queries.float().square().sum(dim=(0, 1)) * keys.float().square().sum(dim=0), count)


def best_value_channels(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Channels of values with the largest part in what some queries' attention gives.

    part of channel i = |softmax(Q K^T / sqrt(D)) V[:, i]|, the Frobenius norm of that channel of the output.

    Args:
        queries: of the query heads of one KV head, [W, G, D], roped.
        keys, values: that are to be stored, [N, D] each, keys roped.
        count: channels that stay.

    Returns:
        [count] int64, ascending; ties go to the lower channel.

    Source: ThinK, arXiv 2407.21018, appendix D; for all query heads of a group at once.
    """
    logits = queries.float() @ keys.float().T / keys.shape[1] ** 0.5  # [W, G, N]
    outputs = logits.softmax(dim=-1) @ values.float()
    return _largest(outputs.square().sum(dim=(0, 1)), count)


def _largest(parts: torch.Tensor, count: int) -> torch.Tensor:
    return parts.sort(descending=True, stable=True).indices[:count].sort().values
