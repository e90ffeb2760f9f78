"""Which channels of its keys a head stores."""

import torch


def best_channels(queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Channels with the largest part in the logits of some queries.

    part of channel i = |Q[:, i]| |K[:, i]|, the Frobenius norm of the logits it alone makes.

    Args:
        queries: of the query heads of one KV head, [W, G, D], roped.
        keys: that are to be stored, [N, D], roped.
        count: channels that stay.

    Returns:
        [count] int64, ascending; ties go to the lower channel.

    Source: ThinK, arXiv 2407.21018, section 3; for all query heads of a group at once.
    """
    parts = queries.float().square().sum(dim=(0, 1)) * keys.float().square().sum(dim=0)
    return parts.sort(descending=True, stable=True).indices[:count].sort().values
