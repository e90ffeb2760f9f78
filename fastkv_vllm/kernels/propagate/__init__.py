"""Rows of the residual stream on their way around a cut: those that go on, and where they belong at the end."""

import torch

from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.propagate.reference import gather_stream_reference, scatter_rows_reference


def gather_stream(
    stash: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor, index: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Rows of a prompt's residual stream, the earlier ones from the stash, those of this step as a layer left them.

    out = cat([stash, hidden + residual])[index]; only the rows asked for are added and read.

    Args:
        stash: rows of the stream from earlier steps, [S, d]; S may be 0.
        hidden: output of the layer for this step's rows, [T, d].
        residual: what it is added to, [T, d].
        index: rows, each in 0 .. S + T - 1, [K] int64.
        impl: "reference", "triton" or None for that of the device.

    Returns:
        Rows [K, d], of the dtype of all three; the sum is rounded to it once, as by the layer's own addition.

    Raises:
        ValueError: shapes or dtypes do not fit, or `impl` does not run here.

    Source: FastKV, arXiv 2502.01068, section 3; the stash is ours, for prompts that come in chunks.
    """
    if stash.dim() != 2 or hidden.shape != residual.shape or stash.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            "stash [S, d], hidden and residual [T, d] must share d and T; got "
            f"{list(stash.shape)}, {list(hidden.shape)}, {list(residual.shape)}"
        )
    if not stash.dtype == hidden.dtype == residual.dtype:
        raise ValueError(f"all rows must have one dtype; got {stash.dtype}, {hidden.dtype}, {residual.dtype}")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be [K] int64; got {list(index.shape)} {index.dtype}")
    if choose(impl, hidden.device) == "triton":
        from fastkv_vllm.kernels.propagate.triton import gather_stream_triton as implementation
    else:
        implementation = gather_stream_reference
    return implementation(stash, hidden, residual, index)


def scatter_rows(hidden: torch.Tensor, rows: torch.Tensor, num_rows: int, *, impl: str | None = None) -> torch.Tensor:
    """Rows put where they belong among others, which are zero: out[rows[i]] = hidden[i].

    Args:
        hidden: rows that went on, [T, d], any dtype.
        rows: their places, [T] int64, each in 0 .. num_rows - 1 and at most once, or -1: the row belongs nowhere.
        num_rows: rows of the result.
        impl: "reference", "triton" or None for that of the device.

    Returns:
        [num_rows, d] of the same dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or `impl` does not run here.
    """
    if hidden.dim() != 2 or rows.shape != hidden.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(
            f"hidden must be [T, d] and rows [T] int64; got {list(hidden.shape)}, {list(rows.shape)} {rows.dtype}"
        )
    if choose(impl, hidden.device) == "triton":
        from fastkv_vllm.kernels.propagate.triton import scatter_rows_triton as implementation
    else:
        implementation = scatter_rows_reference
    return implementation(hidden, rows, num_rows)
