"""Attention that the queries of a chunk give to each key: column sums of the probabilities, per KV head."""

import torch

from fastkv_vllm.kernels.column_sums.reference import column_sums_reference
from fastkv_vllm.kernels.implementations import choose

_NEGLIGIBLE = 1e-8


def column_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    start: int,
    weights: torch.Tensor,
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Add up the attention each key gets from the queries of one chunk, each counting as much as its weight.

    s[h, j] = sum over the group and over rows i of weights[i] * p[i, j], where p[i] is the causal softmax of q_i . k
    over keys 0 .. start + i.

    Chunks add up. Leading rows of weight below 1e-8 are skipped.

    Args:
        queries: roped queries times the softmax scale, [n, Hq, D], any float dtype; they stand at positions
            start .. start + n - 1. n may be 0: all sums are then 0.
        keys: roped keys of all positions up to the last query, in order, [H, start + n, D], Hq a multiple of H.
        start: position of the first query, tokens.
        weights: of the queries, [n] float32, at least 0; see `age_weights`.
        lse: log-sum-exp of each query's logits over the keys it sees, [n, Hq] float32, from attention; computed here
            if None.
        impl: see `implementations.choose`.

    Returns:
        Sums [H, N], N = start + n, float32.

    Raises:
        ValueError: shapes, start or implementation do not fit.

    Source: H2O (arXiv 2306.14048) with equal weights, A2SF (arXiv 2407.20485) with weights by age, PyramidInfer (arXiv
    2405.12532) with weights that rise over the last rows, scoring; per KV head.
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
    if weights.shape != queries.shape[:1] or weights.dtype != torch.float32:
        raise ValueError(f"weights must be [{queries.shape[0]}] float32; got {list(weights.shape)} {weights.dtype}")
    if lse is not None and (lse.shape != queries.shape[:2] or lse.dtype != torch.float32):
        raise ValueError(f"lse must be {list(queries.shape[:2])} float32; got {list(lse.shape)} {lse.dtype}")
    form = choose(impl, keys.device)
    if not len(weights):
        return keys.new_zeros(keys.shape[:2], dtype=torch.float32)
    heavy = weights >= _NEGLIGIBLE
    first = heavy.int().argmax().where(heavy.any(), len(weights))  # stays on the device
    if form == "reference":
        return column_sums_reference(queries, keys, start, weights, int(first), lse)
    from fastkv_vllm.kernels.column_sums.triton import column_sums_triton

    return column_sums_triton(queries, keys, start, weights, first, lse)


def age_weights(num_queries: int, decay: float, device: torch.device) -> torch.Tensor:
    """Weights decay^(n - 1 - i) of the last n queries, [n] float32.

    After a chunk of n queries the sums of the text so far are decay^n * (sums before it, zeros for the new keys) + its
    `column_sums`.

    Args:
        num_queries: n.
        decay: weight of a query relative to the next one, in (0, 1]; 1.0 counts all alike.
        device: where they are needed.
    """
    return (decay ** torch.arange(num_queries - 1, -1, -1, dtype=torch.float64, device=device)).float()
