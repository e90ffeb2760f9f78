"""An engine on FlashAttention's backend, its kernel written in plain torch, gives the reference's tokens.

Which tables, lengths, factors and schedules the kernel is given is checked; the kernel itself needs a GPU.
"""

from unittest import mock

import pytest

from fastkv_vllm.adapter import codes
from fastkv_vllm.kernels.encoded_attention import Kind
from tests import flash
from tests.engine.graphs import decode_graphs
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
    "adakv-int8",
    "snapkv-int4-all",
    "skvq",
    "quantspec",
    "think-values",
)


@pytest.fixture(scope="module")
def calls():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield flash.install(monkeypatch)


def test_requests_of_all_kinds(calls, start):
    engine = start("fastkv", SERVER)
    layer = next(iter(engine.core.vllm_config.compilation_config.static_forward_context.values()))
    assert type(layer.impl).__name__ == "FlashCompressionImpl"
    read = mock.patch.object(codes, "encoded_attention", wraps=codes.encoded_attention)
    with read as attend, engine.step_tokens(300):  # prompts come in chunks, beside requests that decode
        answer(engine, NAMES)
    parts = [part for call in attend.call_args_list for part in call.args[1]]
    assert {part.form.keys.kind for part in parts} == set(Kind) - {Kind.FLOAT8, Kind.HALVES_BY_TOKEN}, (
        "read where they lie"
    )
    assert any(part.form.skips_retained for part in parts), "merged layers, too"
    assert calls.keys() == {(how, what) for how in ("ordinary", "heads") for what in ("prefill", "decode")}
    answer(engine, ("adakv",), shift=3)  # alone: all its rows are read head by head


def test_decode_graphs(calls, start):
    engine = start("fastkv", SERVER)
    with decode_graphs(engine.worker.model_runner) as replays, engine.step_tokens(300):
        answer(engine, ("fastkv-evicting", "kivi", "lazyllm"))
        assert not replays, "there is more to do than to read"
        answer(engine, ("none", "snapkv", "fastkv", "adakv", "gemfilter", "duoattention"))
    assert replays.keys() >= {(4, 4), (2, 1)}, "a full batch, and padding"
