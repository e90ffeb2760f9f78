"""Triton form of `column_sums`: each program owns some keys and goes over the rows that see them, so nothing is added
up by atomics and equal inputs give equal bits.

Work beside attention's own, half of whose products these are: one product of queries and keys with `lse` from
attention, two without.
"""

import torch
import triton
import triton.language as tl

# Element size, bytes -> padded head_dim -> keys of a tile, rows of a tile, warps, pipeline stages.
_SETTINGS = {
    2: {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    4: {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 1)},
}


@triton.jit
def _load(p_rows, o_d, m_rows, stride_dim, HEAD_DIM: tl.constexpr):
    """Elements o_d of rows, [BLOCK, D]; 0 where masked."""
    mask = m_rows[:, None] & (o_d < HEAD_DIM)[None, :]
    return tl.load(p_rows[:, None] + o_d[None, :] * stride_dim, mask=mask, other=0.0)


@triton.jit
def _row_sums_kernel(
    queries_ptr,  # [n, Hq, D]
    keys_ptr,  # [H, N, D]
    first_ptr,  # [] int64
    maxima_ptr,  # [n, Hq] float32
    sums_ptr,  # [n, Hq] float32
    stride_queries_row,
    stride_queries_head,
    stride_queries_dim,
    stride_keys_head,
    stride_keys_key,
    stride_keys_dim,
    stride_sums_row,
    stride_sums_head,
    start,
    num_rows,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    low = tl.program_id(1) * BLOCK_M
    if low + BLOCK_M <= tl.load(first_ptr):
        return  # rows of no weight
    o_m = (low + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_m = o_m < num_rows
    o_d = tl.arange(0, BLOCK_D)
    p_q = queries_ptr + i_head * stride_queries_head + o_m * stride_queries_row
    b_q = _load(p_q, o_d, m_m, stride_queries_dim, HEAD_DIM)  # [BLOCK_M, D]
    p_keys = keys_ptr + i_head // GROUP * stride_keys_head

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    num_seen = start + tl.minimum(low + BLOCK_M, num_rows)
    for first_key in range(0, num_seen, BLOCK_N):
        o_n = (first_key + tl.arange(0, BLOCK_N)).to(tl.int64)
        b_k = _load(p_keys + o_n * stride_keys_key, o_d, o_n < num_seen, stride_keys_dim, HEAD_DIM)  # [BLOCK_N, D]
        b_l = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        b_l = tl.where(o_n[None, :] <= start + o_m[:, None], b_l, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, axis=1))  # finite: every row sees key 0
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_l - b_new[:, None]), axis=1)
        b_max = b_new

    o_sum = o_m * stride_sums_row + i_head * stride_sums_head
    tl.store(maxima_ptr + o_sum, b_max, mask=m_m)
    tl.store(sums_ptr + o_sum, b_sum, mask=m_m)


@triton.jit
def _column_sums_kernel(
    queries_ptr,  # [n, Hq, D]
    keys_ptr,  # [H, N, D]
    first_ptr,  # [] int64
    weights_ptr,  # [n] float32
    maxima_ptr,  # [n, Hq] float32
    sums_ptr,  # [n, Hq] float32
    out_ptr,  # [H, N] float32
    stride_queries_row,
    stride_queries_head,
    stride_queries_dim,
    stride_keys_head,
    stride_keys_key,
    stride_keys_dim,
    stride_sums_row,
    stride_sums_head,
    start,
    num_rows,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)  # KV head
    low = tl.program_id(1) * BLOCK_N
    num_keys = start + num_rows
    o_n = (low + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < num_keys
    o_d = tl.arange(0, BLOCK_D)
    p_k = keys_ptr + i_head * stride_keys_head + o_n * stride_keys_key
    b_k = _load(p_k, o_d, m_n, stride_keys_dim, HEAD_DIM)  # [BLOCK_N, D]

    first = tl.load(first_ptr)
    first_tile = tl.maximum(first, low - start) // BLOCK_M  # the first with a row that counts and sees a key of these
    num_tiles = tl.maximum(tl.cdiv(num_rows, BLOCK_M) - first_tile, 0)
    b_out = tl.zeros([BLOCK_N], tl.float32)
    for i in range(GROUP * num_tiles):  # heads and tiles of rows in one loop, which is what gets pipelined
        i_query_head = i_head * GROUP + i // num_tiles
        o_m = (first_tile + i % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = (o_m >= first) & (o_m < num_rows)
        p_q = queries_ptr + i_query_head * stride_queries_head + o_m * stride_queries_row
        b_q = _load(p_q, o_d, m_m, stride_queries_dim, HEAD_DIM)  # [BLOCK_M, D]
        o_sum = o_m * stride_sums_row + i_query_head * stride_sums_head
        b_max = tl.load(maxima_ptr + o_sum, mask=m_m, other=0.0)  # [BLOCK_M]
        b_weight = tl.load(weights_ptr + o_m, mask=m_m, other=0.0)
        b_weight = b_weight / tl.load(sums_ptr + o_sum, mask=m_m, other=1.0)
        b_l = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        b_l = tl.where(o_n[:, None] <= start + o_m[None, :], b_l, float("-inf"))
        b_out += tl.sum(tl.exp(b_l - b_max[None, :]) * b_weight[None, :], axis=1)
    tl.store(out_ptr + i_head * num_keys + o_n, b_out, mask=m_n)


def column_sums_triton(
    queries: torch.Tensor,
    keys: torch.Tensor,
    start: int,
    weights: torch.Tensor,
    first: torch.Tensor,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """See `column_sums`; arguments are taken as checked, `first` is the first row that counts, [] int64.

    Raises:
        ValueError: dtypes differ or head_dim is larger than the table has.
    """
    num_rows, num_query_heads, head_dim = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    if queries.dtype != keys.dtype:
        raise ValueError(f"impl='triton' needs queries and keys of one dtype; got {queries.dtype} and {keys.dtype}")
    block_d = max(16, triton.next_power_of_2(head_dim))
    table = _SETTINGS[keys.element_size()]
    if block_d not in table:
        raise ValueError(f"impl='triton' handles head_dim up to {max(table)}; got {head_dim}: use impl='reference'")
    block_n, block_m, num_warps, num_stages = table[block_d]
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    sizes = {"GROUP": num_query_heads // num_kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n}

    if lse is None:
        maxima = queries.new_empty(num_query_heads, num_rows, dtype=torch.float32).t()
        sums = torch.empty_like(maxima)
    else:
        maxima, sums = lse, torch.ones_like(lse)
    assert maxima.stride() == sums.stride()
    strides = (*queries.stride(), *keys.stride(), *maxima.stride())
    if lse is None:
        _row_sums_kernel[(num_query_heads, triton.cdiv(num_rows, block_m))](
            queries, keys, first, maxima, sums, *strides, start, num_rows, **sizes, **tiles, **options
        )
    out = keys.new_empty(num_kv_heads, num_keys, dtype=torch.float32)
    _column_sums_kernel[(num_kv_heads, triton.cdiv(num_keys, block_n))](
        queries, keys, first, weights, maxima, sums, out, *strides, start, num_rows, **sizes, **tiles, **options
    )
    return out
