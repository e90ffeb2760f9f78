"""`select`: the highest scores of each row, ties by the lower column, columns ascending."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkv_vllm.kernels.select import select
from tests.reference import Drop
from tests.reference.selection import select_positions

INF = float("inf")


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Scores with many ties and infinities, and a count."""
    num_columns = draw(st.integers(1, 70))
    score = st.one_of(st.integers(-2, 3).map(float), st.sampled_from([INF, -INF, 0.0]), st.floats(-9, 9, width=32))
    row = st.lists(score, min_size=num_columns, max_size=num_columns)
    return draw(st.lists(row, min_size=1, max_size=3)), draw(st.integers(1, num_columns))


def check_equal(found: Tensor, expected: list[list[int]]) -> None:
    assert found.dtype == torch.int64 and list(found.shape) == [len(expected), len(expected[0])]
    wrong = (found != torch.tensor(expected)).nonzero().tolist()
    assert wrong == [], f"first wrong [row, place]: {wrong[0]}: {found[tuple(wrong[0])]}"


@given(rows())
@settings(max_examples=400, derandomize=True, deadline=None)
def test_equals_the_sort_by_score_and_column(case: tuple[list[list[float]], int]) -> None:
    scores, count = case
    expected = [sorted(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:count]) for row in scores]
    check_equal(select(torch.tensor(scores, dtype=torch.float32), count), expected)


@given(rows())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_kept_are_the_highest(case: tuple[list[list[float]], int]) -> None:
    scores, count = torch.tensor(case[0], dtype=torch.float32), case[1]
    kept = select(scores, count)
    assert (kept[:, 1:] > kept[:, :-1]).all(), "not strictly ascending"
    for row, columns in zip(scores, kept, strict=True):
        dropped = [i for i in range(len(row)) if i not in columns.tolist()]
        assert not dropped or row[columns].min() >= row[dropped].max()


@pytest.mark.parametrize("num_columns", [1, 2, 31, 32, 33, 127, 128, 129, 1009])
@pytest.mark.parametrize("forced_from", [0.5, 0.9])
def test_equals_the_oracle(num_columns: int, forced_from: float) -> None:
    """Sinks and window at +inf, as the compressor forces them; scores rounded so that many are equal."""
    generator = torch.Generator().manual_seed(num_columns)
    scores = (torch.randn(3, num_columns, generator=generator) * 4).round()
    drop = Drop("streamingllm", 0, int(num_columns * forced_from), num_sink=min(2, num_columns))
    forced = [p for p in range(num_columns) if drop.is_forced(p)]
    positions = range(num_columns)
    for count in {len(forced), (len(forced) + num_columns) // 2, num_columns}:
        expected = [select_positions(row, positions, count, drop) for row in scores.tolist()]
        filled = scores.clone()
        filled[:, forced] = INF
        check_equal(select(filled, count), expected)


@pytest.mark.parametrize("num_columns", [1, 7, 16, 17, 211])
def test_all_columns(num_columns: int) -> None:
    scores = torch.randn(2, num_columns, generator=torch.Generator().manual_seed(0))
    check_equal(select(scores, num_columns), [list(range(num_columns))] * 2)


@pytest.mark.parametrize("value", [0.0, -INF, INF, 1e-45])
@pytest.mark.parametrize("num_columns", [5, 16, 1003])
def test_equal_scores_keep_the_first_columns(num_columns: int, value: float) -> None:
    check_equal(select(torch.full((2, num_columns), value), 4), [[0, 1, 2, 3]] * 2)


def test_minus_zero_equals_zero() -> None:
    check_equal(select(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2), [[0, 1]])


def test_infinity_forces_columns() -> None:
    scores = torch.tensor([[9.0, INF, 8.0, 7.0, INF], [INF, 1.0, 2.0, INF, 3.0]])
    check_equal(select(scores, 2), [[1, 4], [0, 3]])
    check_equal(select(scores, 3), [[0, 1, 4], [0, 3, 4]])
    check_equal(select(scores, 1), [[1], [0]])  # more forced than room: the lower column


def test_strided_scores_and_inputs_unchanged() -> None:
    whole = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    before = whole.clone()
    view = whole[::2, 1:4].T
    check_equal(select(view, 5), select(view.contiguous(), 5).tolist())
    check_equal(select(view[:1].expand(3, -1), 5), select(view[:1].contiguous(), 5).tolist() * 3)
    assert torch.equal(whole, before)


def test_no_rows() -> None:
    assert select(torch.zeros(0, 9), 4).shape == (0, 4)


BAD_SCORES = [torch.zeros(9), torch.zeros(1, 2, 9), torch.zeros(2, 9).double(), torch.zeros(2, 9).bfloat16()]


@pytest.mark.parametrize("scores", BAD_SCORES, ids=["1-D", "3-D", "float64", "bfloat16"])
def test_bad_scores_are_refused(scores: Tensor) -> None:
    with pytest.raises(ValueError, match=r"scores must be \[R, N\] float32; got \[") as error:
        select(scores, 2)
    assert str(error.value).endswith(f"{list(scores.shape)} {scores.dtype}")


@pytest.mark.parametrize(("num_columns", "num_kept"), [(9, 0), (9, -1), (9, 10), (0, 0), (0, 1)])
def test_bad_counts_are_refused(num_columns: int, num_kept: int) -> None:
    with pytest.raises(ValueError, match=rf"num_kept must be in 1\.\.{num_columns}; got {num_kept}"):
        select(torch.zeros(2, num_columns), num_kept)
