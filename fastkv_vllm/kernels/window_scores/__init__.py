"""Attention of a prompt's last queries to all of its keys, pooled over positions, per KV head."""

import torch

from fastkv_vllm.kernels.implementations import choose
from fastkv_vllm.kernels.window_scores.reference import paged_window_scores_reference, window_scores_reference

POOLINGS = ("max", "avg")


def window_scores(
    queries: torch.Tensor, keys: torch.Tensor, *, kernel_size: int, pooling: str, impl: str | None = None
) -> torch.Tensor:
    """Rate each key by the attention it gets from the window's queries.

    s[h, j] = sum over the group of pool_j(sum over the window of softmax_j(q . k_j)), columns of the window cut
    after the softmax.

    Args:
        queries: roped queries times the softmax scale, [W, Hq, D], any float dtype; they are the last W tokens.
        keys: roped keys in order of position, [H, N, D], N > W, Hq a multiple of H.
        kernel_size: width of the pooling, odd, tokens; stride 1, same length.
        pooling: "max" or "avg" (an average counts padding, as torch does).
        impl: see `implementations.choose`.

    Returns:
        Scores [H, N], float32; the last W columns are +inf: window entries always stay.

    Raises:
        ValueError: shapes, kernel size, pooling or implementation do not fit.

    Source: FastKV (arXiv 2502.01068) and SnapKV (arXiv 2404.14469), scoring.
    """
    if queries.dim() != 3 or keys.dim() != 3 or queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"queries [W, Hq, D] and keys [H, N, D] must share D; got {list(queries.shape)}, {list(keys.shape)}"
        )
    _check_heads(queries.shape[1], keys.shape[0])
    if keys.shape[1] <= queries.shape[0]:
        raise ValueError(f"{keys.shape[1]} keys must be more than the window's {queries.shape[0]}")
    _check_pooling(kernel_size, pooling)
    if choose(impl, keys.device) == "reference":
        return window_scores_reference(queries, keys, kernel_size, pooling)
    from fastkv_vllm.kernels.window_scores.triton import window_scores_triton

    num_heads, num_keys, _ = keys.shape
    scores = keys.new_empty(1, num_heads, num_keys, dtype=torch.float32)
    window_scores_triton(
        queries.unsqueeze(0),
        keys,  # one page per head, as long as the text
        torch.arange(num_heads, dtype=torch.int32, device=keys.device).view(1, num_heads, 1),
        torch.full((1,), num_keys, dtype=torch.int32, device=keys.device),
        weights=torch.ones(queries.shape[0], device=keys.device),
        lse=None,
        scores=scores,
        kernel_size=kernel_size,
        pooling=pooling,
        value_norms=False,
    )
    return scores[0]


def paged_window_scores(
    queries: torch.Tensor,
    pages: torch.Tensor,
    page_tables: torch.Tensor,
    num_keys: torch.Tensor,
    *,
    max_num_keys: int,
    kernel_size: int,
    pooling: str,
    weights: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    value_norms: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """`window_scores` of several requests whose entries lie in pages.

    A query's probabilities count as much as its weight, and with `value_norms` scores are multiplied by |v_j|_1.

    Args:
        queries: roped queries times the softmax scale, [R, W, Hq, D], any float dtype: the last W tokens of each
            request.
        pages: keys and values, [num_pages, block_size, 2D], the key first in each entry. An engine's layer
            [num_blocks, H, block_size, 2D] seen as [num_blocks * H, block_size, 2D] has page block * H + head.
        page_tables: pages of each request and KV head in order of position, [R, H, max_pages] int32; only those that
            hold entries are read.
        num_keys: entries of each request, [R] int32, each in 0..max_num_keys.
        max_num_keys: columns of the result, at most max_pages * block_size.
        kernel_size, pooling, impl: as for `window_scores`.
        weights: of the window's queries, [W] float32, for example `age_weights`; all 1 if None.
        lse: log-sum-exp of each query's logits over the keys it sees, [R, W, Hq] float32, from attention; computed
            here if None, by reading the keys once more.
        value_norms: multiply by the L1 norm of the entry's value.

    Returns:
        Scores [R, H, max_num_keys], float32. Columns of a request's last W entries are +inf, those past its end -inf.

    Raises:
        ValueError: shapes, dtypes, kernel size, pooling or implementation do not fit.

    Source: as for `window_scores`; weights by age: A2SF (arXiv 2407.20485); value norms: VATP (arXiv 2406.12335).
    """
    if queries.dim() != 4 or pages.dim() != 3 or pages.shape[2] != 2 * queries.shape[3]:
        raise ValueError(
            "queries [R, W, Hq, D] and pages [num_pages, block_size, 2D] must share D; got "
            f"{list(queries.shape)}, {list(pages.shape)}"
        )
    num_requests, window, num_query_heads, _ = queries.shape
    if page_tables.dim() != 3 or page_tables.shape[0] != num_requests or page_tables.dtype != torch.int32:
        raise ValueError(
            f"page_tables must be [{num_requests}, H, max_pages] int32; got {list(page_tables.shape)} "
            f"{page_tables.dtype}"
        )
    num_heads, max_pages = page_tables.shape[1:]
    _check_heads(num_query_heads, num_heads)
    if not 0 <= max_num_keys <= max_pages * pages.shape[1]:
        raise ValueError(f"max_num_keys must be in 0..{max_pages * pages.shape[1]}; got {max_num_keys}")
    _check_shape("num_keys", num_keys, (num_requests,), torch.int32)
    if weights is None:
        weights = torch.ones(window, device=queries.device)
    _check_shape("weights", weights, (window,), torch.float32)
    if lse is not None:
        _check_shape("lse", lse, (num_requests, window, num_query_heads), torch.float32)
    _check_pooling(kernel_size, pooling)
    if choose(impl, pages.device) == "reference":
        run = paged_window_scores_reference
    else:
        from fastkv_vllm.kernels.window_scores.triton import window_scores_triton as run
    scores = pages.new_empty(num_requests, num_heads, max_num_keys, dtype=torch.float32)
    if scores.numel():
        run(
            queries,
            pages,
            page_tables,
            num_keys,
            weights=weights,
            lse=lse,
            scores=scores,
            kernel_size=kernel_size,
            pooling=pooling,
            value_norms=value_norms,
        )
    return scores


def _check_heads(num_query_heads: int, num_kv_heads: int) -> None:
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{num_query_heads} query heads are not a multiple of {num_kv_heads} KV heads")


def _check_pooling(kernel_size: int, pooling: str) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {list(shape)} {dtype}; got {list(tensor.shape)} {tensor.dtype}")
