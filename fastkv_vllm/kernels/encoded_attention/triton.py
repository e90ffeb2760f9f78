"""Triton form of `encoded_attention`: the entries of a sequence are split among programs, and their results merged.

Two launches of one kernel, for encoded and for dense entries, leave the softmax over a part of the entries and its
log-sum-exp; a last one merges them. Parts are as many whatever the length, so the order of sums depends on nothing but
the sequence.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from fastkv_vllm.kernels.encoded_attention import PagedEntries

_PARTS = 16  # of the encoded and of the dense entries of a sequence: 8 heads of one request are 128 programs each
# Element size, bytes -> padded head_dim -> entries of a tile, warps: twice the entries spill registers.
_SETTINGS = {
    2: {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (32, 8), 256: (16, 8)},
    4: {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (16, 8)},
}


@triton.jit
def _load_half(p_low, m_low):
    """Float16 of two bytes that may lie at odd addresses, as float32."""
    b_low = tl.load(p_low, mask=m_low, other=0).to(tl.uint16)
    b_high = tl.load(p_low + 1, mask=m_low, other=0).to(tl.uint16)
    return (b_low | (b_high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_dense(p_vectors, m_n, o_dim, m_d):
    """Elements of vectors, [BLOCK_N, BLOCK_D]."""
    return tl.load(p_vectors[:, None] + o_dim[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)


@triton.jit
def _load_encoded(
    p_vectors,
    m_n,
    NUM_BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Numbers of encoded vectors in float32, groups padded to BLOCK_C, [BLOCK_N, BLOCK_GROUPS * BLOCK_C]."""
    PER_BYTE: tl.constexpr = 8 // NUM_BITS
    o_group = tl.arange(0, BLOCK_GROUPS)
    m_group = m_n[:, None] & (o_group < NUM_GROUPS)[None, :]
    p_group = p_vectors[:, None] + (o_group * (4 + CHANNELS // PER_BYTE))[None, :]
    b_low = _load_half(p_group, m_group)  # [BLOCK_N, BLOCK_GROUPS]
    b_step = _load_half(p_group + 2, m_group)
    o_byte = tl.arange(0, BLOCK_C // PER_BYTE)[None, None, :]
    m_byte = m_group[:, :, None] & (o_byte < CHANNELS // PER_BYTE)
    b_codes = tl.load(p_group[:, :, None] + 4 + o_byte, mask=m_byte, other=0).to(tl.int32)
    if NUM_BITS < 8:
        o_shift = (tl.arange(0, PER_BYTE) * NUM_BITS)[None, None, None, :]
        b_codes = (b_codes[:, :, :, None] >> o_shift) & ((1 << NUM_BITS) - 1)
        b_codes = tl.reshape(b_codes, [BLOCK_N, BLOCK_GROUPS, BLOCK_C])
    b_x = b_codes.to(tl.float32) * b_step[:, :, None] + b_low[:, :, None]
    return tl.reshape(b_x, [BLOCK_N, BLOCK_GROUPS * BLOCK_C])


@triton.jit
def _parts_kernel(
    queries_ptr,  # [S, G, D]
    pages_ptr,  # [num_pages, width]
    tables_ptr,  # [S, columns]
    lengths_ptr,  # [S]
    out_ptr,  # [S, 2 * PARTS, G, D] float32
    lse_ptr,  # [S, 2 * PARTS, G] float32
    stride_pages_page,
    stride_tables_row,
    scale,
    FIRST: tl.constexpr,  # part that the first program of a sequence writes
    NUM_BITS: tl.constexpr,  # 16 or more: not encoded
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ENTRY: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_D: tl.constexpr = BLOCK_GROUPS * BLOCK_C
    NUM_GROUPS: tl.constexpr = HEAD_DIM // CHANNELS
    i_seq = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    length = tl.load(lengths_ptr + i_seq)
    size = tl.cdiv(tl.cdiv(length, PARTS), BLOCK_N) * BLOCK_N
    begin = i_part * size
    end = tl.minimum(begin + size, length)
    o_d = tl.arange(0, BLOCK_D)
    o_dim = o_d // BLOCK_C * CHANNELS + o_d % BLOCK_C
    m_d = (o_d % BLOCK_C < CHANNELS) & (o_d // BLOCK_C < NUM_GROUPS)
    o_m = tl.arange(0, BLOCK_M)
    m_q = (o_m < GROUP)[:, None] & m_d[None, :]
    o_q = o_m[:, None] * HEAD_DIM + o_dim[None, :]
    b_q = tl.load(queries_ptr + i_seq * GROUP * HEAD_DIM + o_q, mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        b_page = tl.load(tables_ptr + i_seq * stride_tables_row + o_n // PER_PAGE, mask=m_n, other=0).to(tl.int64)
        p_key = pages_ptr + b_page * stride_pages_page + o_n % PER_PAGE * ENTRY
        p_value = p_key + ENTRY // 2
        if NUM_BITS >= 16:
            b_k = _load_dense(p_key, m_n, o_dim, m_d)
            b_v = _load_dense(p_value, m_n, o_dim, m_d)
        else:
            b_k = _load_encoded(p_key, m_n, NUM_BITS, CHANNELS, NUM_GROUPS, BLOCK_C, BLOCK_GROUPS, BLOCK_N)
            b_v = _load_encoded(p_value, m_n, NUM_BITS, CHANNELS, NUM_GROUPS, BLOCK_C, BLOCK_GROUPS, BLOCK_N)
            b_k = b_k.to(b_q.dtype)
            b_v = b_v.to(b_q.dtype)
        b_l = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        b_l = tl.where(m_n[None, :], b_l, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, axis=1))  # finite: a tile has an entry
        b_p = tl.exp(b_l - b_new[:, None])
        b_old = tl.exp(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
        b_out = b_out * b_old[:, None] + tl.dot(b_p.to(b_q.dtype), b_v, input_precision="ieee")
        b_max = b_new

    b_whole = tl.where(b_sum > 0, b_sum, 1.0)
    i_out = (i_seq * (2 * PARTS) + FIRST + i_part) * GROUP
    tl.store(lse_ptr + i_out + o_m, tl.where(b_sum > 0, b_max + tl.log(b_whole), float("-inf")), mask=o_m < GROUP)
    tl.store(out_ptr + i_out * HEAD_DIM + o_q, b_out / b_whole[:, None], mask=m_q)


@triton.jit
def _merge_kernel(
    parts_ptr,  # [S, PARTS, G, D] float32
    lse_ptr,  # [S, PARTS, G] float32
    out_ptr,  # [S, G, D]
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    o_row = (i_seq * PARTS + tl.arange(0, PARTS)) * GROUP + i_head
    b_lse = tl.load(lse_ptr + o_row)  # [PARTS]; -inf where a part has no entries
    b_weight = tl.exp(b_lse - tl.max(b_lse, axis=0))
    p_parts = parts_ptr + o_row[:, None] * HEAD_DIM + o_d[None, :]
    b_parts = tl.load(p_parts, mask=(o_d < HEAD_DIM)[None, :], other=0.0)  # [PARTS, BLOCK_D]
    b_out = tl.sum(b_parts * b_weight[:, None], axis=0) / tl.sum(b_weight, axis=0)
    p_out = out_ptr + (i_seq * GROUP + i_head) * HEAD_DIM + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=o_d < HEAD_DIM)


def encoded_attention_triton(
    queries: torch.Tensor,
    encoded: "PagedEntries",
    dense: "PagedEntries",
    num_bits: int,
    quant_group_size: int,
    scale: float,
) -> torch.Tensor:
    """See `encoded_attention`; arguments are taken as checked."""
    num_sequences, group, head_dim = queries.shape
    queries, out = queries.contiguous(), torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    made = {"dtype": torch.float32, "device": queries.device}
    parts = torch.empty(num_sequences, 2 * _PARTS, group, head_dim, **made)
    lse = torch.empty(num_sequences, 2 * _PARTS, group, **made)
    num_groups = head_dim // quant_group_size
    block_groups = triton.next_power_of_2(num_groups)
    block_c = max(16 // block_groups, triton.next_power_of_2(quant_group_size))  # a product takes 16 channels or more
    block_n, num_warps = _SETTINGS[queries.element_size()][block_c * block_groups]
    of_entry = 2 * num_groups * (4 + quant_group_size * num_bits // 8)
    for number, (entries, bits, size) in enumerate(((encoded, num_bits, of_entry), (dense, 16, 2 * head_dim))):
        tables = entries.tables.contiguous()
        _parts_kernel[(num_sequences, _PARTS)](
            queries,
            entries.pages,
            tables,
            entries.lengths.contiguous(),
            parts,
            lse,
            entries.pages.stride(0),
            tables.stride(0),
            scale,
            FIRST=number * _PARTS,
            NUM_BITS=bits,
            GROUP=group,
            HEAD_DIM=head_dim,
            CHANNELS=quant_group_size,
            ENTRY=size,
            PER_PAGE=entries.pages.shape[1] // size,
            PARTS=_PARTS,
            BLOCK_C=block_c,
            BLOCK_GROUPS=block_groups,
            BLOCK_M=max(16, triton.next_power_of_2(group)),
            BLOCK_N=block_n,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    _merge_kernel[(num_sequences, group)](
        parts,
        lse,
        out,
        GROUP=group,
        HEAD_DIM=head_dim,
        PARTS=2 * _PARTS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
    return out
