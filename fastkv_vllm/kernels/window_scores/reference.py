"""Torch definition of `window_scores`: specification, CPU path and oracle."""

from functools import reduce

import torch
import torch.nn.functional as F


def window_scores_reference(queries: torch.Tensor, keys: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """See `window_scores`; arguments are taken as checked."""
    return _pooled(_logits(queries, keys).softmax(dim=-1), kernel_size, pooling)


def paged_window_scores_reference(
    queries: torch.Tensor,
    pages: torch.Tensor,
    page_tables: torch.Tensor,
    num_keys: torch.Tensor,
    weights: torch.Tensor,
    lse: torch.Tensor | None,
    scores: torch.Tensor,
    *,
    kernel_size: int,
    pooling: str,
    value_norms: bool,
) -> None:
    """See `paged_window_scores`; `scores` [R, H, max_num_keys] is written, other arguments are taken as checked."""
    window, head_dim = queries.shape[1], queries.shape[3]
    num_kv_heads = scores.shape[1]
    scores.fill_(float("-inf"))
    for request, count in enumerate(num_keys.tolist()):
        scores[request, :, :count] = float("inf")
        if count <= window:
            continue
        num_pages = -(-count // pages.shape[1])
        entries = pages[page_tables[request, :, :num_pages].long()].flatten(1, 2)[:, :count]  # [H, N, 2D]
        logits = _logits(queries[request], entries[..., :head_dim])
        if lse is None:
            probabilities = logits.softmax(dim=-1)
        else:
            rows = lse[request].view(window, num_kv_heads, -1).permute(1, 2, 0)
            probabilities = (logits - rows.unsqueeze(-1)).exp()
        rated = _pooled(probabilities * weights.unsqueeze(1), kernel_size, pooling)[:, : count - window]
        if value_norms:
            rated = rated * entries[:, : count - window, head_dim:].float().abs().sum(dim=-1)
        scores[request, :, : count - window] = rated


def _logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits [H, G, W, N] of queries [W, Hq, D], the last of N tokens, and keys [H, N, D]."""
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
    return logits


def _pooled(probabilities: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """Scores [H, N] of probabilities [H, G, W, N]; those of the window are +inf."""
    window = probabilities.shape[2]
    votes = reduce(torch.add, probabilities.unbind(dim=2))[..., :-window]  # [H, G, N - W]
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    return F.pad(reduce(torch.add, pooled.unbind(dim=1)), (0, window), value=float("inf"))
