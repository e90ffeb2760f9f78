"""Torch definition of `window_scores`: specification, CPU path and oracle."""

from functools import reduce

import torch
import torch.nn.functional as F


def window_scores_reference(queries: torch.Tensor, keys: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """See `window_scores`; arguments are taken as checked."""
    window, num_query_heads, head_dim = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    group = num_query_heads // num_kv_heads
    q = queries.float().view(window, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, group * window, head_dim)
    logits = torch.bmm(q, keys.float().transpose(1, 2)).view(num_kv_heads, group, window, num_keys)
    # Every earlier key is visible to every window query: only the W x W corner is causal.
    corner = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., num_keys - window :].masked_fill_(corner, float("-inf"))
    votes = logits.softmax(dim=-1).sum(dim=2)[..., : num_keys - window]  # [H, G, N - W]
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    # Added head by head: a vectorised sum may round its last columns differently and so break exact ties.
    total = reduce(torch.add, pooled.unbind(dim=1))
    return F.pad(total, (0, window), value=float("inf"))
