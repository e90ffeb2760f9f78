"""Binding of csrc/select.cu."""

import torch

from fastkv_vllm.kernels import csrc
from fastkv_vllm.kernels.select.segments import segment_size


def launch(scores: torch.Tensor, num_kept: torch.Tensor, lengths: torch.Tensor, columns: torch.Tensor) -> None:
    """See `select_ragged`; columns [sum of num_kept] int64 is written. Rows whose columns lie apart are copied."""
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    num_rows, num_columns = scores.shape
    starts = num_kept.cumsum(0) - num_kept
    size = segment_size(num_rows, num_columns)
    num_bytes = csrc.count("fastkv_select_scratch", num_rows, num_columns, size)
    scratch = torch.empty(num_bytes, dtype=torch.uint8, device=scores.device)
    csrc.launch(
        "fastkv_select",
        scores,
        scores.stride(0),
        num_kept.contiguous(),
        lengths.contiguous(),
        starts,
        num_rows,
        num_columns,
        size,
        scratch,
        columns,
    )
