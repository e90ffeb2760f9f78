"""`column_sums` against slow loops, in float64 and in float32, and chunk by chunk."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv_vllm.kernels.column_sums import age_weights, column_sums, reference
from tests.kernels.compare import assert_accurate
from tests.reference import scores as oracle

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EACH_DECAY = pytest.mark.parametrize("decay", [1.0, 0.9])
# KV heads, group size, head_dim, first position, rows: one row, a whole text, neighbours of a block, primes.
SHAPES = [
    (*heads, start, num_queries)
    for heads in [(4, 1, 64), (2, 2, 80), (1, 8, 128)]
    for start, num_queries in [(0, 1), (1, 1), (0, 2), (0, 33), (31, 32), (32, 31), (211, 1), (150, 61)]
]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=["H{}G{}D{}start{}n{}".format(*shape) for shape in SHAPES])


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled queries [n, Hq, D] and keys [H, start + n, D]."""
    heads, group, head_dim, start, num_queries = shape
    generator = torch.Generator().manual_seed(sum(shape))
    queries = torch.randn(num_queries, heads * group, head_dim, generator=generator) * head_dim**-0.5
    keys = torch.randn(heads, start + num_queries, head_dim, generator=generator)
    return queries.to(dtype), keys.to(dtype)


def decayed_sums(queries: Tensor, keys: Tensor, start: int, decay: float) -> Tensor:
    return column_sums(queries, keys, start=start, weights=age_weights(queries.shape[0], decay, queries.device))


def slow_sums(queries: Tensor, keys: Tensor, decay: float) -> Tensor:
    """Row after row, in the dtype of the inputs."""
    num_queries, num_query_heads, _ = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    sums = torch.zeros(num_kv_heads, num_keys, dtype=keys.dtype)
    for head in range(num_query_heads):
        kv_head = head * num_kv_heads // num_query_heads
        logits = queries[:, head] @ keys[kv_head].T
        for i in range(num_queries):
            visible = num_keys - num_queries + i + 1
            sums[kv_head, :visible] += decay ** (num_queries - 1 - i) * logits[i, :visible].softmax(dim=0)
    return sums


def oracle_sums(queries: Tensor, keys: Tensor, decay: float) -> Tensor:
    """The oracle's scores of a whole text; it takes queries that are not yet scaled, heads first."""
    return oracle.all_query_scores(queries.transpose(0, 1) * queries.shape[2] ** 0.5, keys, decay)


def check(sums: Tensor, slow: Callable[..., Tensor], queries: Tensor, keys: Tensor, decay: float) -> None:
    """Error against float64 at most twice that of the loop in float32 plus a rounding step."""
    exact = slow(queries.double(), keys.double(), decay)
    orders = [torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(i)) for i in range(8)]
    plain = [slow(queries[..., o].float(), keys[..., o].float(), decay) for o in orders]
    assert_accurate(sums, exact, plain)


def check_chunk(queries: Tensor, keys: Tensor, decay: float) -> None:
    sums = decayed_sums(queries, keys, start=keys.shape[1] - queries.shape[0], decay=decay)
    check(sums, slow_sums, queries, keys, decay)


@EACH_DTYPE
@EACH_DECAY
@EACH_SHAPE
def test_sums_are_as_accurate_as_the_loop(shape: tuple[int, ...], decay: float, dtype: torch.dtype) -> None:
    check_chunk(*make_inputs(shape, dtype), decay=decay)


@pytest.mark.parametrize("decay", [1.0, 0.999, 0.5, 1e-3, 1e-300])
def test_decays(decay: float) -> None:
    """Down to the last query alone, with rows of no weight; both loops agree on what the op is."""
    queries, keys = make_inputs((2, 2, 64, 0, 61), torch.float32)
    check_chunk(queries, keys, decay)
    check(decayed_sums(queries, keys, start=0, decay=decay), oracle_sums, queries, keys, decay)


def test_weights_of_rows() -> None:
    """Any weights, none among them: rows of weight 0 have no part in it."""
    queries, keys = make_inputs((2, 2, 64, 31, 8), torch.float32)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.1, 0.0, 1.2, 0.3, 2.0])
    sums = column_sums(queries, keys, start=31, weights=weights)
    rows = [column_sums(queries[i : i + 1], keys[:, : 32 + i], start=31 + i, weights=torch.ones(1)) for i in range(8)]
    expected = sum(w * F.pad(row, (0, 39 - row.shape[1])) for w, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)
    assert not column_sums(queries, keys, start=31, weights=torch.zeros(8)).any()


@EACH_DECAY
@pytest.mark.parametrize("chunks", [[211], [1] * 17, [1, 31, 32, 33, 97], [97, 113, 1], [50, 0, 3]], ids=str)
@pytest.mark.parametrize(("heads", "group"), [(4, 1), (2, 2), (1, 8)])
def test_chunks_add_up_to_the_text(heads: int, group: int, chunks: list[int], decay: float) -> None:
    queries, keys = make_inputs((heads, group, 64, 0, sum(chunks)), torch.float32)
    sums, start = torch.zeros(heads, 0), 0
    for size in chunks:
        end = start + size
        new = decayed_sums(queries[start:end], keys[:, :end], start=start, decay=decay)
        sums, start = decay**size * F.pad(sums, (0, size)) + new, end
    check(sums, oracle_sums, queries, keys, decay)


@pytest.mark.parametrize("tile_rows", [0, 1, 2, 7, 30, 61, 1000])
@EACH_DECAY
def test_tiles(tile_rows: int, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows fit at once, the sums are the same and no more is held."""
    queries, keys = make_inputs((2, 4, 64, 150, 61), torch.float32)
    held = []

    def probabilities(*args: Any) -> Tensor:
        p = original(*args)
        held.append(p.numel())
        return p

    original = reference._probabilities
    monkeypatch.setattr(reference, "_probabilities", probabilities)
    monkeypatch.setattr(reference, "_TILE_SIZE", tile_rows * 4 * 211)
    check_chunk(queries, keys, decay)
    assert max(held) <= max(1, tile_rows) * 4 * 211
    assert len(held) == 2 * -(-61 // min(max(1, tile_rows), 61))


@EACH_DTYPE
def test_large_logits_stay_exact(dtype: torch.dtype) -> None:
    """One key takes nearly all of a row: the softmax must not overflow, in float16 inputs least of all."""
    queries, keys = make_inputs((2, 2, 64, 36, 61), dtype)
    check_chunk(queries * 40, keys * 8, decay=1.0)


@EACH_DTYPE
@EACH_DECAY
def test_strided_inputs(decay: float, dtype: torch.dtype) -> None:
    """As the engine has them: slices of one fused projection, keys as a transposed view."""
    queries, keys = make_inputs((2, 4, 64, 36, 61), dtype)
    fused = torch.full((97, 12 * 64), torch.nan, dtype=dtype)
    q, k, _ = fused.split([8 * 64, 2 * 64, 2 * 64], dim=-1)
    q, k = q.view(97, 8, 64)[-61:], k.view(97, 2, 64).transpose(0, 1)
    q.copy_(queries)
    k.copy_(keys)
    assert not q.is_contiguous() and not k.is_contiguous()
    check_chunk(q, k, decay)


@EACH_DTYPE
@pytest.mark.parametrize("num_queries", [1, 2, 7, 8, 61])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_equal_keys_tie_exactly(group: int, num_queries: int, dtype: torch.dtype) -> None:
    """Bit for bit, at whatever column they stand, where all rows of the chunk see them."""
    for start, decay in itertools.product((33, 34, 127, 128, 129, 211, 1021), (1.0, 0.9)):
        queries, keys = make_inputs((2, group, 80, 5, num_queries), dtype)
        which = torch.randint(0, 5, (start,), generator=torch.Generator().manual_seed(start))
        keys = torch.cat([keys[:, which], keys[:, 5:]], dim=1)
        sums = decayed_sums(queries, keys, start=start, decay=decay)[:, :start]
        for kind in range(5):
            columns = (which == kind).nonzero()[:, 0]
            wrong = columns[(sums[:, columns] != sums[:, columns[:1]]).any(dim=0)].tolist()
            assert not wrong, f"start {start}, decay {decay}: columns {wrong} differ from {columns[0]}, their equal"


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("late", [1, 30, 59, 60])
def test_rows_that_see_both_equal_keys_give_both_the_same(late: int, group: int) -> None:
    """A key of the chunk itself equals an earlier one; rows before it look elsewhere and give neither anything."""
    queries, keys = make_inputs((1, group, 64, 36, 61), torch.float32)
    keys[0, 36 + late] = keys[0, 20]
    queries[:late] = keys[0, 0] * 1000
    sums = decayed_sums(queries, keys, start=36, decay=1.0)[0]
    assert sums[20] == sums[36 + late] and sums[20] > 0


def test_rows_of_no_weight_are_skipped() -> None:
    """0.5^26 counts, 0.5^27 < 1e-8 does not."""
    queries, keys = make_inputs((2, 2, 64, 36, 61), torch.float32)
    queries[: 61 - 27] = torch.nan
    assert decayed_sums(queries, keys, start=36, decay=0.5).isfinite().all()
    queries[61 - 27] = torch.nan
    assert decayed_sums(queries, keys, start=36, decay=0.5)[:, 0].isnan().all()


@pytest.mark.parametrize("start", [0, 32])
def test_no_queries_give_zeros(start: int) -> None:
    sums = decayed_sums(torch.zeros(0, 4, 16), torch.zeros(2, start, 16), start=start, decay=0.9)
    assert sums.dtype == torch.float32 and torch.equal(sums, torch.zeros(2, start))


@EACH_DTYPE
def test_inputs_are_not_changed(dtype: torch.dtype) -> None:
    queries, keys = make_inputs((2, 2, 64, 31, 32), dtype)
    before = queries.clone(), keys.clone()
    decayed_sums(queries, keys, start=31, decay=0.9)
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


def good() -> dict[str, Any]:
    return {"queries": torch.zeros(8, 4, 16), "keys": torch.zeros(2, 20, 16), "start": 12, "weights": torch.ones(8)}


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("queries", lambda: torch.zeros(8, 16), r"must share D; got \[8, 16\], \[2, 20, 16\]"),
    ("queries", lambda: torch.zeros(8, 4, 32), r"must share D; got \[8, 4, 32\], \[2, 20, 16\]"),
    ("keys", lambda: torch.zeros(1, 2, 20, 16), r"must share D; got \[8, 4, 16\], \[1, 2, 20, 16\]"),
    ("queries", lambda: torch.zeros(8, 3, 16), "3 query heads are not a multiple of 2 KV heads"),
    ("start", lambda: -1, "start must be 0 or more; got -1"),
    ("start", lambda: 11, "up to the last query: 19 for start 11 and 8 queries; got 20"),
    ("keys", lambda: torch.zeros(2, 21, 16), "up to the last query: 20 for start 12 and 8 queries; got 21"),
    ("weights", lambda: torch.ones(7), r"weights must be \[8\] float32; got \[7\]"),
    ("weights", lambda: torch.ones(8).double(), r"weights must be \[8\] float32; got \[8\] torch.float64"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_inputs_are_refused(name: str, value: Callable[[], Any], words: str) -> None:
    column_sums(**good())
    with pytest.raises(ValueError, match=words):
        column_sums(**{**good(), name: value()})


def test_the_last_query_alone_is_what_tova_rates() -> None:
    """A check of the oracles against each other: one query, the group's heads added or shares of all heads."""
    queries, keys = make_inputs((2, 2, 64, 0, 33), torch.float64)
    unscaled = queries.transpose(0, 1) * 8
    last = oracle.last_query_scores(unscaled, keys)
    every = oracle.all_query_scores(unscaled, keys, decay=1e-300) / 4
    torch.testing.assert_close(last, every, rtol=1e-12, atol=0)


def test_value_norms_add_absolute_values() -> None:
    values = torch.tensor([[[1.0, -2.0], [0.0, 0.5]], [[-3.0, -4.0], [0.0, 0.0]]])
    assert oracle.value_norms(values).tolist() == [[3.0, 0.5], [7.0, 0.0]]
