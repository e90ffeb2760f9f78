"""`select` in Triton and CUDA: the columns of the reference, ties, infinities and NaN included."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels.select import segments, select, select_ragged
from tests.kernels.compare import assert_same

INF, NAN = float("inf"), float("nan")
Run = Callable[..., Any]


def scattered(num_rows: int, num_columns: int, *, seed: int = 0) -> Tensor:
    """Scores of many sizes with many ties, and all that is special about float32."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, num_columns, generator=generator)
    scores = torch.where(scores > 0.5, (scores * 4).round(), scores * 10.0 ** (scores * 9).round())
    specials = torch.tensor([INF, -INF, NAN, -NAN, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    places = torch.rand(scores.shape, generator=generator)
    chosen = specials[torch.randint(len(specials), scores.shape, generator=generator)]
    return scores.where(places > 0.2, chosen)


CALLS = {
    "131072 columns": lambda: select(torch.zeros(256, 131072), 13107, impl="triton"),
    "one row": lambda: select(torch.zeros(1, 2**20), 100, impl="triton"),
    "one segment": lambda: select(torch.zeros(2048, 1009), 100, impl="triton"),
    "strided": lambda: select(torch.zeros(5000, 8).T, 7, impl="triton"),
}


@pytest.mark.parametrize("num_columns", [1, 2, 255, 4095, 4096, 4097, 9973])
def test_equals_the_reference(run_each: Run, num_columns: int) -> None:
    scores = scattered(2, num_columns, seed=num_columns)
    for count in sorted({1, (num_columns + 1) // 2, num_columns}):
        assert_same(run_each(select, scores, count), select(scores, count))


@pytest.mark.parametrize("value", [0.0, -INF, INF, NAN, 1e-45])
def test_equal_scores_keep_the_first_columns(run_each: Run, value: float) -> None:
    found = run_each(select, torch.full((2, 4099), value), 4097)
    assert_same(found, torch.arange(4097).expand(2, -1))


def test_order_of_special_scores(run_each: Run) -> None:
    """NaN before +inf, both zeros alike, numbers too small for a normal float told apart."""
    scores = torch.tensor([[-INF, 0.0, -1e-45, -0.0, INF, 1e-45, 3e-45, -NAN, NAN, -3e-45]])
    order = [7, 8, 4, 6, 5, 1, 3, 2, 9, 0]
    for count in range(1, len(order) + 1):
        assert run_each(select, scores, count).tolist() == select(scores, count).tolist() == [sorted(order[:count])]


def test_counts_and_lengths_by_row(run_each: Run) -> None:
    """None of a row, all of it, none of an empty one; what lies behind a row's length would win."""
    scores = scattered(6, 5003)
    lengths = torch.tensor([0, 5003, 4096, 1, 4097, 300])
    counts = torch.tensor([0, 5003, 1000, 1, 0, 299])
    for row, length in enumerate(lengths.tolist()):
        scores[row, length:] = NAN
    expected = [select(scores[r : r + 1, : int(lengths[r])], int(counts[r]))[0] for r in (1, 2, 3, 5)]
    found = run_each(select_ragged, scores, counts, lengths=lengths)
    assert_same(found, torch.cat(expected))
    assert_same(select_ragged(scores, counts, lengths=lengths), found)


def test_counts_by_row_of_whole_rows(run_each: Run) -> None:
    scores, counts = scattered(3, 700), torch.tensor([5, 0, 700])
    assert_same(run_each(select_ragged, scores, counts), select_ragged(scores, counts))
    assert run_each(select_ragged, scores, counts * 0).shape == (0,)
    assert run_each(select_ragged, scores[:0], counts[:0]).shape == (0,)


VIEWS = {
    "rows apart": lambda x: x[::2, 3:4800],
    "unaligned rows": lambda x: x[:2, 1:],
    "columns apart": lambda x: x[:2, ::3],
    "transposed": lambda x: x.T[:3],
    "one row for all": lambda x: x[:1].expand(3, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_scores(run_each: Run, view: Callable[[Tensor], Tensor]) -> None:
    scores = view(scattered(4, 5000))
    before = scores.clone()
    assert_same(run_each(select, scores, 3), select(scores, 3))
    counts = torch.arange(2 * scores.shape[0])[::2]
    counts = counts.clamp(max=scores.shape[1])
    assert_same(run_each(select_ragged, scores, counts), select_ragged(scores, counts))
    assert_same(scores, before)


def select_with(blocks_wanted: int, scores: Tensor, num_kept: int, *, impl: str) -> Tensor:
    with mock.patch.object(segments, "BLOCKS_WANTED", blocks_wanted):
        return select(scores, num_kept, impl=impl)


@pytest.mark.parametrize("blocks_wanted", [1, 4, 1024])
def test_segments_of_a_row(run_each: Run, blocks_wanted: int) -> None:
    """Ties are counted over the tiles of a segment, and over segments."""
    scores = torch.zeros(1, 9 * segments.TILE + 5)
    scores[0, ::1000] = torch.arange(37.0).flip(0) - 18  # 18 above the ties, 18 below
    scores = torch.cat([scores, scattered(1, scores.shape[1])])
    assert_same(run_each(select_with, blocks_wanted, scores, 30_000), select(scores, 30_000))


def test_segments_fill_a_gpu() -> None:
    """One tile each while that is not enough, as many as wanted otherwise, one for each of many rows."""
    assert segments.segment_size(1, 2**20) == segments.TILE
    assert segments.segment_size(256, 131072) == 131072 // 4
    assert segments.segment_size(5000, 131072) == 131072
    assert segments.segment_size(5000, 1) == segments.TILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kept": torch.tensor([1, 10])}, r"num_kept must be in 0\.\.9; got \[1, 10\]"),
        ({"num_kept": torch.tensor([1, -1])}, r"num_kept must be in 0\.\.9; got \[1, -1\]"),
        ({"num_kept": torch.tensor([1])}, r"num_kept must be \[2\] int64; got \[1\]"),
        ({"lengths": torch.tensor([9, 10])}, r"lengths must be in 0\.\.9; got \[9, 10\]"),
        ({"lengths": torch.tensor([9, 9]).int()}, r"lengths must be \[2\] int64; got \[2\] torch.int32"),
        ({"lengths": torch.tensor([9, 1])}, r"num_kept must be at most lengths; got \[1, 2\] of \[9, 1\]"),
        ({"num_kept": torch.tensor([1, 2], device="meta")}, "num_kept must be on cpu as scores are; got meta"),
        ({"scores": torch.zeros(1, 1).expand(1, 2**30 + 1)}, "scores must have at most 1073741824 columns"),
        ({"impl": "fast"}, "impl must be one of reference, triton, cuda; got 'fast'"),
        ({"impl": "cuda"}, "impl='cuda' needs tensors on a GPU; these are on cpu"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"scores": torch.zeros(2, 9), "num_kept": torch.tensor([1, 2]), "lengths": torch.tensor([9, 9])}
    with pytest.raises(ValueError, match=message):
        select_ragged(**(arguments | change))
