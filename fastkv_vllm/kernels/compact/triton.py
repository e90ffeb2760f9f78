"""Triton form of `compact`: one program per sequence and 256 bytes of a row, from the last page to the first."""

import torch
import triton
import triton.language as tl

from fastkv_vllm.kernels.compact.overlap import must_wait

_SLICE_BYTES = 256  # of a row per program; whole 128-byte lines
_NUM_ROWS = 64  # entries in flight per program: 16 KiB, 32 registers of 4 threads x 32


@triton.jit
def _move_kernel(
    cache_ptr,  # [num_pages, num_parts, BLOCK_SIZE, width]
    staging_ptr,  # [M, num_parts, BLOCK_SIZE, width]
    sources_ptr,  # [M, BLOCK_SIZE]
    pages_ptr,  # [M]
    waits_ptr,  # [M]
    starts_ptr,  # [sequences + 1]
    stride_cache_page,
    stride_cache_part,
    stride_cache_entry,
    num_parts,
    width,
    BLOCK_SIZE: tl.constexpr,
    PAGES: tl.constexpr,  # moved together
    ROWS: tl.constexpr,  # power of two, at least PAGES * BLOCK_SIZE
    SLICE: tl.constexpr,
):
    i_part = tl.program_id(2)
    start = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    o_width = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    o_row = tl.arange(0, ROWS)
    for i_step in range(tl.cdiv(end - start, PAGES)):
        o_slot = (end - (i_step + 1) * PAGES) * BLOCK_SIZE + o_row  # [ROWS]
        m_slot = (o_row < PAGES * BLOCK_SIZE) & (o_slot >= start * BLOCK_SIZE)
        b_source = tl.load(sources_ptr + o_slot, mask=m_slot, other=-1).to(tl.int64)  # [ROWS]
        m_slot = m_slot & (b_source >= 0)
        b_page = tl.load(pages_ptr + o_slot // BLOCK_SIZE, mask=m_slot, other=0).to(tl.int64)  # [ROWS]
        b_waits = tl.load(waits_ptr + o_slot // BLOCK_SIZE, mask=m_slot, other=0) != 0  # [ROWS]
        m_entry = m_slot[:, None] & (o_width < width)[None, :]
        o_source = b_source // BLOCK_SIZE * stride_cache_page + b_source % BLOCK_SIZE * stride_cache_entry
        p_part = cache_ptr + i_part.to(tl.int64) * stride_cache_part + o_width[None, :]
        b_entry = tl.load(p_part + o_source[:, None], mask=m_entry)  # [ROWS, SLICE]
        tl.debug_barrier()  # other warps' rows are read too
        o_target = b_page * stride_cache_page + o_slot % BLOCK_SIZE * stride_cache_entry
        tl.store(p_part + o_target[:, None], b_entry, mask=m_entry & ~b_waits[:, None])
        o_staged = (o_slot // BLOCK_SIZE * num_parts + i_part) * BLOCK_SIZE + o_slot % BLOCK_SIZE
        p_staged = staging_ptr + o_staged[:, None] * width + o_width[None, :]
        tl.store(p_staged, b_entry, mask=m_entry & b_waits[:, None])


@triton.jit
def _fill_kernel(
    cache_ptr,  # [num_pages, num_parts, BLOCK_SIZE, width]
    staging_ptr,  # [M, num_parts, BLOCK_SIZE, width]
    sources_ptr,  # [M, BLOCK_SIZE]
    pages_ptr,  # [M]
    waits_ptr,  # [M]
    stride_cache_page,
    stride_cache_part,
    stride_cache_entry,
    num_parts,
    width,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # power of two, at least BLOCK_SIZE
    SLICE: tl.constexpr,
):
    i_page, i_part = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    if tl.load(waits_ptr + i_page) != 0:
        o_width = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
        o_entry = tl.arange(0, ROWS)
        b_source = tl.load(sources_ptr + i_page * BLOCK_SIZE + o_entry, mask=o_entry < BLOCK_SIZE, other=-1)  # [ROWS]
        m_entry = (b_source >= 0)[:, None] & (o_width < width)[None, :]
        o_staged = (i_page * num_parts + i_part) * BLOCK_SIZE + o_entry
        b_entry = tl.load(staging_ptr + o_staged[:, None] * width + o_width[None, :], mask=m_entry)  # [ROWS, SLICE]
        o_target = tl.load(pages_ptr + i_page).to(tl.int64) * stride_cache_page + i_part * stride_cache_part
        p_target = cache_ptr + o_target + o_entry[:, None].to(tl.int64) * stride_cache_entry + o_width[None, :]
        tl.store(p_target, b_entry, mask=m_entry)


def compact_triton(cache: torch.Tensor, sources: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor) -> None:
    """See `compact`; holds a copy of what is moved for the pages that must wait."""
    if not len(pages):
        return
    words = _as_words(cache)
    _, num_parts, block_size, width = words.shape
    sources, pages, starts = sources.contiguous(), pages.contiguous(), starts.contiguous()
    waits = must_wait(sources, pages, starts).to(torch.int8)
    staging = torch.empty(len(pages), num_parts, block_size, width, dtype=words.dtype, device=words.device)
    strides = words.stride()[:3]
    slice_width = triton.next_power_of_2(min(width, _SLICE_BYTES // words.element_size()))
    num_slices = triton.cdiv(width, slice_width)
    num_pages = max(1, _NUM_ROWS // block_size)
    _move_kernel[(len(starts) - 1, num_slices, num_parts)](
        words,
        staging,
        sources,
        pages,
        waits,
        starts,
        *strides,
        num_parts,
        width,
        BLOCK_SIZE=block_size,
        PAGES=num_pages,
        ROWS=triton.next_power_of_2(num_pages * block_size),
        SLICE=slice_width,
        num_stages=1,
        enable_fp_fusion=True,
    )
    _fill_kernel[(len(pages), num_slices, num_parts)](
        words,
        staging,
        sources,
        pages,
        waits,
        *strides,
        num_parts,
        width,
        BLOCK_SIZE=block_size,
        ROWS=triton.next_power_of_2(block_size),
        SLICE=slice_width,
        enable_fp_fusion=True,
    )


def _as_words(cache: torch.Tensor) -> torch.Tensor:
    """The cache in words of 4 bytes where its rows consist of such, else in bytes; 4 words make a 16-byte move."""
    lengths = (*cache.stride()[:3], cache.shape[3], cache.storage_offset())
    whole = all(length * cache.element_size() % 4 == 0 for length in lengths)
    return cache.view(torch.int32 if whole else torch.int8)
