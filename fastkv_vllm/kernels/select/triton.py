"""Triton form of `select`: a radix search for the lowest score that stays, then a count and a scatter in order.

Integers only, so the result is exact and the same in every run. A row is cut into segments of whole tiles, one program
each. Three launches count the digits of the ordered keys (11, 11 and 10 bits, the highest first), each among the
entries that begin like the threshold; the fourth counts what each segment keeps; the fifth writes. The row is read five
times and nothing else of its size is stored.
"""

import torch
import triton
import triton.language as tl

from fastkv_vllm.kernels.select.segments import TILE, segment_size

_PASSES = tl.constexpr(3)
_BINS = tl.constexpr(2048)
_WARPS = 8


@triton.constexpr_function
def _shift(i_pass: int) -> int:
    """Bits behind the digit of a pass."""
    return (21, 10, 0)[i_pass]


@triton.constexpr_function
def _width(i_pass: int) -> int:
    """Bits of the digit of a pass."""
    return (11, 11, 10)[i_pass]


@triton.jit
def _load_keys(p_row, i_n, stride_scores_column, end, TILE: tl.constexpr):
    """Unsigned integers that order as the scores of a tile do, and which of them lie before `end`.

    -inf is lowest, both zeros are alike, NaN is above +inf.
    """
    o_n = i_n + tl.arange(0, TILE).to(tl.int64)
    m_n = o_n < end
    p_scores = p_row + o_n * stride_scores_column
    # Whole tiles without a mask: loads of 16 bytes.
    b_scores = tl.load(p_scores) if i_n + TILE <= end else tl.load(p_scores, mask=m_n, other=0.0)  # [TILE]
    b_bits = b_scores.to(tl.uint32, bitcast=True)
    b_bits = tl.where(b_bits == 0x80000000, 0, b_bits)
    b_keys = tl.where(b_bits >> 31 != 0, ~b_bits, b_bits | 0x80000000)
    return tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, 0xFFFFFFFF, b_keys), m_n


@triton.jit
def _find_threshold(p_histograms, stride_pass, num_kept, NUM_PASSES: tl.constexpr):
    """Leading digits of the lowest key that stays, and how many of the entries that begin like it do.

    Where none are kept: the highest key, and none of its ties.
    """
    o_bin = tl.arange(0, _BINS)
    key = tl.zeros([], tl.uint32)
    wanted = num_kept
    for i_pass in tl.static_range(NUM_PASSES):
        m_bin = o_bin < 1 << _width(i_pass)
        b_counts = tl.load(p_histograms + i_pass * stride_pass + o_bin)  # [BINS]
        b_from = tl.cumsum(b_counts, reverse=True)
        digit = tl.max(tl.where(m_bin & (b_from >= wanted), o_bin, 0))
        wanted -= tl.sum(tl.where(o_bin > digit, b_counts, 0))
        key = (key << _width(i_pass)) | digit.to(tl.uint32)
    return key, wanted


@triton.jit
def _histogram_kernel(
    scores_ptr,  # [R, N]
    num_kept_ptr,  # [R] int64
    lengths_ptr,  # [R] int64
    histograms_ptr,  # [PASSES, R, BINS] int32, zeros
    stride_scores_row,
    stride_scores_column,
    num_rows,
    num_segments,
    segment_size,
    PASS: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = (tl.program_id(0) // num_segments).to(tl.int64)
    begin = (tl.program_id(0) % num_segments) * segment_size
    end = tl.minimum(begin + segment_size, tl.load(lengths_ptr + i_row)).to(tl.int32)
    p_row = scores_ptr + i_row * stride_scores_row
    stride_pass = tl.cast(num_rows, tl.int64) * _BINS
    p_histograms = histograms_ptr + i_row * _BINS
    prefix, _ = _find_threshold(p_histograms, stride_pass, tl.load(num_kept_ptr + i_row).to(tl.int32), PASS)
    b_counts = tl.zeros([_BINS], tl.int32)
    for i_n in range(begin, end, TILE):
        b_keys, m_n = _load_keys(p_row, i_n, stride_scores_column, end, TILE)
        b_digits = b_keys >> _shift(PASS)
        if PASS > 0:
            m_n = m_n & (b_digits >> _width(PASS) == prefix)
        b_counts += tl.histogram((b_digits & ((1 << _width(PASS)) - 1)).to(tl.int32), _BINS, mask=m_n)
    o_bin = tl.arange(0, _BINS)
    tl.atomic_add(p_histograms + PASS * stride_pass + o_bin, b_counts, mask=b_counts > 0, sem="relaxed")


@triton.jit
def _count_kernel(
    scores_ptr,  # [R, N]
    num_kept_ptr,  # [R] int64
    lengths_ptr,  # [R] int64
    histograms_ptr,  # [PASSES, R, BINS] int32
    tallies_ptr,  # [2, R, segments] int32: entries above the threshold, ties with it
    stride_scores_row,
    stride_scores_column,
    num_rows,
    num_segments,
    segment_size,
    TILE: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_row = (i_program // num_segments).to(tl.int64)
    begin = (i_program % num_segments) * segment_size
    end = tl.minimum(begin + segment_size, tl.load(lengths_ptr + i_row)).to(tl.int32)
    p_row = scores_ptr + i_row * stride_scores_row
    stride_pass = tl.cast(num_rows, tl.int64) * _BINS
    num_kept = tl.load(num_kept_ptr + i_row).to(tl.int32)
    key, _ = _find_threshold(histograms_ptr + i_row * _BINS, stride_pass, num_kept, _PASSES)
    b_sums = tl.zeros([TILE], tl.int32)
    b_ties = tl.zeros([TILE], tl.int32)
    for i_n in range(begin, end, TILE):
        b_keys, m_n = _load_keys(p_row, i_n, stride_scores_column, end, TILE)
        b_sums += (m_n & (b_keys > key)).to(tl.int32)
        b_ties += (m_n & (b_keys == key)).to(tl.int32)
    tl.store(tallies_ptr + i_program, tl.sum(b_sums))
    tl.store(tallies_ptr + num_rows * num_segments + i_program, tl.sum(b_ties))


@triton.jit
def _scatter_kernel(
    scores_ptr,  # [R, N]
    num_kept_ptr,  # [R] int64
    lengths_ptr,  # [R] int64
    starts_ptr,  # [R] int64, place of a row's first result
    histograms_ptr,  # [PASSES, R, BINS] int32
    tallies_ptr,  # [2, R, segments] int32
    columns_ptr,  # [sum of num_kept] int64
    stride_scores_row,
    stride_scores_column,
    num_rows,
    num_segments,
    segment_size,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_row = (i_program // num_segments).to(tl.int64)
    i_segment = i_program % num_segments
    begin = i_segment * segment_size
    end = tl.minimum(begin + segment_size, tl.load(lengths_ptr + i_row)).to(tl.int32)
    p_row = scores_ptr + i_row * stride_scores_row
    stride_pass = tl.cast(num_rows, tl.int64) * _BINS
    num_kept = tl.load(num_kept_ptr + i_row).to(tl.int32)
    key, num_ties = _find_threshold(histograms_ptr + i_row * _BINS, stride_pass, num_kept, _PASSES)

    o_segment = tl.arange(0, SEGMENTS)
    p_tallies = tallies_ptr + i_row * num_segments + o_segment
    m_segment = o_segment < i_segment
    above = tl.sum(tl.load(p_tallies, mask=m_segment, other=0))  # in the segments before
    ties = tl.sum(tl.load(p_tallies + num_rows * num_segments, mask=m_segment, other=0))
    p_columns = columns_ptr + tl.load(starts_ptr + i_row)
    for i_n in range(begin, end, TILE):
        o_n = i_n + tl.arange(0, TILE).to(tl.int64)
        b_keys, m_n = _load_keys(p_row, i_n, stride_scores_column, end, TILE)
        m_above = m_n & (b_keys > key)
        m_tie = m_n & (b_keys == key)
        # Both counts in one scan: a tile's sums fit 16 bits.
        b_own = m_above.to(tl.int32) + (m_tie.to(tl.int32) << 16)
        b_before = tl.cumsum(b_own) - b_own
        b_ties = ties + (b_before >> 16)
        b_place = above + (b_before & 0xFFFF) + tl.minimum(b_ties, num_ties)
        tl.store(p_columns + b_place, o_n, mask=m_above | (m_tie & (b_ties < num_ties)))
        total = tl.sum(b_own)
        above += total & 0xFFFF
        ties += total >> 16


def launch(scores: torch.Tensor, num_kept: torch.Tensor, lengths: torch.Tensor, columns: torch.Tensor) -> None:
    """See `select_ragged`; columns [sum of num_kept] int64 is written."""
    num_rows, num_columns = scores.shape
    size = segment_size(num_rows, num_columns)
    num_segments = triton.cdiv(num_columns, size)
    histograms = torch.zeros(_PASSES.value, num_rows, _BINS.value, dtype=torch.int32, device=scores.device)
    tallies = torch.empty(2, num_rows, num_segments, dtype=torch.int32, device=scores.device)
    starts = num_kept.cumsum(0) - num_kept
    num_kept, lengths = num_kept.contiguous(), lengths.contiguous()
    sizes = (*scores.stride(), num_rows, num_segments, size)
    grid = (num_rows * num_segments,)
    for i_pass in range(_PASSES.value):
        _histogram_kernel[grid](scores, num_kept, lengths, histograms, *sizes, PASS=i_pass, TILE=TILE, num_warps=_WARPS)
    _count_kernel[grid](scores, num_kept, lengths, histograms, tallies, *sizes, TILE=TILE, num_warps=_WARPS)
    _scatter_kernel[grid](
        scores,
        num_kept,
        lengths,
        starts,
        histograms,
        tallies,
        columns,
        *sizes,
        TILE=TILE,
        SEGMENTS=triton.next_power_of_2(num_segments),
        num_warps=_WARPS,
    )
