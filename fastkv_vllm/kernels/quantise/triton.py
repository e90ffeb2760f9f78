"""Triton forms of `quantise` and `dequantise`: one program per tile of groups, each group read and written once."""

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048  # of a tile: 16 registers of 128 threads
_WARPS = 4
# 2^23: a float32 from 2^23 to 2^24 is whole, so that adding it rounds smaller numbers, halves to even.
_WHOLE = tl.constexpr(8388608.0)


@triton.jit
def _locate(num_rows, stride_outer, stride_inner, INNER: tl.constexpr, ROWS: tl.constexpr):
    """Groups of this program, [ROWS], which of them there are, and where each begins in a tensor [A, INNER, n]."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return o_row, o_row < num_rows, o_row // INNER * stride_outer + o_row % INNER * stride_inner


@triton.jit
def _load_half(p_low, m_row, stride_byte):
    """Float16 of two bytes that may lie at odd addresses, as float32, [ROWS]."""
    b_low = tl.load(p_low, mask=m_row, other=0).to(tl.uint16)
    b_high = tl.load(p_low + stride_byte, mask=m_row, other=0).to(tl.uint16)
    return (b_low | (b_high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _to_half(b_x):
    """Float16, zeros positive."""
    b_half = b_x.to(tl.float16)
    return tl.where(b_half == 0, 0.0, b_half)


@triton.jit
def _bits(b_half):
    return b_half.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _quantise_kernel(
    groups_ptr,  # [A, INNER, GROUP]
    out_ptr,  # [A * INNER, 4 + GROUP * NUM_BITS / 8] uint8
    stride_groups_outer,
    stride_groups_inner,
    stride_groups_element,
    num_rows,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // NUM_BITS
    o_row, m_row, o_group = _locate(num_rows, stride_groups_outer, stride_groups_inner, INNER, ROWS)
    o_g = tl.arange(0, BLOCK_G).to(tl.int64)[None, :]
    m_x = m_row[:, None] & (o_g < GROUP)
    p_x = groups_ptr + o_group[:, None] + o_g * stride_groups_element
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_G]
    b_low = _to_half(tl.min(tl.where(o_g < GROUP, b_x, float("inf")), axis=1))
    b_high = tl.max(tl.where(o_g < GROUP, b_x, float("-inf")), axis=1)
    top = 2.0**NUM_BITS - 1
    b_step = _to_half(tl.div_rn(b_high - b_low.to(tl.float32), tl.full([ROWS], top, tl.float32)))
    b_divisor = tl.where(b_step > 0, b_step.to(tl.float32), float("inf"))[:, None]  # all codes are 0 then
    b_scaled = tl.div_rn(b_x - b_low.to(tl.float32)[:, None], tl.broadcast_to(b_divisor, [ROWS, BLOCK_G]))
    b_scaled = tl.minimum(tl.maximum(b_scaled, 0.0), top)
    b_codes = ((b_scaled + _WHOLE) - _WHOLE).to(tl.int32)  # [ROWS, BLOCK_G]

    b_codes = tl.reshape(b_codes, [ROWS, BLOCK_G // PER_BYTE, PER_BYTE])
    b_bytes = tl.sum(b_codes << (tl.arange(0, PER_BYTE) * NUM_BITS)[None, None, :], axis=2)
    p_out = out_ptr + o_row[:, None] * (4 + GROUP // PER_BYTE)
    o_b = tl.arange(0, BLOCK_G // PER_BYTE)[None, :]
    tl.store(p_out + 4 + o_b, b_bytes.to(tl.uint8), mask=m_row[:, None] & (o_b < GROUP // PER_BYTE))
    b_header = _bits(b_low) | (_bits(b_step) << 16)  # [ROWS]
    o_h = tl.arange(0, 4)[None, :]
    tl.store(p_out + o_h, ((b_header[:, None] >> (o_h * 8)) & 0xFF).to(tl.uint8), mask=m_row[:, None])


@triton.jit
def _dequantise_kernel(
    data_ptr,  # [A, INNER, 4 + GROUP * NUM_BITS / 8] uint8
    out_ptr,  # [A * INNER, GROUP] float32
    stride_data_outer,
    stride_data_inner,
    stride_data_byte,
    num_rows,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // NUM_BITS
    o_row, m_row, o_group = _locate(num_rows, stride_data_outer, stride_data_inner, INNER, ROWS)
    p_data = data_ptr + o_group
    b_low = _load_half(p_data, m_row, stride_data_byte)
    b_step = _load_half(p_data + 2 * stride_data_byte, m_row, stride_data_byte)
    o_b = tl.arange(0, BLOCK_G // PER_BYTE).to(tl.int64)[None, :]
    p_bytes = p_data[:, None] + (4 + o_b) * stride_data_byte
    b_bytes = tl.load(p_bytes, mask=m_row[:, None] & (o_b < GROUP // PER_BYTE), other=0).to(tl.int32)
    b_codes = (b_bytes[:, :, None] >> (tl.arange(0, PER_BYTE) * NUM_BITS)[None, None, :]) & ((1 << NUM_BITS) - 1)
    b_codes = tl.reshape(b_codes, [ROWS, BLOCK_G]).to(tl.float32)
    b_x = b_codes * b_step[:, None] + b_low[:, None]  # the product is exact: 8 and 11 bits
    o_g = tl.arange(0, BLOCK_G)[None, :]
    tl.store(out_ptr + o_row[:, None] * GROUP + o_g, b_x, mask=m_row[:, None] & (o_g < GROUP))


def quantise_triton(groups: torch.Tensor, num_bits: int) -> torch.Tensor:
    """See `quantise`; arguments are taken as checked."""
    size = groups.shape[-1]
    out = torch.empty(*groups.shape[:-1], 4 + size * num_bits // 8, dtype=torch.uint8, device=groups.device)
    _launch(_quantise_kernel, groups, out, size, num_bits)
    return out


def dequantise_triton(data: torch.Tensor, num_bits: int) -> torch.Tensor:
    """See `dequantise`; arguments are taken as checked."""
    size = (data.shape[-1] - 4) * 8 // num_bits
    out = torch.empty(*data.shape[:-1], size, dtype=torch.float32, device=data.device)
    _launch(_dequantise_kernel, data, out, size, num_bits)
    return out


def _launch(kernel: triton.JITFunction, source: torch.Tensor, out: torch.Tensor, size: int, num_bits: int) -> None:
    """Source [.., n] of groups of so many codes, read where it lies where its dimensions but the first are one run."""
    if not out.numel():
        return
    source = source.reshape(1, 1, -1) if source.dim() == 1 else source.unsqueeze(1) if source.dim() == 2 else source
    source = source.flatten(1, -2)
    num_rows = source.shape[0] * source.shape[1]
    block = triton.next_power_of_2(size)
    rows = max(1, _ELEMENTS // block)
    kernel[(triton.cdiv(num_rows, rows),)](
        source,
        out,
        *source.stride(),
        num_rows,
        INNER=source.shape[1],
        GROUP=size,
        NUM_BITS=num_bits,
        BLOCK_G=block,
        ROWS=rows,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
