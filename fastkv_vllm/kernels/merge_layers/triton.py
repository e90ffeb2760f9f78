"""Triton form of the merge of two layers: one program per tile of entries, for their keys or for their values."""

import torch
import triton
import triton.language as tl

from fastkv_vllm.kernels.merge_layers.pair import LayerPair

_ROWS = 16  # entries of a tile: 16 x 128 elements of each layer, 16 registers of 4 x 32 threads
_WARPS = 4


@triton.jit
def _locate(table_ptr, stride_table_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE: tl.constexpr):
    """Offset of each entry's key or value in the cache, [ROWS, 1]."""
    b_page = tl.load(table_ptr + i_sequence * stride_table_row + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
    o_entry = b_page * strides[0] + tl.program_id(1) * strides[1] + o_n % BLOCK_SIZE * strides[2]
    return o_entry[:, None]


@triton.jit
def _own_entries(lengths_ptr, num_entries, ROWS: tl.constexpr):
    """Sequence of this program, its entries [ROWS], and which of them the sequence has."""
    num_tiles = tl.cdiv(num_entries, ROWS)
    i_sequence = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_n = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    return i_sequence, o_n, o_n < tl.load(lengths_ptr + i_sequence)


@triton.jit
def _norm(b_x):
    """Lengths of rows, [ROWS]."""
    return tl.sqrt_rn(tl.sum(b_x * b_x, axis=1))


@triton.jit
def _unit(b_x, b_norm):
    """Rows of length 1; zero stays zero."""
    return b_x * tl.div_rn(1.0, tl.where(b_norm > 0, b_norm, 1.0))[:, None]


@triton.jit
def _measure_kernel(
    cache_ptr,  # [num_pages, 2, BLOCK_SIZE, D]
    lower_ptr,  # [S, width]
    upper_ptr,  # [S, width]
    lengths_ptr,  # [S]
    magnitudes_ptr,  # [S, n, 2, 2]
    chords_ptr,  # [S, n, 2, 2]
    stride_cache_page,
    stride_cache_part,
    stride_cache_entry,
    stride_lower_row,
    stride_upper_row,
    num_entries,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_sequence, o_n, m_n = _own_entries(lengths_ptr, num_entries, ROWS)
    strides = (stride_cache_page, stride_cache_part, stride_cache_entry)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = m_n[:, None] & (o_d < D)
    o_lower = _locate(lower_ptr, stride_lower_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    o_upper = _locate(upper_ptr, stride_upper_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    b_lower = tl.load(cache_ptr + o_lower + o_d, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    b_upper = tl.load(cache_ptr + o_upper + o_d, mask=m_x, other=0.0).to(tl.float32)
    b_lower_norm, b_upper_norm = _norm(b_lower), _norm(b_upper)
    b_u, b_v = _unit(b_lower, b_lower_norm), _unit(b_upper, b_upper_norm)
    o_out = ((i_sequence * num_entries + o_n) * 2 + tl.program_id(1)) * 2
    m_out = o_n < num_entries
    tl.store(magnitudes_ptr + o_out, b_lower_norm, mask=m_out)
    tl.store(magnitudes_ptr + o_out + 1, b_upper_norm, mask=m_out)
    tl.store(chords_ptr + o_out, _norm(b_u - b_v), mask=m_out)
    tl.store(chords_ptr + o_out + 1, _norm(b_u + b_v), mask=m_out)


@triton.jit
def _merge_kernel(
    cache_ptr,  # [num_pages, 2, BLOCK_SIZE, D]
    lower_ptr,  # [S, width]
    upper_ptr,  # [S, width]
    lengths_ptr,  # [S]
    coefficients_ptr,  # [S, n, 2, 2]
    is_merged_ptr,  # [S, n]
    stride_cache_page,
    stride_cache_part,
    stride_cache_entry,
    stride_lower_row,
    stride_upper_row,
    num_entries,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_sequence, o_n, m_n = _own_entries(lengths_ptr, num_entries, ROWS)
    m_n = m_n & (tl.load(is_merged_ptr + i_sequence * num_entries + o_n, mask=m_n, other=0) != 0)
    strides = (stride_cache_page, stride_cache_part, stride_cache_entry)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = m_n[:, None] & (o_d < D)
    o_lower = _locate(lower_ptr, stride_lower_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    o_upper = _locate(upper_ptr, stride_upper_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    b_lower = tl.load(cache_ptr + o_lower + o_d, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    b_upper = tl.load(cache_ptr + o_upper + o_d, mask=m_x, other=0.0).to(tl.float32)
    p_coefficients = coefficients_ptr + ((i_sequence * num_entries + o_n) * 2 + tl.program_id(1)) * 2
    b_of_lower = tl.load(p_coefficients, mask=m_n, other=0.0)[:, None]
    b_of_upper = tl.load(p_coefficients + 1, mask=m_n, other=0.0)[:, None]
    b_sum = b_of_lower * b_lower + b_of_upper * b_upper
    b_unit = _unit(b_sum, _norm(b_sum))
    tl.store(cache_ptr + o_lower + o_d, b_unit.to(cache_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _restore_kernel(
    cache_ptr,  # [num_pages, 2, BLOCK_SIZE, D]
    lower_ptr,  # [S, width]
    upper_ptr,  # [S, width]
    lengths_ptr,  # [S]
    shared_ptr,  # [S, width]
    kept_ptr,  # [S, width of its own]
    magnitudes_ptr,  # [S, n, 2, 2]
    places_ptr,  # [S, n]
    stride_cache_page,
    stride_cache_part,
    stride_cache_entry,
    stride_lower_row,
    stride_upper_row,
    stride_shared_row,
    stride_kept_row,
    num_entries,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_sequence, o_n, m_n = _own_entries(lengths_ptr, num_entries, ROWS)
    strides = (stride_cache_page, stride_cache_part, stride_cache_entry)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = m_n[:, None] & (o_d < D)
    o_shared = _locate(shared_ptr, stride_shared_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    b_stored = tl.load(cache_ptr + o_shared + o_d, mask=m_x, other=0.0)  # [ROWS, BLOCK_D]
    b_place = tl.load(places_ptr + i_sequence * num_entries + o_n, mask=m_n, other=-1)  # [ROWS]
    m_kept = b_place >= 0
    o_kept = _locate(kept_ptr, stride_kept_row, i_sequence, b_place, m_kept, strides, BLOCK_SIZE)
    b_kept = tl.load(cache_ptr + o_kept + o_d, mask=m_kept[:, None] & (o_d < D), other=0.0)
    p_magnitudes = magnitudes_ptr + ((i_sequence * num_entries + o_n) * 2 + tl.program_id(1)) * 2
    b_lower_norm = tl.load(p_magnitudes, mask=m_n, other=0.0)[:, None]
    b_upper_norm = tl.load(p_magnitudes + 1, mask=m_n, other=0.0)[:, None]
    b_wide = b_stored.to(tl.float32)
    b_unit = _unit(b_wide, _norm(b_wide))
    b_lower = tl.where(m_kept[:, None], b_stored, (b_unit * b_lower_norm).to(b_stored.dtype))
    b_upper = tl.where(m_kept[:, None], b_kept, (b_unit * b_upper_norm).to(b_stored.dtype))
    tl.debug_barrier()  # `lower` may be `shared`
    o_lower = _locate(lower_ptr, stride_lower_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    o_upper = _locate(upper_ptr, stride_upper_row, i_sequence, o_n, m_n, strides, BLOCK_SIZE)
    tl.store(cache_ptr + o_lower + o_d, b_lower, mask=m_x)
    tl.store(cache_ptr + o_upper + o_d, b_upper, mask=m_x)


def measure_triton(pair: LayerPair, magnitudes: torch.Tensor, chords: torch.Tensor) -> None:
    """See `measure_reference`."""
    _run(_measure_kernel, pair, (), magnitudes, chords)


def merge_triton(pair: LayerPair, coefficients: torch.Tensor, is_merged: torch.Tensor) -> None:
    """See `merge_reference`."""
    _run(_merge_kernel, pair, (), coefficients, is_merged)


def restore_triton(
    pair: LayerPair, shared: torch.Tensor, kept: torch.Tensor, magnitudes: torch.Tensor, places: torch.Tensor
) -> None:
    """See `restore_reference`."""
    _run(_restore_kernel, pair, (shared, kept), magnitudes, places)


def _run(kernel: triton.JITFunction, pair: LayerPair, tables: tuple[torch.Tensor, ...], *numbers: torch.Tensor) -> None:
    tables = tuple(table.contiguous() for table in (pair.lower, pair.upper, *tables))
    num_tiles = triton.cdiv(pair.num_entries, _ROWS)
    if not pair.num_sequences * num_tiles:
        return
    kernel[(pair.num_sequences * num_tiles, 2)](
        pair.cache,
        *tables[:2],
        pair.lengths.contiguous(),
        *tables[2:],
        *(tensor.contiguous() for tensor in numbers),
        *pair.cache.stride()[:3],
        *(table.stride(0) for table in tables),
        pair.num_entries,
        D=pair.cache.shape[3],
        BLOCK_SIZE=pair.cache.shape[2],
        BLOCK_D=triton.next_power_of_2(pair.cache.shape[3]),
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
