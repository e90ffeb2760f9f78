"""An engine on FlashAttention's backend, its kernel written in plain torch, gives the reference's tokens.

Which tables, lengths, factors and schedules the kernel is given is checked; the kernel itself needs a GPU.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from fastkv_vllm.adapter import codes
from fastkv_vllm.kernels.encoded_attention import Kind
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


SIZES = (4, 2)  # of captured batches, the largest first, as vLLM has them


@contextmanager
def decode_graphs(runner):
    """Within it, vLLM hands decode steps to graphs, which are captured first.

    A replay is the model called with the metadata of the capture: what is built for the step counts by what it leaves
    in their tensors. Yields how many there were, by captured size and requests.
    """
    builder, captured, replays = runner._builder, {}, Counter()
    capture, build = builder.build_for_cudagraph_capture, builder.build

    def dispatch(num_tokens, uniform_decode=False, valid_modes=None, **others):
        size = min((size for size in SIZES if size >= num_tokens), default=None)
        if not uniform_decode or size is None or CUDAGraphMode.FULL not in (valid_modes or {CUDAGraphMode.FULL}):
            return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)
        return CUDAGraphMode.FULL, BatchDescriptor(size, size, uniform=True)

    def keep(common):
        captured[common.num_reqs] = capture(common)
        return captured[common.num_reqs]

    def replay(common_prefix_len, common, fast_build=False):
        metadata = build(common_prefix_len, common, fast_build)
        if builder.batch is None or not builder.batch.in_graph:
            return metadata
        replays[common.num_reqs, len(builder.batch.held)] += 1
        return captured[common.num_reqs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.cudagraph_dispatcher, "dispatch", dispatch)
        patch.setattr(builder, "build_for_cudagraph_capture", keep)
        patch.setattr(builder, "build", replay)
        for size in SIZES:
            runner._dummy_run(size, CUDAGraphMode.FULL, uniform_decode=True, is_graph_capturing=True)
        yield replays


def test_decode_graphs(calls, start):
    engine = start("fastkv", SERVER)
    with decode_graphs(engine.worker.model_runner) as replays, engine.step_tokens(300):
        answer(engine, ("fastkv-evicting", "kivi", "lazyllm"))
        assert not replays, "there is more to do than to read"
        answer(engine, ("none", "snapkv", "fastkv", "adakv", "gemfilter", "duoattention"))
    assert replays.keys() >= {(4, 4), (2, 1)}, "a full batch, and padding"
