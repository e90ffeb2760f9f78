"""Attention that all queries of a chunk give to each key: column sums of the probabilities, per KV head."""

import torch

from fastkv_vllm.kernels.column_sums.reference import column_sums_reference


def column_sums(queries: torch.Tensor, keys: torch.Tensor, *, start: int, decay: float = 1.0) -> torch.Tensor:
    """Add up the attention each key gets from the queries of one chunk, older queries counting less.

    s[h, j] = sum over the group and over rows i of decay^(n - 1 - i) * p[i, j], where p[i] is the causal softmax of
    q_i . k over keys 0 .. start + i.

    Chunks add up: after a chunk of n queries the sums of the text so far are decay^n * (sums before it, zeros for
    the new keys) + this. Rows of weight below 1e-8 are skipped.

    Args:
        queries: roped queries times the softmax scale, [n, Hq, D], any float dtype; they stand at positions
            start .. start + n - 1. n may be 0: all sums are then 0.
        keys: roped keys of all positions up to the last query, in order, [H, start + n, D], Hq a multiple of H.
        start: position of the first query, tokens.
        decay: weight of a query relative to the next one, in (0, 1]; 1.0 counts all alike.

    Returns:
        Sums [H, N], N = start + n, float32.

    Raises:
        ValueError: shapes, start or decay do not fit.

    Source: H2O (arXiv 2306.14048) at decay 1, A2SF (arXiv 2407.20485) below it, scoring; per KV head.
    """
    if queries.dim() != 3 or keys.dim() != 3 or queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"queries [n, Hq, D] and keys [H, N, D] must share D; got {list(queries.shape)}, {list(keys.shape)}"
        )
    if queries.shape[1] % keys.shape[0]:
        raise ValueError(f"{queries.shape[1]} query heads are not a multiple of {keys.shape[0]} KV heads")
    if start < 0:
        raise ValueError(f"start must be 0 or more; got {start}")
    if keys.shape[1] != start + queries.shape[0]:
        raise ValueError(
            f"keys must reach up to the last query: {start + queries.shape[0]} for start {start} and "
            f"{queries.shape[0]} queries; got {keys.shape[1]}"
        )
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay must be in (0, 1]; got {decay}")
    return column_sums_reference(queries, keys, start, decay)
