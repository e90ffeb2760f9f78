"""`window_scores` against the naive oracle, in float64 and in float32."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.select import select
from fastkv_vllm.kernels.window_scores import POOLINGS, window_scores
from tests.kernels.compare import assert_accurate
from tests.reference import Drop
from tests.reference import selection as oracle

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EACH_POOLING = pytest.mark.parametrize("pooling", POOLINGS)
# KV heads, group size, head_dim, window, keys: W + 1, neighbours of a block and of two, a prime.
SHAPES = [
    (heads, group, head_dim, window, num_keys)
    for heads, group, head_dim in [(4, 1, 64), (2, 2, 80), (2, 8, 128)]
    for window in (1, 8, 32)
    for num_keys in sorted({window + 1, 31, 32, 33, 63, 64, 65, 211})
    if num_keys > window
]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=["H{}G{}D{}W{}N{}".format(*shape) for shape in SHAPES])


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled queries [W, Hq, D] and keys [H, N, D]."""
    heads, group, head_dim, window, num_keys = shape
    generator = torch.Generator().manual_seed(sum(shape))
    queries = torch.randn(window, heads * group, head_dim, generator=generator) * head_dim**-0.5
    keys = torch.randn(heads, num_keys, head_dim, generator=generator)
    return queries.to(dtype), keys.to(dtype)


def oracle_scores(queries: Tensor, keys: Tensor, kernel_size: int, pooling: str, dtype: torch.dtype) -> Tensor:
    """The oracle's scores [H, N - W], computed in `dtype`; it takes all queries of a layer, not yet scaled."""
    window, num_heads, head_dim = queries.shape
    padded = torch.zeros(num_heads, keys.shape[1], head_dim, dtype=dtype)
    padded[:, -window:] = queries.to(dtype).transpose(0, 1) * head_dim**0.5
    drop = Drop("snapkv", 1, 0, window_size=window, kernel_size=kernel_size, pooling=pooling)
    with default_dtype(dtype):
        return oracle.window_scores(padded, keys.to(dtype), drop)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_against_oracle(queries: Tensor, keys: Tensor, kernel_size: int, pooling: str) -> None:
    """Error against float64 at most twice that of the oracle in float32 plus a rounding step."""
    window = queries.shape[0]
    scores = window_scores(queries, keys, kernel_size=kernel_size, pooling=pooling)
    assert torch.equal(scores[:, -window:], torch.full_like(scores[:, -window:], torch.inf))
    exact = oracle_scores(queries, keys, kernel_size, pooling, torch.float64)
    orders = [torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(i)) for i in range(4)]
    plain = [oracle_scores(queries[..., o], keys[..., o], kernel_size, pooling, torch.float32) for o in orders]
    assert_accurate(scores[:, :-window], exact, plain)


@EACH_DTYPE
@EACH_POOLING
@EACH_SHAPE
def test_scores_are_as_accurate_as_the_oracle(shape: tuple[int, ...], pooling: str, dtype: torch.dtype) -> None:
    check_against_oracle(*make_inputs(shape, dtype), kernel_size=7, pooling=pooling)


@EACH_POOLING
@pytest.mark.parametrize("kernel_size", [1, 3, 15, 101])
def test_kernel_sizes(kernel_size: int, pooling: str) -> None:
    """Up to a kernel wider than all scored keys."""
    check_against_oracle(*make_inputs((2, 2, 64, 8, 61), torch.float32), kernel_size=kernel_size, pooling=pooling)


@EACH_DTYPE
def test_large_logits_stay_exact(dtype: torch.dtype) -> None:
    """One key takes nearly all attention: the softmax must not overflow, in float16 inputs least of all."""
    queries, keys = make_inputs((2, 2, 64, 8, 97), dtype)
    check_against_oracle(queries * 40, keys * 8, kernel_size=7, pooling="max")


@EACH_DTYPE
@EACH_POOLING
def test_strided_inputs(pooling: str, dtype: torch.dtype) -> None:
    """As the engine has them: slices of one fused projection, keys as a transposed view."""
    queries, keys = make_inputs((2, 4, 64, 8, 97), dtype)
    window, num_heads, head_dim = queries.shape
    fused = torch.full((97, (num_heads + 4) * head_dim), torch.nan, dtype=dtype)
    q, k, _ = fused.split([num_heads * head_dim, 2 * head_dim, 2 * head_dim], dim=-1)
    q, k = q.view(97, num_heads, head_dim)[-window:], k.view(97, 2, head_dim).transpose(0, 1)
    q.copy_(queries)
    k.copy_(keys)
    assert not q.is_contiguous() and not k.is_contiguous()
    check_against_oracle(q, k, kernel_size=7, pooling=pooling)


@EACH_DTYPE
@pytest.mark.parametrize("window", [1, 8, 32])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_equal_keys_tie_exactly(group: int, window: int, dtype: torch.dtype) -> None:
    """Bit for bit, at whatever column they stand: otherwise equal entries are not kept in order of position."""
    for num_keys, pooling in itertools.product((33, 34, 41, 64, 127, 128, 129, 211, 1021), POOLINGS):
        generator = torch.Generator().manual_seed(num_keys)
        queries, distinct = make_inputs((2, group, 64, window, window + 5), dtype)
        which = torch.randint(0, 5, (num_keys,), generator=generator)
        scores = window_scores(queries, distinct[:, which], kernel_size=1, pooling=pooling)[:, :-window]
        for kind in range(5):
            columns = (which[:-window] == kind).nonzero()[:, 0]
            wrong = columns[(scores[:, columns] != scores[:, columns[:1]]).any(dim=0)].tolist()
            assert not wrong, f"{num_keys} keys, {pooling}: columns {wrong} differ from {columns[0]}, their equal"


@EACH_POOLING
@pytest.mark.parametrize("num_keys", [41, 127, 211, 1003])
def test_lower_column_wins_a_tie(num_keys: int, pooling: str) -> None:
    """All keys equal: kept are the first ones and the window."""
    queries, keys = make_inputs((2, 2, 64, 8, num_keys), torch.float32)
    scores = window_scores(queries, keys[:, :1].expand(-1, num_keys, -1), kernel_size=7, pooling=pooling)
    # The average counts zeros outside: its first and last 3 scored columns are lower by definition.
    first = 3 if pooling == "avg" else 0
    expected = [*range(first, first + 12), *range(num_keys - 8, num_keys)]
    assert select(scores, 20).tolist() == [expected, expected]


def test_neighbours_of_a_peak_share_its_score() -> None:
    """Max pooling: exact ties over the width of the kernel."""
    queries, keys = make_inputs((1, 2, 64, 8, 211), torch.float32)
    keys[0, 100] = queries[:, 0].sum(dim=0) * 50
    keys[0, 100] += queries[:, 1].sum(dim=0) * 50
    scores = window_scores(queries, keys, kernel_size=7, pooling="max")[0]
    assert len(set(scores[97:104].tolist())) == 1 and scores[97] > scores[96] and scores[103] > scores[104]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_changed(dtype: torch.dtype) -> None:
    queries, keys = make_inputs((2, 2, 64, 8, 33), dtype)
    before = queries.clone(), keys.clone()
    window_scores(queries, keys, kernel_size=7, pooling="max")
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


def good() -> dict[str, Any]:
    return {"queries": torch.zeros(8, 4, 16), "keys": torch.zeros(2, 20, 16), "kernel_size": 7, "pooling": "max"}


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("queries", lambda: torch.zeros(8, 16), r"must share D; got \[8, 16\], \[2, 20, 16\]"),
    ("queries", lambda: torch.zeros(8, 4, 32), r"must share D; got \[8, 4, 32\], \[2, 20, 16\]"),
    ("keys", lambda: torch.zeros(1, 2, 20, 16), r"must share D; got \[8, 4, 16\], \[1, 2, 20, 16\]"),
    ("queries", lambda: torch.zeros(8, 3, 16), "3 query heads are not a multiple of 2 KV heads"),
    ("keys", lambda: torch.zeros(2, 8, 16), "8 keys must be more than the window's 8"),
    ("keys", lambda: torch.zeros(2, 0, 16), "0 keys must be more than the window's 8"),
    *[("kernel_size", lambda n=n: n, f"kernel_size must be odd and positive; got {n}") for n in (0, 2, -1)],
    ("pooling", lambda: "sum", "pooling must be one of max, avg; got 'sum'"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_inputs_are_refused(name: str, value: Callable[[], Any], words: str) -> None:
    window_scores(**good())
    with pytest.raises(ValueError, match=words):
        window_scores(**{**good(), name: value()})
