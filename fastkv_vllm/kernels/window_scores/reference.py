"""Torch definition of `window_scores`: specification, CPU path and oracle."""

from functools import reduce

import torch
import torch.nn.functional as F


def window_scores_reference(queries: torch.Tensor, keys: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """See `window_scores`; arguments are taken as checked."""
    window, num_query_heads, head_dim = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    group = num_query_heads // num_kv_heads
    q = queries.float().view(window, num_kv_heads, group, head_dim).permute(1, 3, 2, 0)
    q = q.reshape(num_kv_heads, head_dim, group * window)
    # Keys from the left and sums term by term: equal keys then get equal bits in every column, so that ties stay ties.
    # Other forms round the columns of a vector register's remainder differently.
    logits = torch.bmm(keys.float(), q).transpose(1, 2).reshape(num_kv_heads, group, window, num_keys)
    # Every earlier key is visible to every window query: only the W x W corner is causal.
    corner = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., num_keys - window :].masked_fill_(corner, float("-inf"))
    votes = reduce(torch.add, logits.softmax(dim=-1).unbind(dim=2))[..., : num_keys - window]  # [H, G, N - W]
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    return F.pad(reduce(torch.add, pooled.unbind(dim=1)), (0, window), value=float("inf"))
