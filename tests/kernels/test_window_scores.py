"""`window_scores` where kernels run, and of entries in pages: both forms against slow loops in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.column_sums import age_weights
from fastkv_vllm.kernels.window_scores import paged_window_scores, window_scores
from tests.kernels.compare import assert_accurate, assert_same

Run = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slow_scores(
    queries: Tensor, keys: Tensor, *, kernel_size: int = 7, pooling: str = "max", **more: Tensor | None
) -> Tensor:
    """Scores [H, N] of one request, row after row, in the dtype of the inputs; more: weights, lse [W, Hq], norms."""
    window, num_query_heads, _ = queries.shape
    num_heads, num_keys, _ = keys.shape
    num_scored = max(0, num_keys - window)
    scores = torch.zeros(num_heads, num_keys, dtype=keys.dtype)
    for head in range(num_query_heads):
        kv_head = head * num_heads // num_query_heads
        votes = torch.zeros(num_scored, dtype=keys.dtype)
        for w in range(window):
            logits = (keys[kv_head, : max(0, num_keys - window + w + 1)] @ queries[w, head])[:, None]
            p = logits.softmax(dim=0) if more.get("lse") is None else (logits - more["lse"][w, head].to(keys)).exp()
            weight = 1 if more.get("weights") is None else more["weights"][w].to(keys)
            votes += weight * p[:num_scored, 0]
        for j in range(num_scored):
            near = votes[max(0, j - kernel_size // 2) : j + kernel_size // 2 + 1]
            scores[kv_head, j] += near.max() if pooling == "max" else near.sum() / kernel_size
    if more.get("norms") is not None:
        scores *= more["norms"].to(keys)
    scores[:, num_scored:] = torch.inf
    return scores


def orders(head_dim: int) -> list[Tensor]:
    """Four orders of summation over D: plain torch may be lucky in one."""
    return [torch.randperm(head_dim, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def check(scores: Tensor, queries: Tensor, keys: Tensor, **settings: Any) -> None:
    """Scores [H, N] of one request."""
    exact = slow_scores(queries.double(), keys.double(), **settings)
    plain = [slow_scores(queries[..., o].float(), keys[..., o].float(), **settings) for o in orders(keys.shape[2])]
    assert_accurate(scores, exact, plain)


# KV heads, group size, head_dim, window, keys, dtype: W + 1, neighbours of a tile and of two, primes.
DENSE = [
    (2, 2, 64, 8, 9, FP32),
    (1, 8, 128, 8, 31, BF16),
    (2, 1, 64, 1, 2, FP16),
    (2, 4, 80, 8, 127, FP32),
    (1, 2, 64, 32, 65, BF16),
    (1, 3, 128, 5, 64, FP16),
    (2, 2, 64, 8, 211, BF16),
    (1, 8, 64, 32, 137, BF16),  # more columns than one product has
    (1, 2, 8, 3, 33, FP32),
    (1, 1, 256, 8, 40, FP16),
    (1, 2, 16, 8, 2111, FP32),  # three tiles to a split
]


@pytest.mark.parametrize("shape", DENSE, ids=["H{}G{}D{}W{}N{}-{}".format(*s[:5], str(s[5])[6:]) for s in DENSE])
def test_dense(shape: tuple, run: Run) -> None:
    heads, group, head_dim, window, num_keys, dtype = shape
    queries = (draw(window, heads * group, head_dim, seed=1) * head_dim**-0.5).to(dtype)
    keys = draw(heads, num_keys, head_dim, seed=2, dtype=dtype)
    pooling = "max" if num_keys % 2 else "avg"
    check(run(window_scores, queries, keys, kernel_size=7, pooling=pooling), queries, keys, pooling=pooling)


def test_dense_strided(run: Run) -> None:
    """As the engine has them: slices of one fused projection, keys as a transposed view."""
    fused = draw(97, 12 * 64, seed=3, dtype=BF16)
    q, k, _ = fused.split([8 * 64, 2 * 64, 2 * 64], dim=-1)
    q, k = q.view(97, 8, 64)[-8:], k.view(97, 2, 64).transpose(0, 1)
    assert not q.is_contiguous() and not k.is_contiguous()
    check(run(window_scores, q, k, kernel_size=5, pooling="max"), q, k, kernel_size=5)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_large_logits_and_ties(dtype: torch.dtype, run: Run) -> None:
    """One kind of key takes nearly all attention; equal keys have equal bits wherever they stand."""
    queries, distinct = draw(8, 4, 64, seed=4, dtype=dtype), draw(2, 13, 64, seed=5, dtype=dtype)
    which = torch.randint(0, 5, (211,), generator=torch.Generator().manual_seed(6))
    keys = distinct[:, torch.cat([which, torch.arange(5, 13)])]
    scores = run(window_scores, queries, keys, kernel_size=1, pooling="max")
    check(scores, queries, keys, kernel_size=1)
    for kind in range(5):
        columns = (which == kind).nonzero()[:, 0]
        assert_same(scores[:, columns], scores[:, columns[:1]].expand(-1, len(columns)))


LENGTHS = [101, 0, 3, 8, 9, 31, 32]  # a prime, none, fewer than the window, the window, one more, ends of pages
# KV heads, group size, head_dim, dtype, what is asked for.
PAGED = [
    (2, 1, 64, FP32, "plain"),
    (1, 8, 128, BF16, "aged"),
    (2, 3, 64, FP16, "lse"),
    (1, 2, 128, BF16, "norms"),
]


class Pages:
    """Requests whose entries lie in scattered pages, per KV head; whatever no request owns is NaN."""

    block_size = 16

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, lengths: list[int]) -> None:
        self.keys = [draw(heads, n, head_dim, seed=n, dtype=dtype) for n in lengths]
        self.values = [draw(heads, n, head_dim, seed=n + 1, dtype=dtype) for n in lengths]
        counts = [-(-n // self.block_size) for n in lengths]
        num_pages = heads * sum(counts) + 3
        # Strided in pages, entries and elements, as one layer of several, or a narrower part of something, would be.
        whole = torch.full((num_pages, 2, self.block_size, 2 * head_dim + 5), torch.nan, dtype=dtype)
        self.pages = whole[:, 1, :, 3:-2]
        self.tables = torch.full((len(lengths), heads, max(counts) + 1), -1, dtype=torch.int32)
        ids = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist())
        for request, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            for head in range(heads):
                own = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int64)
                self.tables[request, head, :count] = own
                entries = torch.cat([self.keys[request][head], self.values[request][head]], dim=1)
                slots = torch.arange(n)
                self.pages[own[slots // self.block_size], slots % self.block_size] = entries
        self.num_keys = torch.tensor(lengths, dtype=torch.int32)

    def norms(self, request: int) -> Tensor:
        return self.values[request].double().abs().sum(dim=-1)


@pytest.mark.parametrize("case", PAGED, ids=["H{}G{}D{}-{}-{}".format(*s[:3], str(s[3])[6:], s[4]) for s in PAGED])
def test_paged(case: tuple, form: Run) -> None:
    """A ragged batch: each request as if alone; nothing past its end is read."""
    heads, group, head_dim, dtype, kind = case
    held = Pages(heads, head_dim, dtype, LENGTHS)
    queries = (draw(len(LENGTHS), heads * group, 8, head_dim, seed=7) * head_dim**-0.5).to(dtype).transpose(1, 2)
    weights = age_weights(8, 0.9, torch.device("cpu")) if kind == "aged" else None
    lse = draw(len(LENGTHS), heads * group, 8, seed=8).transpose(1, 2) + 5 if kind == "lse" else None
    scores = form(
        paged_window_scores,
        queries,
        held.pages,
        held.tables,
        held.num_keys,
        max_num_keys=110,
        kernel_size=7,
        pooling="avg" if kind == "aged" else "max",
        weights=weights,
        lse=lse,
        value_norms=kind == "norms",
    )
    assert scores.shape == (len(LENGTHS), heads, 110)
    for request, n in enumerate(LENGTHS):
        assert_same(scores[request, :, n:], torch.full((heads, 110 - n), -torch.inf))
        more = {
            "pooling": "avg" if kind == "aged" else "max",
            "weights": weights,
            "lse": None if lse is None else lse[request],
            "norms": held.norms(request) if kind == "norms" else None,
        }
        check(scores[request, :, :n], queries[request], held.keys[request], **more)


def test_pages_of_an_engine(form: Run) -> None:
    """A layer [num_blocks, H, block_size, 2D] seen as pages gives what the dense form gives."""
    cache = draw(9, 2, 16, 128, seed=9, dtype=BF16)
    blocks = torch.tensor([7, 2, 4, 0], dtype=torch.int32)
    tables = blocks * 2 + torch.arange(2, dtype=torch.int32)[:, None]
    queries = draw(8, 4, 64, seed=10, dtype=BF16) / 8
    keys = cache[blocks.long(), :, :, :64].transpose(0, 1).flatten(1, 2)[:, :61]
    settings = {"kernel_size": 7, "pooling": "max"}
    num_keys = torch.tensor([61], dtype=torch.int32)
    paged = form(
        paged_window_scores, queries[None], cache.view(18, 16, 128), tables[None], num_keys, max_num_keys=61, **settings
    )
    assert_same(paged[0], form(window_scores, queries, keys, **settings))


def test_nothing_to_rate(form: Run) -> None:
    def scores(num_requests: int, max_num_keys: int) -> Tensor:
        return form(
            paged_window_scores,
            torch.zeros(num_requests, 8, 2, 16),
            torch.zeros(4, 16, 32),
            torch.zeros(num_requests, 2, 1, dtype=torch.int32),
            torch.zeros(num_requests, dtype=torch.int32),
            max_num_keys=max_num_keys,
            kernel_size=7,
            pooling="max",
        )

    assert scores(0, 9).shape == (0, 2, 9) and scores(2, 0).shape == (2, 2, 0)
    assert_same(scores(2, 9), torch.full((2, 2, 9), -torch.inf))


def good() -> dict[str, Any]:
    return {
        "queries": torch.zeros(2, 8, 4, 16),
        "pages": torch.zeros(9, 4, 32),
        "page_tables": torch.zeros(2, 2, 5, dtype=torch.int32),
        "num_keys": torch.zeros(2, dtype=torch.int32),
        "max_num_keys": 20,
        "kernel_size": 7,
        "pooling": "max",
    }


BAD: list[tuple[str, Any, str]] = [
    ("pages", torch.zeros(9, 4, 16), r"must share D; got \[2, 8, 4, 16\], \[9, 4, 16\]"),
    ("queries", torch.zeros(8, 4, 16), r"must share D; got \[8, 4, 16\], \[9, 4, 32\]"),
    ("page_tables", torch.zeros(2, 2, 5).long(), r"must be \[2, H, max_pages\] int32; got \[2, 2, 5\] torch.int64"),
    ("page_tables", torch.zeros(3, 2, 5).int(), r"must be \[2, H, max_pages\] int32; got \[3, 2, 5\]"),
    ("page_tables", torch.zeros(2, 3, 5).int(), "4 query heads are not a multiple of 3 KV heads"),
    ("num_keys", torch.zeros(2).long(), r"num_keys must be \[2\] torch.int32; got \[2\] torch.int64"),
    ("max_num_keys", 21, r"max_num_keys must be in 0\.\.20; got 21"),
    ("weights", torch.zeros(7), r"weights must be \[8\] torch.float32; got \[7\]"),
    ("lse", torch.zeros(2, 4, 8), r"lse must be \[2, 8, 4\] torch.float32; got \[2, 4, 8\]"),
    ("kernel_size", 4, "kernel_size must be odd and positive; got 4"),
    ("pooling", "sum", "pooling must be one of max, avg; got 'sum'"),
    ("impl", "triton", "impl='triton' needs tensors on a GPU"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_inputs_are_refused(name: str, value: Any, words: str) -> None:
    paged_window_scores(**good())
    with pytest.raises(ValueError, match=words):
        paged_window_scores(**{**good(), name: value})


def test_what_kernels_do_not_handle_is_refused(run: Run) -> None:
    for window, head_dim, dtype, words in [
        (33, 16, FP32, "windows up to 32 in torch.float32"),
        (129, 16, BF16, "windows up to 128 in torch.bfloat16"),
        (8, 257, BF16, "head_dim up to 256; got 8 and 257"),
        (8, 16, FP16, "one dtype; got torch.float32 and torch.float16"),
    ]:
        queries = torch.zeros(window, 2, head_dim, dtype=FP32 if dtype == FP16 else dtype)
        with pytest.raises(ValueError, match=words):
            run(window_scores, queries, torch.zeros(2, 200, head_dim, dtype=dtype), kernel_size=7, pooling="max")


def call(dtype: torch.dtype, window: int, group: int, head_dim: int, **more: Any) -> Callable[[], Tensor]:
    """Four requests of a model with 8 KV heads."""
    queries = torch.zeros(4, window, 8 * group, head_dim, dtype=dtype)
    pages = torch.zeros(64, 16, 2 * head_dim, dtype=dtype)
    tables, num_keys = torch.zeros(4, 8, 512, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    settings = {"max_num_keys": 8192, "kernel_size": 7, "pooling": "max", "impl": "triton"}
    return lambda: paged_window_scores(queries, pages, tables, num_keys, **settings, **more)


CALLS = {
    "bf16-W8G4D128": call(BF16, 8, 4, 128),
    "bf16-W8G4D128-lse-norms": call(BF16, 8, 4, 128, lse=torch.zeros(4, 8, 32), value_norms=True),
    "fp16-W32G8D64": call(FP16, 32, 8, 64),
    "bf16-W128G1D256": call(BF16, 128, 1, 256),
    "fp32-W8G4D128": call(FP32, 8, 4, 128),
}
