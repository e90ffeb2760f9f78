"""An engine on FlashInfer's backend, its kernels written in plain torch, gives the reference's tokens.

What is planned, and which tables and lengths the kernels are given, is checked; the kernels themselves need a GPU.
"""

import pytest
from vllm.v1.attention.backend import AttentionCGSupport

from tests import flash_infer
from tests.engine.graphs import decode_graphs
from tests.engine.oracle import make_prompts
from tests.engine.requests import answer
from tests.engine.settings import DRAFTING, SERVER

NAMES = ("none", "snapkv", "fastkv", "adakv", "gemfilter", "duoattention", "lazyllm", "fastkv-evicting", "adakv-int8")


@pytest.mark.parametrize("hopper", [False, True], ids=["plans", "xqa"])
def test_requests_of_all_kinds(start, monkeypatch, hopper):
    calls = flash_infer.install(monkeypatch, hopper=hopper)
    engine = start("fastkv", SERVER, max_num_seqs=16 + hopper)  # another engine for each
    layer = next(iter(engine.core.vllm_config.compilation_config.static_forward_context.values()))
    assert type(layer.impl).__name__ == "FlashInferCompressionImpl"
    with engine.step_tokens(300):  # prompts come in chunks, beside requests that decode
        answer(engine, NAMES)
    decode = "xqa" if hopper else "decode"
    assert calls.keys() == {(how, what) for how in ("ordinary", "heads") for what in ("prefill", decode)}
    answer(engine, ("adakv",), shift=3)  # alone: all its rows are read head by head


def test_drafts(start, monkeypatch):
    """Several rows of a request are decoded at once, by masks for as many sequences as heads make."""
    calls = flash_infer.install(monkeypatch, hopper=True)
    engine = start("quantspec", DRAFTING, max_num_seqs=2)
    engine.check(make_prompts([611, 400]), max_tokens=9)
    assert calls["heads", "xqa"]


def test_decode_graphs(start, monkeypatch):
    """Tables and lengths stay in place where decode takes them; a plan would not."""
    calls = flash_infer.install(monkeypatch, hopper=True)
    engine = start("fastkv", SERVER, max_num_seqs=17)
    with decode_graphs(engine.worker.model_runner) as replays:
        answer(engine, ("none", "snapkv", "adakv", "duoattention"))
    assert replays.keys() >= {(4, 4)} and calls["heads", "xqa"]


@pytest.mark.parametrize("hopper", [False, True], ids=["plans", "xqa"])
def test_graphs_are_for_decode_without_a_plan(start, monkeypatch, hopper):
    flash_infer.install(monkeypatch, hopper=hopper)
    from fastkv_vllm.adapter.backends.flashinfer import FlashInferCompressionBuilder  # late: of what was installed

    runner = start("fastkv", SERVER, max_num_seqs=16 + hopper).worker.model_runner
    support = FlashInferCompressionBuilder.get_cudagraph_support(runner.vllm_config, runner._builder.kv_cache_spec)
    assert support == (AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if hopper else AttentionCGSupport.NEVER)
