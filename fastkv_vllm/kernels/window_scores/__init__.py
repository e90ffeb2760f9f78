"""Attention of a prompt's last queries to all of its keys, pooled over positions, per KV head."""

import torch

from fastkv_vllm.kernels.window_scores.reference import window_scores_reference

POOLINGS = ("max", "avg")


def window_scores(queries: torch.Tensor, keys: torch.Tensor, *, kernel_size: int, pooling: str) -> torch.Tensor:
    """Rate each key by the attention it gets from the window's queries.

    s[h, j] = sum over the group of pool_j(sum over the window of softmax_j(q . k_j)), columns of the window cut
    after the softmax.

    Args:
        queries: roped queries times the softmax scale, [W, Hq, D], any float dtype; they are the last W tokens.
        keys: roped keys in order of position, [H, N, D], N > W, Hq a multiple of H.
        kernel_size: width of the pooling, odd, tokens; stride 1, same length.
        pooling: "max" or "avg" (an average counts padding, as torch does).

    Returns:
        Scores [H, N], float32; the last W columns are +inf: window entries always stay.

    Raises:
        ValueError: shapes, kernel size or pooling do not fit.

    Source: FastKV (arXiv 2502.01068) and SnapKV (arXiv 2404.14469), scoring.
    """
    if queries.dim() != 3 or keys.dim() != 3 or queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"queries [W, Hq, D] and keys [H, N, D] must share D; got {list(queries.shape)}, {list(keys.shape)}"
        )
    if queries.shape[1] % keys.shape[0]:
        raise ValueError(f"{queries.shape[1]} query heads are not a multiple of {keys.shape[0]} KV heads")
    if keys.shape[1] <= queries.shape[0]:
        raise ValueError(f"{keys.shape[1]} keys must be more than the window's {queries.shape[0]}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    return window_scores_reference(queries, keys, kernel_size, pooling)
