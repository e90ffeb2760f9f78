"""Choice of the highest scores of each row, in order of position."""

import torch

from fastkv_vllm.kernels.implementations import WITH_CUDA, choose
from fastkv_vllm.kernels.select.reference import select_ragged_reference, select_reference

_MOST_COLUMNS = 2**30  # columns, counts and sums of two of them fit 32 bits


def select(scores: torch.Tensor, num_kept: int, *, impl: str | None = None) -> torch.Tensor:
    """Columns of the `num_kept` highest scores of each row, ascending.

    Equal scores: the lower column wins; -0.0 equals 0.0. A score of +inf therefore forces a column as long as no more
    than `num_kept` of a row are forced. NaN counts as higher than +inf, as torch sorts it.

    Args:
        scores: [R, N], float32, any strides.
        num_kept: columns per row, 1 <= num_kept <= N.
        impl: "reference", "triton" or "cuda"; None takes that of the device.

    Returns:
        Columns [R, num_kept], int64, strictly ascending in each row; the same bits from each implementation.

    Raises:
        ValueError: shape, dtype or count do not fit, or the implementation does not run there.
    """
    _check(scores)
    if not 1 <= num_kept <= scores.shape[1]:
        raise ValueError(f"num_kept must be in 1..{scores.shape[1]}; got {num_kept}")
    form = choose(impl, scores.device, among=WITH_CUDA)
    if form == "reference":
        return select_reference(scores, num_kept)
    num_rows, num_columns = scores.shape
    counts, lengths = torch.tensor([[num_kept], [num_columns]], device=scores.device).expand(2, num_rows)
    return _launch(form, scores, counts, lengths, num_rows * num_kept).view(num_rows, num_kept)


def select_ragged(
    scores: torch.Tensor, num_kept: torch.Tensor, *, lengths: torch.Tensor | None = None, impl: str | None = None
) -> torch.Tensor:
    """`select` with a count and a length of its own for each row.

    Waits for the device: the result's size depends on `num_kept`.

    Args:
        scores: [R, N], float32, any strides.
        num_kept: columns per row, [R] int64, each in 0..N, at most the row's length.
        lengths: leading columns of each row that count, [R] int64, each in 0..N; None: all of them.
        impl: "reference", "triton" or "cuda"; None takes that of the device.

    Returns:
        Columns row after row, [sum of num_kept], int64, strictly ascending within a row.

    Raises:
        ValueError: shape, dtype, a count or a length do not fit, or the implementation does not run there.
    """
    _check(scores)
    _check_counts("num_kept", num_kept, scores)
    if lengths is not None:
        _check_counts("lengths", lengths, scores)
        if not bool((num_kept <= lengths).all()):
            raise ValueError(f"num_kept must be at most lengths; got {num_kept.tolist()} of {lengths.tolist()}")
    form = choose(impl, scores.device, among=WITH_CUDA)
    if form == "reference":
        return select_ragged_reference(scores, num_kept, lengths)
    if lengths is None:
        lengths = torch.full_like(num_kept, scores.shape[1])
    return _launch(form, scores, num_kept, lengths, int(num_kept.sum()))


def _check(scores: torch.Tensor) -> None:
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be [R, N] float32; got {list(scores.shape)} {scores.dtype}")
    if scores.shape[1] > _MOST_COLUMNS:
        raise ValueError(f"scores must have at most {_MOST_COLUMNS} columns; got {scores.shape[1]}")


def _check_counts(name: str, counts: torch.Tensor, scores: torch.Tensor) -> None:
    num_rows, most = scores.shape
    if counts.shape != (num_rows,) or counts.dtype != torch.int64:
        raise ValueError(f"{name} must be [{num_rows}] int64; got {list(counts.shape)} {counts.dtype}")
    if counts.device != scores.device:
        raise ValueError(f"{name} must be on {scores.device} as scores are; got {counts.device}")
    if not bool(((counts >= 0) & (counts <= most)).all()):
        raise ValueError(f"{name} must be in 0..{most}; got {counts.tolist()}")


def _launch(
    form: str, scores: torch.Tensor, num_kept: torch.Tensor, lengths: torch.Tensor, num_results: int
) -> torch.Tensor:
    columns = torch.empty(num_results, dtype=torch.int64, device=scores.device)
    if not num_results:
        return columns
    if form == "triton":
        from fastkv_vllm.kernels.select.triton import launch
    else:
        from fastkv_vllm.kernels.select.cuda import launch
    launch(scores, num_kept, lengths, columns)
    return columns
