"""The registry and what holds for every method in it."""

import inspect
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.kernels.select import select
from fastkv_vllm.methods import (
    Method,
    RankWatch,
    add_heads,
    attention_mass,
    density,
    guarded_pages,
    halting_pages,
    kept_norms,
    last_attention,
    method_class,
    method_names,
    recall_by_pages,
    register,
)
from tests.reference import Drop
from tests.reference.budgets import guard, halt, recalls_by_pages
from tests.reference.scores import voters_density, voters_scores
from tests.reference.selection import relative_variance

WINDOW, HEADS, GROUP, HEAD_DIM = 8, 2, 4, 64
EACH_METHOD = pytest.mark.parametrize("name", method_names())
ONE_CHOICE = [name for name in method_names() if method_class(name).one_choice]
WINDOW_METHODS = [  # those that pool over positions
    name
    for name in method_names()
    if "queries" in method_class(name).needs and name not in ONE_CHOICE and name != "vl_cache"
]
PROPAGATING = [name for name in method_names() if method_class(name).propagates]


def make(name: str) -> Method:
    return CompressionConfig(name).make_method()


def make_inputs(num_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return {
        "queries": torch.randn(WINDOW, HEADS * GROUP, HEAD_DIM, generator=generator) * HEAD_DIM**-0.5,
        "keys": torch.randn(HEADS, num_tokens, HEAD_DIM, generator=generator),
        "positions": torch.arange(num_tokens),
        "column_sums": torch.rand(HEADS, num_tokens, generator=generator),
    }


def score(name: str, inputs: dict[str, Tensor]) -> Tensor:
    method = make(name)
    return method.score(**{need: inputs[need] for need in method.needs})


def force(scores: Tensor, num_sink: int) -> Tensor:
    scores = scores.clone()
    scores[:, :num_sink] = scores[:, -WINDOW:] = torch.inf
    return scores


def test_the_registry_names_the_published_systems() -> None:
    assert set(method_names()) >= {"fastkv", "snapkv", "streamingllm", "h2o", "tova", "vatp", "a2sf"}
    assert len(set(method_names())) == len(method_names())
    assert sorted(PROPAGATING) == ["asl", "fastkv", "gemfilter", "lazyllm", "pyramidinfer"]


@EACH_METHOD
def test_declarations(name: str) -> None:
    cls = method_class(name)
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}( v\d+)?, section.*", cls.source)
    assert cls.source.partition(",")[0].split()[1] in (inspect.getdoc(cls) or ""), "the docstring names the paper"
    assert cls.__doc__ != Method.__doc__ and "Source:" in (cls.__doc__ or "")
    assert "Differences:" in (cls.__doc__ or ""), "where and why we differ from the paper"
    assert isinstance(cls.propagates, bool) and cls.default_num_sink >= 0
    assert name == name.lower() and issubclass(cls, Method)


@EACH_METHOD
def test_needs_are_what_score_takes(name: str) -> None:
    cls = method_class(name)
    _, *parameters = inspect.signature(cls.score).parameters.values()
    assert [p.name for p in parameters] == list(cls.needs)
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert cls.needs and set(cls.needs) <= set(make_inputs(9))


@EACH_METHOD
def test_objects_are_frozen_and_equal_by_value(name: str) -> None:
    assert make(name) == make(name)
    with pytest.raises(AttributeError):
        make(name).window_size = 9  # type: ignore[misc]


@EACH_METHOD
@pytest.mark.parametrize("num_tokens", [WINDOW + 1, 31, 32, 33, 211])
def test_scores_rate_each_entry(name: str, num_tokens: int) -> None:
    scores = score(name, make_inputs(num_tokens))
    assert scores.dtype == torch.float32
    assert scores.shape[1] == num_tokens and scores.shape[0] in (1, HEADS)
    assert torch.isfinite(scores[:, :-WINDOW]).all()
    assert torch.equal(scores, score(name, make_inputs(num_tokens))), "stateless: twice the same"


@EACH_METHOD
@pytest.mark.parametrize("num_tokens", [WINDOW + 2, 33, 211])
def test_highest_scores_sinks_and_window_stay(name: str, num_tokens: int) -> None:
    num_sink = min(method_class(name).default_num_sink, num_tokens - WINDOW - 1)
    scores = force(score(name, make_inputs(num_tokens)), num_sink)
    for count in {num_sink + WINDOW, (num_sink + WINDOW + num_tokens) // 2}:
        for row, kept in zip(scores, select(scores, count).tolist(), strict=True):
            dropped = sorted(set(range(num_tokens)) - set(kept))
            assert len(kept) == count and kept == sorted(set(kept))
            assert {*range(num_sink), *range(num_tokens - WINDOW, num_tokens)} <= set(kept)
            assert row[kept].min() >= row[dropped].max()


@EACH_METHOD
def test_full_budget_is_identity(name: str) -> None:
    scores = force(score(name, make_inputs(97)), 4)
    assert select(scores, 97).tolist() == [list(range(97))] * len(scores)


@pytest.mark.parametrize("name", WINDOW_METHODS)
def test_a_key_the_window_looks_for_stays(name: str) -> None:
    """Planted in one KV head, it stays there, with its pooled neighbours, and not in the other."""
    inputs = make_inputs(211)
    inputs["queries"] = inputs["queries"][:1].expand(WINDOW, -1, -1)  # the window's queries agree
    inputs["keys"][1, 60] = inputs["queries"][0, GROUP:].sum(dim=0) * HEAD_DIM**0.5 * 4
    scores = force(score(name, inputs), 0)
    kept = select(scores, WINDOW + 7)
    assert kept[1].tolist() == [*range(57, 64), *range(203, 211)]
    assert kept[0].tolist() != kept[1].tolist()


@pytest.mark.parametrize("num_tokens", [40, 97, 20_011])
def test_streamingllm_keeps_sinks_and_the_most_recent(num_tokens: int) -> None:
    scores = force(score("streamingllm", make_inputs(num_tokens)), 4)
    expected = [0, 1, 2, 3, *range(num_tokens - 16, num_tokens)]
    assert select(scores, 20).tolist() == [expected]


def test_streamingllm_follows_positions_not_columns() -> None:
    positions = torch.tensor([0, 5, 9, 40, 1000])
    assert score("streamingllm", {"positions": positions}).tolist() == [[0.0, 5.0, 9.0, 40.0, 1000.0]]


@pytest.mark.parametrize("name", ["dbudgetkv", "snapkv"])
@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3, 0.6])
def test_the_halting_rule_drops_as_long_as_it_may(name: str, loss: float) -> None:
    """Pages by prefix sums are those of a loop that drops entry by entry."""
    num_tokens, size = 211, 16
    inputs, tail = make_inputs(num_tokens), num_tokens % 16
    inputs["queries"] = inputs["queries"] * 3  # some keys stand out
    drop = Drop(name, num_tokens, num_tokens - WINDOW, num_sink=4, block_size=size, halting_loss=loss)
    attention = last_attention(inputs["queries"][-1], inputs["keys"])
    scores = score(name, inputs).expand(HEADS, -1)
    norms = kept_norms(force(scores, 4)[:, : num_tokens - tail], attention, size)
    everything = [[num_tokens] * HEADS]
    (counts,) = halt(drop, everything, [scores], [inputs["positions"]], [attention.flatten(0, 1)], num_tokens)
    assert counts == [halting_pages(norms, loss, least=1) * size + tail] * HEADS
    assert len(norms) == num_tokens // size + 1 and bool((norms.diff() >= 0).all())


def test_the_halting_rule_stays_within_its_bounds() -> None:
    norms = torch.tensor([0.5, 0.8, 0.9, 1.0])
    assert [halting_pages(norms, loss, least=1) for loss in (0.6, 0.3, 0.15, 0.01)] == [1, 2, 3, 3]
    assert halting_pages(norms, 0.6, least=2) == 2


@pytest.mark.parametrize("floor", [0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["snapkv", "streamingllm", "tova"])
def test_the_guard_takes_the_first_pages_that_are_enough(name: str, floor: float) -> None:
    """Recalls by prefix sums, mean over layers, are those of sets of entries that are added up one by one."""
    num_tokens, size = 211, 16
    layers, tail = [make_inputs(num_tokens), make_inputs(num_tokens)], num_tokens % 16
    layers[1]["queries"] = layers[1]["queries"] * 3  # some keys stand out
    drop = Drop(
        name,
        192 + tail,
        num_tokens - WINDOW,
        num_sink=4,
        block_size=size,
        min_recall=floor,
        num_planned=32 + tail,
    )
    scores = [score(name, inputs).expand(HEADS, -1) for inputs in layers]
    found = [
        recall_by_pages(force(of, 4)[:, : num_tokens - tail], attention_mass(inputs["queries"], inputs["keys"]), size)
        for of, inputs in zip(scores, layers, strict=True)
    ]
    recall = torch.stack(found).mean(dim=0)[:12]
    votes = []
    for inputs in layers:
        rows = torch.zeros(num_tokens, HEADS * GROUP, HEAD_DIM, dtype=torch.float64)
        rows[-WINDOW:] = inputs["queries"] * HEAD_DIM**0.5
        votes.append(voters_scores(rows.transpose(0, 1), inputs["keys"].double(), WINDOW))
    expected = recalls_by_pages(drop, scores, [inputs["positions"] for inputs in layers], votes)
    assert recall[1:].tolist() == pytest.approx(expected, abs=1e-6) and expected == sorted(expected)
    assert guarded_pages(recall, floor, least=2) * size + tail == guard(drop, expected)


def test_the_guard_stays_within_its_bounds() -> None:
    recall = torch.tensor([0.3, 0.6, 0.8, 0.9])
    assert [guarded_pages(recall, floor, least=1) for floor in (0.2, 0.6, 0.7, 0.85, 0.95)] == [1, 2, 3, 4, 4]
    assert guarded_pages(recall, 0.2, least=3) == 3


@pytest.mark.parametrize("num_voters", [1, WINDOW, 50])
@pytest.mark.parametrize("num_tokens", [50, 211])
def test_vl_cache_adds_up_what_the_voters_look_at(num_voters: int, num_tokens: int) -> None:
    inputs = make_inputs(num_tokens)
    queries = torch.randn(num_voters, HEADS * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1)) / 3
    rows = torch.cat([torch.zeros(num_tokens - num_voters, *queries.shape[1:]), queries]).transpose(0, 1)
    expected = voters_scores(rows * HEAD_DIM**0.5, inputs["keys"], num_voters)
    torch.testing.assert_close(score("vl_cache", {"queries": queries, "keys": inputs["keys"]}), expected)
    dense = voters_density(rows.double() * HEAD_DIM**0.5, inputs["keys"].double(), num_voters)
    assert density(queries, inputs["keys"]).tolist() == pytest.approx(dense, rel=1e-6)
    assert len(set(dense)) > 1 and max(dense) < 1, "the test needs heads that look at part of the keys"


@pytest.mark.parametrize("measure_layer", [2, 4])
def test_ranks_settle_where_a_loop_says_so(measure_layer: int) -> None:
    """Ratings that grow alike from layer to layer, ties among them."""
    generator = torch.Generator().manual_seed(measure_layer)
    drop = Drop("asl", 60, 190, num_sink=3, rank_variance=0.5, min_tsp_layer=measure_layer)
    common = torch.rand(203, generator=generator)
    ratings = [(common + torch.rand(203, generator=generator) * 0.85**layer).mul(40).round() for layer in range(9)]
    watch, forced = RankWatch(0.5, measure_layer, 60 - 16), [p for p in range(203) if drop.is_forced(p)]
    free = [p for p in range(203) if p not in forced]
    found = [watch.has_settled(layer, rating[free]) for layer, rating in enumerate(ratings)]
    for layer in range(measure_layer + 1, 9):
        left = relative_variance(drop, [rating.tolist() for rating in ratings[: layer + 1]], 60, 203)
        assert found[layer] == (left <= 0.5)
    assert found[: measure_layer + 1] == [False] * (measure_layer + 1)
    assert {True, False} == set(found[measure_layer + 1 :]), "one of the answers was not tried"


def test_equal_ranks_have_settled() -> None:
    watch = RankWatch(0.3, 2, 5)
    assert [watch.has_settled(layer, torch.arange(20.0)) for layer in range(4)] == [False, False, False, True]


def test_tova_asks_the_last_query_only() -> None:
    inputs = make_inputs(211)
    first = score("tova", inputs)
    inputs["queries"] = torch.cat([torch.randn(WINDOW - 1, HEADS * GROUP, HEAD_DIM), inputs["queries"][-1:]])
    assert torch.equal(score("tova", inputs), first)
    logits = torch.einsum("hgd,hnd->hgn", inputs["queries"][-1].view(HEADS, GROUP, HEAD_DIM), inputs["keys"])
    expected = logits.softmax(dim=-1).sum(dim=1)
    torch.testing.assert_close(first[:, :-1], expected[:, :-1])


def test_heads_are_added_term_by_term() -> None:
    scores = torch.rand(7, 33)
    expected = scores[0].clone()
    for head in scores[1:]:
        expected += head
    assert torch.equal(add_heads(scores), expected)


def test_snapkv_and_fastkv_rate_entries_alike() -> None:
    inputs = make_inputs(211)
    assert torch.equal(score("snapkv", inputs), score("fastkv", inputs))


@pytest.mark.parametrize("num_tokens", [33, 211, 1003])
def test_propagation_adds_the_heads(num_tokens: int) -> None:
    scores = torch.randn(8, num_tokens, generator=torch.Generator().manual_seed(0)).abs()
    rating = make("fastkv").propagation_scores(scores)
    expected = scores[0].clone()
    for head in scores[1:]:
        expected += head
    assert rating.shape == (num_tokens,) and torch.equal(rating, expected)
    same = make("fastkv").propagation_scores(scores[:, :1].expand(-1, num_tokens).contiguous())
    assert len(set(same.tolist())) == 1, "equal columns must tie exactly"
    assert torch.equal(make("fastkv").propagation_scores(scores[:1]), scores[0])


@pytest.mark.parametrize("name", [name for name in method_names() if name not in PROPAGATING])
def test_others_do_not_propagate(name: str) -> None:
    with pytest.raises(TypeError, match=f"{method_class(name).__name__} does not propagate rows"):
        make(name).propagation_scores(torch.zeros(2, 9))


def test_unknown_name_lists_names() -> None:
    with pytest.raises(ValueError, match=f"unknown compression method 'h3o'; known: {', '.join(method_names())}$"):
        method_class("h3o")


def test_duplicate_name_is_refused_and_changes_nothing() -> None:
    @dataclass(frozen=True)
    class Other(Method):
        def score(self, *, positions: Tensor) -> Tensor:
            return positions.float().unsqueeze(0)

    before = method_names()
    with pytest.raises(ValueError, match="'fastkv' is already registered by FastKV"):
        register("fastkv")(Other)
    assert method_names() == before and method_class("fastkv").__name__ == "FastKV"
