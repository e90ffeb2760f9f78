"""An engine on FlashAttention's backend, its kernel written in plain torch, gives the reference's tokens.

Which tables, lengths, factors and schedules the kernel is given is checked; the kernel itself needs a GPU.
"""

import pytest

from tests import flash
from tests.engine.requests import answer
from tests.engine.settings import SERVER

NAMES = (
    "none",
    "snapkv",
    "fastkv",
    "adakv",
    "gemfilter",
    "duoattention",
    "lazyllm",
    "fastkv-evicting",
    "kivi",
    "minicache",
)


@pytest.fixture(scope="module")
def calls():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield flash.install(monkeypatch)


def test_requests_of_all_kinds(calls, start):
    engine = start("fastkv", SERVER)
    layer = next(iter(engine.core.vllm_config.compilation_config.static_forward_context.values()))
    assert type(layer.impl).__name__ == "FlashCompressionImpl"
    with engine.step_tokens(300):  # prompts come in chunks, beside requests that decode
        answer(engine, NAMES)
    assert calls.keys() == {(how, what) for how in ("ordinary", "heads") for what in ("prefill", "decode")}
    answer(engine, ("adakv",), shift=3)  # alone: all its rows are read head by head
