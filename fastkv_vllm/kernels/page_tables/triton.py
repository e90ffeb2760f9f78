"""Triton form of `page_tables`: one program per layer and KV head."""

import torch
import triton
import triton.language as tl

_BLOCK = 256  # pages at a time: 1 KiB of a table


@triton.jit
def _page_tables_kernel(
    held_ptr,  # [L, H, most]
    counts_ptr,  # [L, H]
    blocks_ptr,  # [B]
    first_ptr,  # [L]
    out_ptr,  # [L, H, width]
    stride_held_layer,
    stride_held_head,
    stride_counts_layer,
    stride_out_layer,
    stride_out_head,
    most,
    num_blocks,
    num_heads,
    BLOCK: tl.constexpr,
):
    i_head, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + i_layer * stride_counts_layer + i_head)
    p_held = held_ptr + i_layer * stride_held_layer + i_head * stride_held_head
    p_out = out_ptr + i_layer * stride_out_layer + i_head * stride_out_head
    page = tl.load(first_ptr + i_layer) + i_head
    for start in range(0, most + num_blocks, BLOCK):
        o_page = start + tl.arange(0, BLOCK)
        m_held = o_page < count
        m_since = (o_page >= count) & (o_page < count + num_blocks)
        b_held = tl.load(p_held + o_page, mask=m_held, other=0)  # [BLOCK]
        b_block = tl.load(blocks_ptr + o_page - count, mask=m_since, other=0).to(tl.int64)  # [BLOCK]
        b_page = tl.where(m_since, page + b_block * num_heads, b_held)
        tl.store(p_out + o_page, b_page.to(out_ptr.dtype.element_ty), mask=o_page < most + num_blocks)


def page_tables_triton(
    held: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor, first: torch.Tensor, out: torch.Tensor
) -> None:
    """See `page_tables`."""
    num_layers, num_heads, most = held.shape
    held = held if held.stride(2) == 1 else held.contiguous()
    counts = counts if counts.stride(1) == 1 else counts.contiguous()
    _page_tables_kernel[(num_heads, num_layers)](
        held,
        counts,
        blocks.contiguous(),
        first.contiguous(),
        out,
        *held.stride()[:2],
        counts.stride(0),
        *out.stride()[:2],
        most,
        len(blocks),
        num_heads,
        BLOCK=_BLOCK,
        num_warps=2,
        enable_fp_fusion=True,
    )
