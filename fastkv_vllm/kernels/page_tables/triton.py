"""Triton form of `page_tables`: one program per layer and sequence."""

import torch
import triton
import triton.language as tl

_BLOCK = 256  # pages at a time: 1 KiB of a table


@triton.jit
def _page_tables_kernel(
    held_ptr,  # [sum of counts]
    ends_ptr,  # [R * L * H], sum of the counts up to this one
    counts_ptr,  # [R, L, H]
    block_tables_ptr,  # [R, max_blocks]
    num_whole_ptr,  # [R]
    seq_lens_ptr,  # [R]
    first_ptr,  # [L]
    tables_ptr,  # [L, R * H, width]
    lengths_ptr,  # [L, R * H]
    stride_block_tables_request,
    stride_tables_layer,
    stride_tables_sequence,
    stride_lengths_layer,
    num_layers,
    num_heads,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sequence, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_request, i_head = i_sequence // num_heads, i_sequence % num_heads
    i_count = (i_request * num_layers + i_layer) * num_heads + i_head
    count = tl.load(counts_ptr + i_count)
    whole = tl.load(num_whole_ptr + i_request)
    length = tl.load(seq_lens_ptr + i_request)
    num_entries = count * BLOCK_SIZE + length - whole * BLOCK_SIZE
    tl.store(lengths_ptr + i_layer * stride_lengths_layer + i_sequence, num_entries.to(tl.int32))
    num_pages = count + tl.cdiv(length, BLOCK_SIZE) - whole
    p_held = held_ptr + tl.load(ends_ptr + i_count) - count
    p_later = block_tables_ptr + i_request * stride_block_tables_request + whole - count
    p_table = tables_ptr + i_layer * stride_tables_layer + i_sequence * stride_tables_sequence
    page = tl.load(first_ptr + i_layer) + i_head
    for start in range(0, num_pages, BLOCK):
        o_page = start + tl.arange(0, BLOCK)
        b_held = tl.load(p_held + o_page, mask=o_page < count, other=0)  # [BLOCK]
        m_later = (o_page >= count) & (o_page < num_pages)
        b_block = tl.load(p_later + o_page, mask=m_later, other=0).to(tl.int64)  # [BLOCK]
        b_page = tl.where(m_later, page + b_block * num_heads, b_held)
        tl.store(p_table + o_page, b_page.to(tl.int32), mask=o_page < num_pages)


def page_tables_triton(
    held: torch.Tensor,
    counts: torch.Tensor,
    block_tables: torch.Tensor,
    num_whole: torch.Tensor,
    seq_lens: torch.Tensor,
    first: torch.Tensor,
    block_size: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """See `page_tables`."""
    num_reqs, num_layers, num_heads = counts.shape
    if not num_reqs:
        return
    counts = counts.contiguous()
    _page_tables_kernel[(num_reqs * num_heads, num_layers)](
        held.contiguous(),
        counts.flatten().cumsum(0),
        counts,
        block_tables,
        num_whole.contiguous(),
        seq_lens.contiguous(),
        first.contiguous(),
        tables,
        lengths,
        block_tables.stride(0),
        *tables.stride()[:2],
        lengths.stride(0),
        num_layers,
        num_heads,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=2,
        enable_fp_fusion=True,
    )
