"""What the soak sends, and that it tells a wrong answer; in small it runs in tests/server/test_serve.py."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace as Stub

import pytest

from benchmarks.soak import Told, differs, draw, growth, send

TOLD = Told(["a", "b", "c"], [-0.1, -0.2, -0.3], [-3.0, -0.201, -3.0])


def test_a_seed_draws_the_same_requests():
    asks = [draw(7, number, "fastkv") for number in range(200)]
    assert asks == [draw(7, number, "fastkv") for number in range(200)]
    assert asks != [draw(8, number, "fastkv") for number in range(200)]
    assert len({(ask.method, json.dumps(ask.settings)) for ask in asks}) == 10
    assert {ask.leaves_after is None for ask in asks} == {True, False}


@pytest.mark.parametrize(
    ("again", "is_same"),
    [
        (TOLD, True),
        (replace(TOLD, logprobs=[-0.1, -0.2, -0.31]), True),
        (replace(TOLD, tokens=["a", "x", "y"], logprobs=[-0.1, -0.2, -9.0]), True),  # b and x were as good
        (replace(TOLD, tokens=["a", "b", "x"]), False),
        (replace(TOLD, logprobs=[-0.1, -0.3, -0.3]), False),
    ],
)
def test_a_wrong_answer_is_told(again, is_same):
    assert (differs(TOLD, again) is None) == is_same


@pytest.mark.parametrize(
    ("memory", "plain", "grows"),
    [
        ([900, 1000, 1050, 1090], [800, 1000, 1060], False),
        ([900, 1000, 1050, 1120], [800, 1000, 1060], True),
        ([900, 1000, 1050, 1120], [800, 1000, 1100], False),
        ([1000], [1000], False),
    ],
)
def test_memory_that_grows_more_than_plain_vllms_is_told(memory, plain, grows):
    assert (growth(memory, plain) is not None) == grows


@pytest.mark.parametrize("max_tokens", [2, 3])
def test_a_short_answer_is_told(max_tokens):
    logprobs = Stub(tokens=["a"], token_logprobs=[-0.1], top_logprobs=[{"a": -0.1, "b": -3.0}])
    chunks = [Stub(choices=[Stub(logprobs=logprobs)])] * 2
    client = Stub(completions=Stub(create=lambda **_: Chunks(chunks)))
    ask = replace(draw(0, 0, "fastkv"), leaves_after=None, max_tokens=max_tokens)
    with nullcontext() if max_tokens == 2 else pytest.raises(RuntimeError, match="2 tokens of 3 came back"):
        assert send(client, "tiny", ask) == Told(["a"] * 2, [-0.1] * 2, [-3.0] * 2)


class Chunks(list):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None
