"""Choice of the highest scores of each row, in order of position."""

import torch

from fastkv_vllm.kernels.select.reference import select_ragged_reference, select_reference


def select(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Columns of the `num_kept` highest scores of each row, ascending.

    Equal scores: the lower column wins. A score of +inf therefore forces a column as long as no more than
    `num_kept` of a row are forced.

    Args:
        scores: [R, N], float32, no NaN.
        num_kept: columns per row, 1 <= num_kept <= N.

    Returns:
        Columns [R, num_kept], int64, strictly ascending in each row.

    Raises:
        ValueError: shape, dtype or count do not fit.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be [R, N] float32; got {list(scores.shape)} {scores.dtype}")
    if not 1 <= num_kept <= scores.shape[1]:
        raise ValueError(f"num_kept must be in 1..{scores.shape[1]}; got {num_kept}")
    return select_reference(scores, num_kept)


def select_ragged(scores: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
    """`select` with a count of its own for each row.

    Args:
        scores: [R, N], float32, no NaN.
        num_kept: columns per row, [R] int64, each in 0..N.

    Returns:
        Columns row after row, [sum of num_kept], int64, strictly ascending within a row.

    Raises:
        ValueError: shape, dtype or a count do not fit.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be [R, N] float32; got {list(scores.shape)} {scores.dtype}")
    if num_kept.shape != scores.shape[:1] or num_kept.dtype != torch.int64:
        raise ValueError(f"num_kept must be [{scores.shape[0]}] int64; got {list(num_kept.shape)} {num_kept.dtype}")
    if not bool(((num_kept >= 0) & (num_kept <= scores.shape[1])).all()):
        raise ValueError(f"num_kept must be in 0..{scores.shape[1]}; got {num_kept.tolist()}")
    return select_ragged_reference(scores, num_kept)
