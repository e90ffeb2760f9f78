"""How important is each entry: scores from whole attention matrices, to be read rather than to be fast."""

import torch
from torch import Tensor


def all_query_scores(queries: Tensor, keys: Tensor, decay: float = 1.0) -> Tensor:
    """Attention that every key gets from all queries, older queries counting less, per KV head.

    S[k, j] = sum over the query heads h of k and the rows q >= j of decay^(n - 1 - q) * p[h, q, j], p[h, q] the softmax
    of Q[h, q] . K[k] / sqrt(D) over keys 0 .. q.

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32 or float64.
        keys: roped keys of the layer, [H, n, D], same dtype.
        decay: weight of a row relative to the next one, in (0, 1].
    Returns: [H, n], same dtype.
    Source: H2O, arXiv 2306.14048 (decay 1); A2SF, arXiv 2407.20485; per KV head.
    """
    num_heads, num_rows, _ = queries.shape
    num_kv_heads = keys.shape[0]
    group_size = num_heads // num_kv_heads

    scores = torch.zeros(num_kv_heads, num_rows, dtype=queries.dtype)
    weights = torch.tensor([decay ** (num_rows - 1 - row) for row in range(num_rows)], dtype=queries.dtype)
    for head in range(num_heads):
        kv_head = head // group_size
        scores[kv_head] += weights @ _attention(queries[head], keys[kv_head])
    return scores


def last_query_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that every key gets from the last query, per KV head, in shares of all query heads' attention.

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32 or float64.
        keys: roped keys of the layer, [H, n, D], same dtype.
    Returns: [H, n], same dtype; the rating of all heads is their sum.
    Source: TOVA, arXiv 2401.06104.
    """
    num_heads = queries.shape[0]
    group_size = num_heads // keys.shape[0]
    scores = torch.zeros(keys.shape[:2], dtype=queries.dtype)
    for head in range(num_heads):
        kv_head = head // group_size
        scores[kv_head] += _probabilities(queries[head, -1], keys[kv_head]) / num_heads
    return scores


def recent_query_scores(queries: Tensor, keys: Tensor, num_recent: int) -> Tensor:
    """Attention that every key gets from the last queries, weights rising from 1 to 1.2, per KV head.

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32 or float64.
        keys: roped keys of the layer, [H, n, D], same dtype.
        num_recent: queries that vote.
    Returns: [H, n], same dtype; the rating of all heads is their sum.
    Source: PyramidInfer, arXiv 2405.12532.
    """
    num_heads, num_rows, _ = queries.shape
    group_size = num_heads // keys.shape[0]
    weights = torch.linspace(1.0, 1.2, num_recent).to(queries.dtype)
    scores = torch.zeros(keys.shape[0], num_rows, dtype=queries.dtype)
    for head in range(num_heads):
        kv_head = head // group_size
        scores[kv_head] += weights @ _attention(queries[head, -num_recent:], keys[kv_head])
    return scores


def last_query_products(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products of the last query with every key, summed over query heads, mean of five around: one rating.

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32 or float64.
        keys: roped keys of the layer, [H, n, D], same dtype.
    Returns: [1, n], same dtype.
    Source: GemFilter, arXiv 2409.17422; beyond the ends there are zeros.
    """
    group_size, num_rows = queries.shape[0] // keys.shape[0], keys.shape[1]
    products = torch.zeros(num_rows + 4, dtype=queries.dtype)
    for head, rows in enumerate(queries):
        products[2:-2] += keys[head // group_size] @ rows[-1] / rows.shape[-1] ** 0.5
    return sum(products[i : i + num_rows] for i in range(5)).unsqueeze(0) / 5


def voters_scores(queries: Tensor, keys: Tensor, num_voters: int) -> Tensor:
    """Attention that every key gets from the last queries, per KV head.

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32 or float64.
        keys: roped keys of the layer, [H, n, D], same dtype.
        num_voters: queries that vote.
    Returns: [H, n], same dtype.
    Source: VL-Cache, arXiv 2410.23317.
    """
    num_heads, num_rows, _ = queries.shape
    group_size = num_heads // keys.shape[0]
    scores = torch.zeros(keys.shape[0], num_rows, dtype=queries.dtype)
    for head in range(num_heads):
        kv_head = head // group_size
        scores[kv_head] += _attention(queries[head, -num_voters:], keys[kv_head]).sum(dim=0)
    return scores


def voters_density(queries: Tensor, keys: Tensor, num_voters: int) -> list[float]:
    """Share of what the last queries see that has 1 % of the attention of their row's maximum or more, [Hq].

    Args: see `voters_scores`.
    Source: VL-Cache, arXiv 2410.23317: 1 - sparsity.
    """
    num_heads, num_rows, _ = queries.shape
    group_size = num_heads // keys.shape[0]
    seen = sum(row + 1 for row in range(num_rows - num_voters, num_rows))
    densities = []
    for head in range(num_heads):
        attention = _attention(queries[head, -num_voters:], keys[head // group_size])
        dense = attention >= 0.01 * attention.amax(dim=1, keepdim=True)
        densities.append(int(dense.sum()) / seen)
    return densities


def last_query_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last query to every key: queries [Hq, n, D], keys [H, n, D] -> [Hq, n], same dtype."""
    group_size = queries.shape[0] // keys.shape[0]
    return torch.stack([_probabilities(head[-1], keys[i // group_size]) for i, head in enumerate(queries)])


def value_norms(values: Tensor) -> Tensor:
    """L1 norm of every value vector: values [H, n, D] -> [H, n], same dtype.

    Source: VATP, arXiv 2406.12335.
    """
    return values.abs().sum(dim=-1)


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the last m queries [m, D] over the keys that each sees, [n, D] -> [m, n], 0 where it sees none."""
    logits = queries @ keys.T / queries.shape[1] ** 0.5
    later = torch.ones(logits.shape, dtype=torch.bool).triu(1 + len(keys) - len(queries))
    return logits.masked_fill(later, -torch.inf).softmax(dim=1)


def _probabilities(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax of one query [D] over the keys it sees, [m, D] -> [m]."""
    logits = keys @ query / query.shape[0] ** 0.5
    exponentials = (logits - logits.max()).exp()
    return exponentials / exponentials.sum()
