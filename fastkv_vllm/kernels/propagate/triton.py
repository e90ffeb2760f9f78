"""Triton forms of `gather_stream` and `scatter_rows`: one program per row and 1024 of its elements."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements: 16 bytes a thread in bfloat16


@triton.jit
def _gather_stream_kernel(
    stash_ptr,  # [S, width]
    hidden_ptr,  # [T, width]
    residual_ptr,  # [T, width]
    index_ptr,  # [K]
    out_ptr,  # [K, width]
    stride_stash_row,
    stride_hidden_row,
    stride_residual_row,
    num_stashed,
    width,
    BLOCK: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    o_width = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_width = o_width < width
    i_row = tl.load(index_ptr + i_out)
    p_out = out_ptr + i_out * width + o_width
    if i_row < num_stashed:
        tl.store(p_out, tl.load(stash_ptr + i_row * stride_stash_row + o_width, mask=m_width), mask=m_width)
    else:
        i_row -= num_stashed
        b_hidden = tl.load(hidden_ptr + i_row * stride_hidden_row + o_width, mask=m_width, other=0.0)  # [BLOCK]
        b_residual = tl.load(residual_ptr + i_row * stride_residual_row + o_width, mask=m_width, other=0.0)  # [BLOCK]
        b_sum = b_hidden.to(tl.float32) + b_residual.to(tl.float32)
        tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_width)


@triton.jit
def _scatter_rows_kernel(
    hidden_ptr,  # [T, width]
    rows_ptr,  # [T]
    out_ptr,  # [num_rows, width]
    stride_hidden_row,
    width,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_out = tl.load(rows_ptr + i_row)
    if i_out >= 0:
        o_width = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_width = o_width < width
        b_hidden = tl.load(hidden_ptr + i_row * stride_hidden_row + o_width, mask=m_width)  # [BLOCK]
        tl.store(out_ptr + i_out * width + o_width, b_hidden, mask=m_width)


def gather_stream_triton(
    stash: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """See `gather_stream`."""
    stash, hidden, residual = (_rows(tensor) for tensor in (stash, hidden, residual))
    out = hidden.new_empty(len(index), hidden.shape[1])
    if out.numel():
        _gather_stream_kernel[(len(index), triton.cdiv(out.shape[1], _BLOCK))](
            stash,
            hidden,
            residual,
            index.contiguous(),
            out,
            stash.stride(0),
            hidden.stride(0),
            residual.stride(0),
            len(stash),
            out.shape[1],
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
    return out


def scatter_rows_triton(hidden: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """See `scatter_rows`."""
    hidden = _rows(hidden)
    out = hidden.new_zeros(num_rows, hidden.shape[1])
    if hidden.numel():
        _scatter_rows_kernel[(len(hidden), triton.cdiv(out.shape[1], _BLOCK))](
            hidden, rows.contiguous(), out, hidden.stride(0), out.shape[1], BLOCK=_BLOCK, enable_fp_fusion=True
        )
    return out


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the elements of a row side by side."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
