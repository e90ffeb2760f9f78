"""Triton form of `window_scores`: keys are read from their pages.

What a key costs in bytes, with W window queries, G query heads per KV head, head_dim D and elements of two bytes; in
brackets for W 8, G 4, D 128:

- votes: the key, 2D [256], and a float32 vote per query head, 4G [16];
- pooling: these votes again and the score, 4G + 4 [20]; with value norms the value, 2D;
- row sums, where attention's log-sum-exp is not given: the key once more, 2D [256].

That is 1.14 times the key with `lse` and 2.14 times without, less where the L2 cache has the key still. Logits kept
from the first reading would spare the second, but to write and to read them is 8WG [256]: no less than the key, four
times as much with a window of 32, and memory the engine has not planned for.
"""

import torch
import triton
import triton.language as tl

_SPLITS = 32  # of a request's keys; fixed, so that the order of summation depends on nothing but its own length
# Element size, bytes -> most columns of a product: query heads times window. More heads read the keys again.
_COLUMNS = {2: 128, 4: 32}
# Element size, bytes -> padded head_dim -> keys of a tile, warps, pipeline stages.
_SETTINGS = {
    2: {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 8, 2)},
    4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 8, 1)},
}
_POOL_BLOCK = 128


@triton.jit
def _place(num_kv_heads, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Request, KV head and first query head of the group of a program on axis 0."""
    i_program = tl.program_id(0).to(tl.int64)
    head_blocks = tl.cdiv(GROUP, HEADS)
    i_row = i_program // head_blocks
    return i_row // num_kv_heads, i_row % num_kv_heads, i_program % head_blocks * HEADS


@triton.jit
def _columns(
    i_kv_head, first_head, GROUP: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Window query and query head of each column of a product, head after head, and which columns have one."""
    o_c = tl.arange(0, HEADS * BLOCK_W)
    o_w, o_g = o_c % BLOCK_W, first_head + o_c // BLOCK_W
    return o_w, i_kv_head * GROUP + o_g, (o_w < WINDOW) & (o_g < GROUP)


@triton.jit
def _split_size(num_keys, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of one split, in whole tiles."""
    return tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def _split(num_keys, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of this program's split and the one after its last."""
    size = _split_size(num_keys, SPLITS, BLOCK_N)
    low = tl.program_id(1) * size
    return low, tl.minimum(low + size, num_keys)


@triton.jit
def _load_entries(p_pages, p_table, o_n, m_n, o_d, m_d, stride_page, stride_entry, stride_dim, block_size):
    """Elements o_d of entries o_n, [BLOCK_N, D]; 0 where masked."""
    i_page = tl.load(p_table + o_n // block_size, mask=m_n, other=0).to(tl.int64)
    p_entry = p_pages + i_page * stride_page + (o_n % block_size).to(tl.int64) * stride_entry
    return tl.load(p_entry[:, None] + o_d[None, :] * stride_dim, mask=m_n[:, None] & m_d[None, :], other=0.0)


@triton.jit
def _row_sums_kernel(
    queries_ptr,  # [R, W, Hq, D]
    pages_ptr,  # [num_pages, block_size, D or 2D]
    tables_ptr,  # [R, H, max_pages]
    num_keys_ptr,  # [R]
    maxima_ptr,  # [R, Hq, W, SPLITS] float32
    sums_ptr,  # [R, Hq, W, SPLITS] float32
    stride_pages_page,
    stride_pages_entry,
    stride_pages_dim,
    num_kv_heads,
    block_size,
    max_pages,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    i_request, i_kv_head, first_head = _place(num_kv_heads, GROUP, HEADS)
    num_keys = tl.load(num_keys_ptr + i_request)
    low, high = _split(num_keys, SPLITS, BLOCK_N)
    if low >= high:
        return
    o_w, o_head, m_c = _columns(i_kv_head, first_head, GROUP, WINDOW, HEADS, BLOCK_W)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_q = queries_ptr + ((i_request * WINDOW + o_w) * num_kv_heads * GROUP + o_head) * HEAD_DIM
    b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_d[:, None] & m_c[None, :], other=0.0)  # [D, COLUMNS]
    p_table = tables_ptr + (i_request * num_kv_heads + i_kv_head) * max_pages
    o_last = num_keys - WINDOW + tl.minimum(o_w, WINDOW - 1)  # the last key a query sees
    b_max = tl.full([HEADS * BLOCK_W], float("-inf"), tl.float32)
    b_sum = tl.zeros([HEADS * BLOCK_W], tl.float32)
    for start in range(low, high, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = _load_entries(
            pages_ptr,
            p_table,
            o_n,
            o_n < num_keys,
            o_d,
            m_d,
            stride_pages_page,
            stride_pages_entry,
            stride_pages_dim,
            block_size,
        )
        b_l = tl.dot(b_k, b_q, input_precision="ieee")  # [BLOCK_N, COLUMNS]
        b_l = tl.where(o_n[:, None] <= o_last[None, :], b_l, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, axis=0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_base) + tl.sum(tl.exp(b_l - b_base[None, :]), axis=0)
        b_max = b_new

    o_part = ((i_request * num_kv_heads * GROUP + o_head) * WINDOW + o_w) * SPLITS + tl.program_id(1)
    tl.store(maxima_ptr + o_part, b_max, mask=m_c)
    tl.store(sums_ptr + o_part, b_sum, mask=m_c)


@triton.jit
def _votes_kernel(
    queries_ptr,  # [R, W, Hq, D]
    pages_ptr,  # [num_pages, block_size, D or 2D]
    tables_ptr,  # [R, H, max_pages]
    num_keys_ptr,  # [R]
    maxima_ptr,  # [R, Hq, W, PARTS] float32
    sums_ptr,  # [R, Hq, W, PARTS] float32
    weights_ptr,  # [W] float32
    votes_ptr,  # [R, Hq, max_num_keys] float32
    stride_pages_page,
    stride_pages_entry,
    stride_pages_dim,
    num_kv_heads,
    block_size,
    max_pages,
    max_num_keys,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    i_request, i_kv_head, first_head = _place(num_kv_heads, GROUP, HEADS)
    num_keys = tl.load(num_keys_ptr + i_request)
    num_scored = num_keys - WINDOW
    low, high = _split(num_scored, SPLITS, BLOCK_N)
    if low >= high:
        return
    o_w, o_head, m_c = _columns(i_kv_head, first_head, GROUP, WINDOW, HEADS, BLOCK_W)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_q = queries_ptr + ((i_request * WINDOW + o_w) * num_kv_heads * GROUP + o_head) * HEAD_DIM
    b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_d[:, None] & m_c[None, :], other=0.0)  # [D, COLUMNS]
    o_part = ((i_request * num_kv_heads * GROUP + o_head) * WINDOW + o_w) * PARTS
    o_part = o_part[:, None] + tl.arange(0, PARTS)[None, :]
    m_part = tl.arange(0, PARTS) * _split_size(num_keys, SPLITS, BLOCK_N) < num_keys  # splits that hold keys
    b_maxima = tl.load(maxima_ptr + o_part, mask=m_c[:, None] & m_part[None, :], other=float("-inf"))
    b_maxima = tl.where(m_c[:, None], b_maxima, 0.0)  # [COLUMNS, PARTS]
    b_sums = tl.load(sums_ptr + o_part, mask=m_c[:, None] & m_part[None, :], other=1.0)
    b_max = tl.max(b_maxima, axis=1)
    b_sum = tl.sum(b_sums * tl.exp(b_maxima - b_max[:, None]), axis=1)
    b_factor = tl.load(weights_ptr + o_w, mask=m_c, other=0.0) / b_sum

    p_table = tables_ptr + (i_request * num_kv_heads + i_kv_head) * max_pages
    o_h = first_head + tl.arange(0, HEADS)
    p_votes = votes_ptr + ((i_request * num_kv_heads + i_kv_head) * GROUP + o_h) * max_num_keys
    for start in range(low, high, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < num_scored
        b_k = _load_entries(
            pages_ptr, p_table, o_n, m_n, o_d, m_d, stride_pages_page, stride_pages_entry, stride_pages_dim, block_size
        )
        b_l = tl.dot(b_k, b_q, input_precision="ieee")  # [BLOCK_N, COLUMNS]
        b_p = tl.exp(b_l - b_max[None, :]) * b_factor[None, :]
        b_votes = tl.sum(tl.reshape(b_p, [BLOCK_N, HEADS, BLOCK_W]), axis=2)  # [BLOCK_N, HEADS]
        tl.store(p_votes[None, :] + o_n[:, None], b_votes, mask=m_n[:, None] & (o_h < GROUP)[None, :])


@triton.jit
def _pool_kernel(
    votes_ptr,  # [R, Hq, max_num_keys] float32
    pages_ptr,  # [num_pages, block_size, D or 2D]
    tables_ptr,  # [R, H, max_pages]
    num_keys_ptr,  # [R]
    scores_ptr,  # [R, H, max_num_keys] float32
    stride_pages_page,
    stride_pages_entry,
    stride_pages_dim,
    num_kv_heads,
    block_size,
    max_pages,
    max_num_keys,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    MAX_POOLING: tl.constexpr,
    VALUE_NORMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # request and KV head
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_keys = tl.load(num_keys_ptr + i_row // num_kv_heads)
    num_scored = num_keys - WINDOW
    outside = float("-inf") if MAX_POOLING else 0.0
    b_scores = tl.zeros([BLOCK_N], tl.float32)
    for g in range(GROUP):
        p_votes = votes_ptr + (i_row * GROUP + g) * max_num_keys
        b_pooled = tl.full([BLOCK_N], outside, tl.float32)
        for tap in range(KERNEL_SIZE):
            o_tap = o_n + tap - KERNEL_SIZE // 2
            b_votes = tl.load(p_votes + o_tap, mask=(o_tap >= 0) & (o_tap < num_scored), other=outside)
            b_pooled = tl.maximum(b_pooled, b_votes) if MAX_POOLING else b_pooled + b_votes
        b_scores += b_pooled if MAX_POOLING else b_pooled / KERNEL_SIZE
    if VALUE_NORMS:
        p_values = pages_ptr + HEAD_DIM * stride_pages_dim
        o_d = tl.arange(0, BLOCK_D)
        m_n, m_d = o_n < num_scored, o_d < HEAD_DIM
        p_table = tables_ptr + i_row * max_pages
        b_v = _load_entries(
            p_values, p_table, o_n, m_n, o_d, m_d, stride_pages_page, stride_pages_entry, stride_pages_dim, block_size
        )
        b_scores *= tl.sum(tl.abs(b_v.to(tl.float32)), axis=1)
    b_scores = tl.where(o_n < num_scored, b_scores, tl.where(o_n < num_keys, float("inf"), float("-inf")))
    tl.store(scores_ptr + i_row * max_num_keys + o_n, b_scores, mask=o_n < max_num_keys)


def window_scores_triton(
    queries: torch.Tensor,
    pages: torch.Tensor,
    page_tables: torch.Tensor,
    num_keys: torch.Tensor,
    weights: torch.Tensor,
    lse: torch.Tensor | None,
    scores: torch.Tensor,
    *,
    kernel_size: int,
    pooling: str,
    value_norms: bool,
) -> None:
    """See `paged_window_scores`; `scores` [R, H, max_num_keys] is written, other arguments are taken as checked.

    `pages` without values, [num_pages, block_size, D], do where no norms are asked for.

    Raises:
        ValueError: dtypes differ, or the window or head_dim is larger than the tables allow.
    """
    num_requests, window, num_query_heads, head_dim = queries.shape
    _, num_kv_heads, max_num_keys = scores.shape
    group = num_query_heads // num_kv_heads
    if queries.dtype != pages.dtype:
        raise ValueError(f"impl='triton' needs queries and keys of one dtype; got {queries.dtype} and {pages.dtype}")
    columns = _COLUMNS[pages.element_size()]
    if window > columns or head_dim > 256:
        raise ValueError(
            f"impl='triton' handles windows up to {columns} in {pages.dtype} and head_dim up to 256; got {window} and "
            f"{head_dim}: use impl='reference'"
        )
    block_d, block_w = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(window)
    heads = min(triton.next_power_of_2(group), columns // block_w)
    heads = max(heads, 16 // block_w)  # a product has at least 16 columns
    block_n, num_warps, num_stages = _SETTINGS[pages.element_size()][block_d]
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    queries, page_tables = queries.contiguous(), page_tables.contiguous()
    cache = (*pages.stride(), num_kv_heads, pages.shape[1], page_tables.shape[2])
    sizes = {"GROUP": group, "WINDOW": window, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    tiles = {"HEADS": heads, "BLOCK_W": block_w, "BLOCK_N": block_n, "SPLITS": _SPLITS}
    inputs = (queries, pages, page_tables, num_keys)
    grid = (num_requests * num_kv_heads * triton.cdiv(group, heads), _SPLITS)

    if lse is None:
        maxima = queries.new_empty(num_requests, num_query_heads, window, _SPLITS, dtype=torch.float32)
        sums = torch.empty_like(maxima)
        _row_sums_kernel[grid](*inputs, maxima, sums, *cache, **sizes, **tiles, **options)
    else:
        maxima = lse.transpose(1, 2).unsqueeze(3).contiguous()
        sums = torch.ones_like(maxima)
    votes = queries.new_empty(num_requests, num_query_heads, max_num_keys, dtype=torch.float32)
    rows = (maxima, sums, weights, votes)
    _votes_kernel[grid](*inputs, *rows, *cache, max_num_keys, **sizes, **tiles, PARTS=maxima.shape[3], **options)
    _pool_kernel[(num_requests * num_kv_heads, triton.cdiv(max_num_keys, _POOL_BLOCK))](
        votes,
        pages,
        page_tables,
        num_keys,
        scores,
        *cache,
        max_num_keys,
        **sizes,
        KERNEL_SIZE=kernel_size,
        MAX_POOLING=pooling == "max",
        VALUE_NORMS=value_norms,
        BLOCK_N=_POOL_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
