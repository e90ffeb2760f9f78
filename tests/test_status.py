"""The parts of the status page without a server: shares of stretches, ranks side by side, figures, HTML."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge

from fastkv_vllm.adapter.kept import MOST_STRETCHES, merged, shares
from fastkv_vllm.adapter.status import figures
from fastkv_vllm.adapter.status_page import Status, render

LAST = {
    "time_s": 0.0,
    "method": "snapkv",
    "num_tokens": 1000,
    "num_kept": [[250, 150], [100, 300]],
    "shares": [[[1.0, 0.04, 0.0, 0.5], [0.6, 0.0, 0.0, 0.0]], [[0.4, 0.0, 0.0, 0.0], [0.0, 1.0, 0.2, 0.0]]],
}
FIGURES = {
    "num_requests_running": {"": 3.0},
    "fastkv_requests_compressed": {"snapkv": 1.0},
    "fastkv_prompt_tokens_seen": {"snapkv": 1000.0},
    "fastkv_prompt_tokens_kept": {"snapkv": 200.0},
}
STATUS = Status("tiny", {"method": "snapkv"}, FIGURES, True, 1, LAST)


@pytest.mark.parametrize("num_tokens", [1, 7, MOST_STRETCHES, MOST_STRETCHES + 1, 1000])
def test_shares_count_each_position_once(num_tokens):
    positions = torch.arange(0, num_tokens, 3)
    found = shares(positions, num_tokens)
    num = min(MOST_STRETCHES, num_tokens)
    stretches = [[p for p in range(num_tokens) if p * num // num_tokens == i] for i in range(num)]
    expected = [len(set(positions.tolist()).intersection(stretch)) / len(stretch) for stretch in stretches]
    assert found == pytest.approx(expected, abs=5e-4)


def test_heads_of_ranks_stand_side_by_side():
    ranks = [LAST | {"num_kept": [[a], [b]], "shares": [[[a / 4]], [[b / 4]]]} for a, b in ((1, 2), (3, 4))]
    both = merged(ranks, 2)
    assert both is not None and both["num_kept"] == [[1, 3], [2, 4]] and both["shares"][1] == [[0.5], [1.0]]
    twice = merged([ranks[0], ranks[0], ranks[1], ranks[1]], 2)
    assert twice == both, "two ranks hold the same head"
    assert merged([None, None], 2) is None


def test_figures_are_added_over_engines_and_parted_by_their_own_label():
    registry = CollectorRegistry()
    counter = Counter("vllm:fastkv_cuts", "", ["model_name", "engine", "layer"], registry=registry)
    gauge = Gauge("vllm:num_requests_running", "", ["model_name", "engine"], registry=registry)
    for engine in ("0", "1"):
        counter.labels("tiny", engine, "5").inc(2)
        gauge.labels("tiny", engine).set(3)
    counter.labels("tiny", "0", "6").inc()
    found = figures(registry.collect())
    assert found["fastkv_cuts"] == {"5": 4, "6": 1} and found["num_requests_running"] == {"": 6}


def test_rows_that_came_back_are_counted():
    page = render(replace(STATUS, figures=FIGURES | {"fastkv_revived_rows": {"": 1234.0}}))
    assert "came back" not in render(STATUS) and "rows that came back while decoding" in page and "1,234" in page


def test_the_map_has_each_share():
    page = render(STATUS)
    assert "1,000 tokens, 200 of them kept per layer and head (20.0%)" in page
    # A quarter of the width each; shades are tenths, rounded up: 1.0 twice, 0.04 and 0.2, 0.5, 0.6, 0.4.
    assert [page.count(f"stroke-opacity='{shade}'") for shade in (1.0, 0.28, 0.36, 0.6, 0.68, 0.52)] == [1] * 6
    assert page.count("h220.0") == 7


@pytest.mark.parametrize("field", ["model", "settings", "method"])
def test_nothing_becomes_markup(field):
    bad = "<script>alert('x')</script>"
    change = {"model": {"model": bad}, "settings": {"settings": {bad: bad}}, "method": {"last": LAST | {"method": bad}}}
    parser = HTMLParser()
    tags: list[str] = []
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    page = render(replace(STATUS, **change[field]))
    parser.feed(page)
    assert "script" not in tags and "&lt;script&gt;" in page


def test_it_says_what_it_does_not_know():
    assert "compression is off" in render(replace(STATUS, settings=None))
    assert "None yet." in render(replace(STATUS, last=None))
    silent = render(replace(STATUS, engine_answers=False))
    assert "has not answered" in silent and "<svg" not in silent
    assert "first of the server" in render(replace(STATUS, num_engines=2))
