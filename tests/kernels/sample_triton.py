"""Kernel of the sample op."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double_kernel(
    x_ptr,  # [R, N]
    out_ptr,  # [R, N]
    stride_x_row,
    stride_x_column,
    stride_out_row,
    num_columns,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < num_columns
    p_x = x_ptr + i_row * stride_x_row + o_n * stride_x_column
    b_x = tl.load(p_x, mask=m_n, other=0.0)  # [BLOCK]
    tl.store(out_ptr + i_row * stride_out_row + o_n, b_x * 2, mask=m_n)
    tl.store(p_x, tl.zeros([BLOCK], tl.float32), mask=m_n)


def launch(x: Tensor, out: Tensor, num_columns: int) -> None:
    block = triton.next_power_of_2(x.shape[1])
    _double_kernel[(x.shape[0],)](x, out, *x.stride(), out.stride(0), num_columns, BLOCK=block, enable_fp_fusion=True)
