"""`column_sums` where kernels run, against slow loops in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.column_sums import age_weights, column_sums
from tests.kernels.compare import assert_accurate, assert_same
from tests.test_column_sums import make_inputs

Run = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# KV heads, group size, head_dim, first position, rows, dtype: one row, a whole text, neighbours of a tile, primes.
SHAPES = [
    (2, 2, 64, 150, 61, FP32),
    (1, 8, 128, 0, 33, BF16),
    (2, 1, 64, 0, 1, FP16),
    (2, 2, 80, 211, 1, FP32),
    (1, 3, 64, 1, 64, BF16),
    (1, 1, 128, 63, 65, FP16),
    (1, 2, 8, 0, 97, FP32),
    (1, 1, 256, 31, 32, BF16),
    (1, 2, 64, 0, 257, BF16),
]
EACH_SHAPE = pytest.mark.parametrize(
    "shape", SHAPES, ids=["H{}G{}D{}start{}n{}-{}".format(*shape[:5], str(shape[5])[6:]) for shape in SHAPES]
)


def slow_sums(queries: Tensor, keys: Tensor, weights: Tensor, lse: Tensor | None) -> Tensor:
    """Row after row, in the dtype of the inputs."""
    num_queries, num_query_heads, _ = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    sums = torch.zeros(num_kv_heads, num_keys, dtype=keys.dtype)
    for head in range(num_query_heads):
        kv_head = head * num_kv_heads // num_query_heads
        logits = queries[:, head] @ keys[kv_head].T
        for i in range(num_queries):
            row = logits[i, : num_keys - num_queries + i + 1]
            p = row.softmax(dim=0) if lse is None else (row - lse[i, head].to(row)).exp()
            sums[kv_head, : len(row)] += weights[i].to(row) * p
    return sums


def check(run: Run, queries: Tensor, keys: Tensor, weights: Tensor, lse: Tensor | None = None) -> None:
    start = keys.shape[1] - queries.shape[0]
    sums = run(column_sums, queries, keys, start=start, weights=weights, lse=lse)
    exact = slow_sums(queries.double(), keys.double(), weights, lse)
    orders = [torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(i)) for i in range(8)]
    plain = [slow_sums(queries[..., o].float(), keys[..., o].float(), weights, lse) for o in orders]
    assert_accurate(sums, exact, plain)


@EACH_SHAPE
def test_sums(shape: tuple, run: Run) -> None:
    queries, keys = make_inputs(shape[:5], shape[5])
    check(run, queries, keys, age_weights(len(queries), 0.99, queries.device))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_given_log_sums(shape: tuple, form: Run) -> None:
    """They are what divides the exponentials, whatever they are; as attention lays them out, heads first."""
    queries, keys = make_inputs(shape[:5], shape[5])
    lse = torch.randn(queries.shape[1], len(queries), generator=torch.Generator().manual_seed(0)).t() + 5
    check(form, queries, keys, torch.ones(len(queries)), lse)


def test_strided(run: Run) -> None:
    """As the engine has them: slices of one fused projection, keys as a transposed view."""
    queries, keys = make_inputs((2, 4, 64, 36, 61), BF16)
    fused = torch.full((97, 12 * 64), torch.nan, dtype=BF16)
    q, k, _ = fused.split([8 * 64, 2 * 64, 2 * 64], dim=-1)
    q, k = q.view(97, 8, 64)[-61:], k.view(97, 2, 64).transpose(0, 1)
    q.copy_(queries)
    k.copy_(keys)
    assert not q.is_contiguous() and not k.is_contiguous()
    check(run, q, k, torch.linspace(0.5, 1.5, 61))


def test_large_logits_and_ties(run: Run) -> None:
    """One kind of key takes nearly all of a row; equal keys that all rows see have equal bits."""
    queries, keys = make_inputs((2, 2, 64, 5, 61), BF16)
    which = torch.randint(0, 5, (211,), generator=torch.Generator().manual_seed(1))
    keys = torch.cat([keys[:, which] * 8, keys[:, 5:]], dim=1)
    check(run, queries, keys, torch.ones(61))
    sums = run(column_sums, queries, keys, start=211, weights=torch.ones(61))
    for kind in range(5):
        columns = (which == kind).nonzero()[:, 0]
        assert_same(sums[:, columns], sums[:, columns[:1]].expand(-1, len(columns)))


def test_rows_of_no_weight_are_skipped(run: Run) -> None:
    """0.5^26 counts, 0.5^27 < 1e-8 does not; a row of no weight after one that counts has no part in it."""
    queries, keys = make_inputs((1, 2, 64, 36, 161), FP32)
    queries[: 161 - 27] = torch.nan
    weights = age_weights(161, 0.5, queries.device)
    assert run(column_sums, queries, keys, start=36, weights=weights).isfinite().all()
    queries[161 - 27] = torch.nan
    assert run(column_sums, queries, keys, start=36, weights=weights)[:, 0].isnan().all()
    queries, keys = make_inputs((1, 2, 64, 36, 8), FP32)
    check(run, queries, keys, torch.tensor([0.0, 0.0, 1.0, 1.1, 0.0, 1.2, 0.3, 2.0]))
    assert_same(run(column_sums, queries, keys, start=36, weights=torch.zeros(8)), torch.zeros(1, 44))


def test_no_queries_give_zeros(run: Run) -> None:
    found = run(column_sums, torch.zeros(0, 4, 16), torch.zeros(2, 32, 16), start=32, weights=torch.zeros(0))
    assert_same(found, torch.zeros(2, 32))


def test_what_does_not_fit_is_refused(run: Run) -> None:
    queries, keys, weights = torch.zeros(8, 4, 16), torch.zeros(2, 8, 16), torch.ones(8)
    with pytest.raises(ValueError, match=r"lse must be \[8, 4\] float32; got \[4, 8\]"):
        run(column_sums, queries, keys, start=0, weights=weights, lse=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="needs queries and keys of one dtype"):
        run(column_sums, queries, keys.half(), start=0, weights=weights)
    with pytest.raises(ValueError, match="head_dim up to 256; got 512"):
        run(column_sums, torch.zeros(8, 4, 512), torch.zeros(2, 8, 512), start=0, weights=weights)


def call(dtype: torch.dtype, group: int, head_dim: int, **more: Any) -> Callable[[], Tensor]:
    """A chunk of 512 rows of a model with 8 KV heads."""
    queries, keys = torch.zeros(512, 8 * group, head_dim, dtype=dtype), torch.zeros(8, 1024, head_dim, dtype=dtype)
    return lambda: column_sums(queries, keys, start=512, weights=torch.ones(512), impl="triton", **more)


CALLS = {
    "bf16-G4D128": call(BF16, 4, 128),
    "bf16-G4D128-lse": call(BF16, 4, 128, lse=torch.zeros(32, 512).t()),
    "fp16-G8D64": call(FP16, 8, 64),
    "bf16-G1D256": call(BF16, 1, 256),
    "fp32-G4D128": call(FP32, 4, 128),
}
