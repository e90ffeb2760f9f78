"""Triton form of `encoded_attention`: the entries of a sequence are split among programs, and their results merged.

A launch of one kernel for each way of storing leaves the softmax over shares of its entries and their log-sum-exp; a
last launch merges them. Shares are as many whatever the length, so the order of sums depends on nothing but the
sequence.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from fastkv_vllm.kernels.encoded_attention.forms import Form, Kind, Vectors

if TYPE_CHECKING:
    from fastkv_vllm.kernels.encoded_attention import PagedEntries

_SHARES = 16  # of a part of a sequence: 8 heads of one request are 128 programs each
# Element size, bytes -> padded head_dim -> entries of a tile, warps: twice the entries spill registers.
_SETTINGS = {
    2: {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (32, 8), 256: (16, 8)},
    4: {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (16, 8)},
}
_RECORD_TILE = 16  # entries of a tile of records: of one of 16 or of 32

_ELEMENTS = tl.constexpr(Kind.ELEMENTS.value)
_FLOAT8 = tl.constexpr(Kind.FLOAT8.value)
_BY_TOKEN = tl.constexpr(Kind.BY_TOKEN.value)
_BY_CHANNEL = tl.constexpr(Kind.BY_CHANNEL.value)
_CLIPPED = tl.constexpr(Kind.CLIPPED.value)
_HALVES_BY_TOKEN = tl.constexpr(Kind.HALVES_BY_TOKEN.value)


class _Room(NamedTuple):
    """Padding of vectors in a program.

    Fields:
        block: channels of a group, a power of two.
        channels: of a group as they are.
        groups: a power of two.
    """

    block: int
    channels: int
    groups: int


@triton.jit
def _load_half(p_low, m_low):
    """Float16 of two bytes that may lie at odd addresses, as float32."""
    b_low = tl.load(p_low, mask=m_low, other=0).to(tl.uint16)
    b_high = tl.load(p_low + 1, mask=m_low, other=0).to(tl.uint16)
    return (b_low | (b_high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_float8(p_numbers, m_numbers):
    """E4m3 as float32: float16's exponent is 8 less for the same bits, and compute capability 8.0 has no e4m3."""
    b_bits = tl.load(p_numbers, mask=m_numbers, other=0).to(tl.uint16)
    b_x = (((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((b_bits & 0x7F) == 0x7F, float("nan"), b_x)


@triton.jit
def _load_magnitude(p_records, m_n, AT: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of this dtype, [BLOCK_N] float32; from bytes they may lie at odd addresses."""
    if p_records.dtype.element_ty != tl.uint8:
        b_x = tl.load(p_records + AT, mask=m_n, other=0.0)
    elif tl.float32 == DTYPE:
        b_bits = tl.load(p_records + AT, mask=m_n, other=0).to(tl.uint32)
        for i in tl.static_range(1, 4):
            b_bits |= tl.load(p_records + (AT + i), mask=m_n, other=0).to(tl.uint32) << (8 * i)
        b_x = b_bits.to(tl.float32, bitcast=True)
    else:
        b_low = tl.load(p_records + AT, mask=m_n, other=0).to(tl.uint16)
        b_high = tl.load(p_records + (AT + 1), mask=m_n, other=0).to(tl.uint16)
        b_x = (b_low | (b_high << 8)).to(DTYPE, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def _load_by_token(p_vectors, m_n, VECTORS: tl.constexpr, ROOM: tl.constexpr, BLOCK_N: tl.constexpr):
    """See `_load`: a group's bytes are loaded once."""
    NUM_BITS: tl.constexpr = 8 if VECTORS.levels == 256 else (4 if VECTORS.levels == 16 else 2)
    PER_BYTE: tl.constexpr = 8 // NUM_BITS
    o_group = tl.arange(0, ROOM.groups)
    m_group = m_n[:, None] & (o_group < VECTORS.size // ROOM.channels)[None, :]
    p_group = p_vectors[:, None] + (o_group * (4 + ROOM.channels // PER_BYTE))[None, :]
    b_low = _load_half(p_group, m_group)  # [BLOCK_N, groups]
    b_step = _load_half(p_group + 2, m_group)
    o_byte = tl.arange(0, ROOM.block // PER_BYTE)[None, None, :]
    m_byte = m_group[:, :, None] & (o_byte < ROOM.channels // PER_BYTE)
    b_codes = tl.load(p_group[:, :, None] + 4 + o_byte, mask=m_byte, other=0).to(tl.int32)
    if NUM_BITS < 8:
        o_shift = (tl.arange(0, PER_BYTE) * NUM_BITS)[None, None, None, :]
        b_codes = (b_codes[:, :, :, None] >> o_shift) & (VECTORS.levels - 1)
        b_codes = tl.reshape(b_codes, [BLOCK_N, ROOM.groups, ROOM.block])
    b_x = b_codes.to(tl.float32) * b_step[:, :, None] + b_low[:, :, None]
    return tl.reshape(b_x, [BLOCK_N, ROOM.groups * ROOM.block])


@triton.jit
def _load_by_channel(p_tile, o_token, m_n, o_dim, m_dim, VECTORS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """See `_load`: all entries of a tile share minima and steps."""
    NUM_BITS: tl.constexpr = 4 if VECTORS.levels == 16 else 2
    PER_BYTE: tl.constexpr = 8 // NUM_BITS
    p_channel = p_tile + VECTORS.low + o_dim * (4 + GROUP_SIZE // PER_BYTE)
    b_low = _load_half(p_channel, m_dim)  # [BLOCK_D]
    b_step = _load_half(p_channel + 2, m_dim)
    p_codes = p_channel[None, :] + (4 + o_token // PER_BYTE)[:, None]
    b_codes = tl.load(p_codes, mask=m_n[:, None] & m_dim[None, :], other=0).to(tl.int32)
    b_codes = (b_codes >> (o_token % PER_BYTE * NUM_BITS)[:, None]) & (VECTORS.levels - 1)
    return b_codes.to(tl.float32) * b_step[None, :] + b_low[None, :]


@triton.jit
def _load_clipped(p_records, m_n, o_dim, m_dim, VECTORS: tl.constexpr):
    """See `_load`."""
    m_x = m_n[:, None] & m_dim[None, :]
    p_low = p_records[:, None] + (VECTORS.low + o_dim // VECTORS.channels)[None, :]
    b_low = _load_float8(p_low, m_x)
    b_step = _load_float8(p_low + (VECTORS.steps - VECTORS.low), m_x)
    PER_BYTE: tl.constexpr = 4 if VECTORS.levels == 4 else 5
    p_codes = p_records[:, None] + (VECTORS.codes + o_dim // PER_BYTE)[None, :]
    b_codes = tl.load(p_codes, mask=m_x, other=0).to(tl.int32)
    o_digit = o_dim % PER_BYTE
    b_weight = tl.full(o_digit.shape, 1, tl.int32)
    for i in tl.static_range(1, PER_BYTE):
        b_weight = tl.where(o_digit >= i, b_weight * VECTORS.levels, b_weight)
    b_codes = b_codes // b_weight[None, :] % VECTORS.levels
    return b_codes.to(tl.float32) * b_step + b_low


@triton.jit
def _load_halves(p_tile, o_token, m_n, o_dim, m_dim, VECTORS: tl.constexpr):
    """See `_load`."""
    m_x = m_n[:, None] & m_dim[None, :]
    if VECTORS.kind == _HALVES_BY_TOKEN:
        NUM_GROUPS: tl.constexpr = VECTORS.size // VECTORS.channels
        o_group = o_token[:, None] * NUM_GROUPS + (o_dim // VECTORS.channels)[None, :]
        b_low = _load_half(p_tile + VECTORS.low + 2 * o_group, m_x)
        b_step = _load_half(p_tile + VECTORS.steps + 2 * o_group, m_x)
    else:
        b_low = _load_half(p_tile + VECTORS.low + 2 * o_dim, m_dim)[None, :]
        b_step = _load_half(p_tile + VECTORS.steps + 2 * o_dim, m_dim)[None, :]
    o_codes = (o_token % 8 * VECTORS.size)[:, None] + o_dim[None, :]
    o_shift = (o_token // 8 * 4)[:, None]
    b_codes = (tl.load(p_tile + VECTORS.codes + o_codes, mask=m_x, other=0).to(tl.int32) >> o_shift) & 15
    if VECTORS.more >= 0:
        b_more = (tl.load(p_tile + VECTORS.more + o_codes, mask=m_x, other=0).to(tl.int32) >> o_shift) & 15
        b_codes = b_codes * 16 + b_more - 8
        b_step *= 0.0625
    return b_codes.to(tl.float32) * b_step + b_low


@triton.jit
def _load(
    p_records,  # of each entry, [BLOCK_N]
    p_tile,  # of all, where several have one
    o_token,  # place of each in its record
    m_n,
    o_dim,  # channels, [BLOCK_D]
    m_dim,
    VECTORS: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Vectors of entries, [BLOCK_N, BLOCK_D] of the dtype."""
    if VECTORS.kind == _ELEMENTS:
        p_x = p_records[:, None] + (VECTORS.low + o_dim)[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_dim[None, :], other=0.0)
    elif VECTORS.kind == _FLOAT8:
        b_x = _load_float8(p_records[:, None] + (VECTORS.low + o_dim)[None, :], m_n[:, None] & m_dim[None, :])
    elif VECTORS.kind == _BY_TOKEN:
        b_x = _load_by_token(p_records + VECTORS.low + o_token * VECTORS.token_bytes, m_n, VECTORS, ROOM, BLOCK_N)
    elif VECTORS.kind == _BY_CHANNEL:
        b_x = _load_by_channel(p_tile, o_token, m_n, o_dim, m_dim, VECTORS, GROUP_SIZE)
    elif VECTORS.kind == _CLIPPED:
        b_x = _load_clipped(p_records, m_n, o_dim, m_dim, VECTORS)
    else:
        b_x = _load_halves(p_tile, o_token, m_n, o_dim, m_dim, VECTORS)
    if VECTORS.magnitude >= 0:
        b_x = b_x.to(tl.float32)
        b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=1))
        b_length = _load_magnitude(p_records, m_n, VECTORS.magnitude, DTYPE)
        b_times = tl.where(b_length < 0, 1.0, b_length / tl.where(b_norm > 0, b_norm, 1.0))
        b_x = b_x * b_times[:, None]
    return b_x.to(DTYPE)


@triton.jit
def _channels(ROOM: tl.constexpr, SIZE: tl.constexpr):
    """Channel in each place of a program, and whether there is one."""
    o_d = tl.arange(0, ROOM.groups * ROOM.block)
    o_dim = o_d // ROOM.block * ROOM.channels + o_d % ROOM.block
    return o_dim, (o_d % ROOM.block < ROOM.channels) & (o_dim < SIZE)


@triton.jit
def _part_kernel(
    queries_ptr,  # [S, G, D]
    pages_ptr,  # [num_pages, width] uint8, or of the queries' dtype where entries are elements
    tables_ptr,  # [S, columns]
    lengths_ptr,  # [S]
    key_channels_ptr,  # [S, Dk]
    value_channels_ptr,  # [S, Dv]
    out_ptr,  # [S, shares of all parts, G, D] float32, zeros where not all channels are stored
    lse_ptr,  # [S, shares of all parts, G] float32
    stride_pages_page,
    stride_tables_row,
    scale,
    KEYS: tl.constexpr,  # bytes counted in elements where entries are
    VALUES: tl.constexpr,
    RECORD: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SKIPS_RETAINED: tl.constexpr,
    KEY_ROOM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    PICKS_KEYS: tl.constexpr,  # channels are given
    PICKS_VALUES: tl.constexpr,
    FIRST: tl.constexpr,
    PER_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST_SHARE: tl.constexpr,  # of those of all parts
    NUM_SHARES: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a tile lies in one record, where that has several entries
):
    DTYPE: tl.constexpr = queries_ptr.dtype.element_ty
    i_seq = tl.program_id(0).to(tl.int64)
    i_share = tl.program_id(1)
    length = tl.load(lengths_ptr + i_seq)
    size = tl.cdiv(tl.cdiv(length - FIRST, SHARES), BLOCK_N) * BLOCK_N
    begin = FIRST + i_share * size
    end = tl.minimum(begin + size, length)
    o_key, m_key = _channels(KEY_ROOM, KEYS.size)
    o_value, m_value = _channels(VALUE_ROOM, VALUES.size)
    o_query, o_result = o_key, o_value
    if PICKS_KEYS:
        o_query = tl.load(key_channels_ptr + i_seq * KEYS.size + o_key, mask=m_key, other=0).to(tl.int32)
    if PICKS_VALUES:
        o_result = tl.load(value_channels_ptr + i_seq * VALUES.size + o_value, mask=m_value, other=0).to(tl.int32)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP
    p_q = queries_ptr + i_seq * GROUP * HEAD_DIM + o_m[:, None] * HEAD_DIM + o_query[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_key[None, :], other=0.0)  # [BLOCK_M, BLOCK_D of keys]

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, VALUE_ROOM.groups * VALUE_ROOM.block], tl.float32)
    for first in range(begin, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if GROUP_SIZE == 1:
            o_token = tl.zeros([BLOCK_N], tl.int32)
            b_page = tl.load(tables_ptr + i_seq * stride_tables_row + o_n // PER_PAGE, mask=m_n, other=0).to(tl.int64)
            p_records = pages_ptr + b_page * stride_pages_page + o_n % PER_PAGE * RECORD
            p_tile = pages_ptr
        else:
            o_token = o_n % GROUP_SIZE
            i_record = first // GROUP_SIZE
            i_page = tl.load(tables_ptr + i_seq * stride_tables_row + i_record // PER_PAGE).to(tl.int64)
            p_tile = pages_ptr + i_page * stride_pages_page + i_record % PER_PAGE * RECORD
            p_records = p_tile + tl.zeros([BLOCK_N], tl.int32)
        b_k = _load(p_records, p_tile, o_token, m_n, o_key, m_key, KEYS, KEY_ROOM, GROUP_SIZE, DTYPE, BLOCK_N)
        b_v = _load(p_records, p_tile, o_token, m_n, o_value, m_value, VALUES, VALUE_ROOM, GROUP_SIZE, DTYPE, BLOCK_N)
        if SKIPS_RETAINED:
            m_n = m_n & (_load_magnitude(p_records, m_n, VALUES.magnitude, DTYPE) >= 0)
        b_l = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        b_l = tl.where(m_n[None, :], b_l, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, axis=1))
        b_from = tl.where(b_new > float("-inf"), b_new, 0.0)  # a tile may have none that is there
        b_p = tl.exp(b_l - b_from[:, None])
        b_old = tl.exp(b_max - b_from)
        b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
        b_out = b_out * b_old[:, None] + tl.dot(b_p.to(DTYPE), b_v, input_precision="ieee")
        b_max = b_new

    b_whole = tl.where(b_sum > 0, b_sum, 1.0)
    i_out = (i_seq * NUM_SHARES + FIRST_SHARE + i_share) * GROUP
    tl.store(lse_ptr + i_out + o_m, tl.where(b_sum > 0, b_max + tl.log(b_whole), float("-inf")), mask=m_m)
    p_out = out_ptr + i_out * HEAD_DIM + o_m[:, None] * HEAD_DIM + o_result[None, :]
    tl.store(p_out, b_out / b_whole[:, None], mask=m_m[:, None] & m_value[None, :])


@triton.jit
def _merge_kernel(
    parts_ptr,  # [S, SHARES, G, D] float32
    lse_ptr,  # [S, SHARES, G] float32
    out_ptr,  # [S, G, D]
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < SHARES
    o_row = (i_seq * SHARES + o_s) * GROUP + i_head
    b_lse = tl.load(lse_ptr + o_row, mask=m_s, other=float("-inf"))  # -inf where a share has no entries, too
    b_weight = tl.exp(b_lse - tl.max(b_lse, axis=0))
    p_parts = parts_ptr + o_row[:, None] * HEAD_DIM + o_d[None, :]
    b_parts = tl.load(p_parts, mask=m_s[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
    b_out = tl.sum(b_parts * b_weight[:, None], axis=0) / tl.sum(b_weight, axis=0)
    p_out = out_ptr + (i_seq * GROUP + i_head) * HEAD_DIM + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=o_d < HEAD_DIM)


def encoded_attention_triton(queries: torch.Tensor, parts: Sequence["PagedEntries"], scale: float) -> torch.Tensor:
    """See `encoded_attention`; arguments are taken as checked."""
    num_sequences, group, head_dim = queries.shape
    queries, out = queries.contiguous(), torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    num_shares, made = len(parts) * _SHARES, {"dtype": torch.float32, "device": queries.device}
    all_channels = all(part.form.values.size == head_dim for part in parts)
    found = (torch.empty if all_channels else torch.zeros)(num_sequences, num_shares, group, head_dim, **made)
    lse = torch.empty(num_sequences, num_shares, group, **made)
    for number, part in enumerate(parts):
        _attend(queries, part, scale, found, lse, number * _SHARES)
    _merge_kernel[(num_sequences, group)](
        found,
        lse,
        out,
        GROUP=group,
        HEAD_DIM=head_dim,
        SHARES=num_shares,
        BLOCK_S=triton.next_power_of_2(num_shares),
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
    return out


def _attend(
    queries: torch.Tensor, part: "PagedEntries", scale: float, found: torch.Tensor, lse: torch.Tensor, first_share: int
) -> None:
    """Write a part's shares, from this one on, of [S, shares of all parts, G, D] and [S, shares of all parts, G]."""
    num_sequences, group, head_dim = queries.shape
    pages, form = part.pages, part.form
    if form.keys.kind == Kind.ELEMENTS:
        pages, form = pages.view(queries.dtype), _in_elements(form, queries.element_size())
    rooms = [_room(vectors) for vectors in (form.keys, form.values)]
    block_n, num_warps = _SETTINGS[queries.element_size()][max(room.block * room.groups for room in rooms)]
    tables = part.tables.contiguous()
    _part_kernel[(num_sequences, _SHARES)](
        queries,
        pages,
        tables,
        part.lengths.contiguous(),
        queries if part.key_channels is None else part.key_channels.contiguous(),
        queries if part.value_channels is None else part.value_channels.contiguous(),
        found,
        lse,
        pages.stride(0),
        tables.stride(0),
        scale,
        KEYS=form.keys,
        VALUES=form.values,
        RECORD=form.num_bytes,
        GROUP_SIZE=form.group_size,
        SKIPS_RETAINED=form.skips_retained,
        KEY_ROOM=rooms[0],
        VALUE_ROOM=rooms[1],
        PICKS_KEYS=part.key_channels is not None,
        PICKS_VALUES=part.value_channels is not None,
        FIRST=part.first,
        PER_PAGE=pages.shape[1] // form.num_bytes,
        GROUP=group,
        HEAD_DIM=head_dim,
        FIRST_SHARE=first_share,
        NUM_SHARES=found.shape[1],
        SHARES=_SHARES,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=block_n if form.group_size == 1 else _RECORD_TILE,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def _room(vectors: Vectors) -> _Room:
    """Where groups are loaded at once, they are padded each; a product takes 16 channels or more."""
    channels = vectors.channels if vectors.kind == Kind.BY_TOKEN else vectors.size
    groups = triton.next_power_of_2(vectors.size // channels)
    return _Room(max(16 // groups, triton.next_power_of_2(channels)), channels, groups)


def _in_elements(form: Form, itemsize: int) -> Form:
    """The same, bytes counted in elements."""

    def of(vectors: Vectors) -> Vectors:
        magnitude = vectors.magnitude // itemsize if vectors.magnitude >= 0 else -1
        return vectors._replace(low=vectors.low // itemsize, magnitude=magnitude)

    return form._replace(num_bytes=form.num_bytes // itemsize, keys=of(form.keys), values=of(form.values))
