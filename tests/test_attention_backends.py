"""Steps of a small decoder on vLLM's own attention, against those on attention in plain torch.

Metadata are of vLLM's builders. Triton's kernels, attention and cache writes, run in Triton's interpreter, in a process
of its own. FlashAttention's are written in plain torch, strict about what they are given. Neither shows how a GPU
rounds, how fast it is, or whether a kernel compiles there.
"""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from vllm.config import CUDAGraphMode

from fastkv_vllm.adapter.backends.cpu import CPUCompressionBackend
from fastkv_vllm.adapter.backends.flash import FlashCompressionBackend
from tests import flash
from tests.engine.child import run as run_child
from tests.small_decoder import run
from tests.vllm_backends import backend_of

BY_HEADS = {"snapkv": False, "fastkv": False, "adakv": True, "fastkv-adaptive": True, "duoattention": True}
ON_TRITON = ("snapkv", "duoattention")  # even pages and uneven ones; an interpreter takes its time
TOLERANCE = 1e-5  # of rows of size 1; sums run in another order


def require_close(found: list[list[float]], expected: list[list[float]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())
        assert error < TOLERANCE, f"row {step} is off by {error}"


@pytest.mark.parametrize("name", BY_HEADS)
def test_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash.install(monkeypatch)
    require_close(run(name, backend=backend_of(FlashCompressionBackend)), run(name))
    assert any(how == "heads" for how, _ in calls) == BY_HEADS[name]
    assert any(how == "ordinary" for how, _ in calls), "the other request is read so"


IN_GRAPHS = (*BY_HEADS, "vatp", "vl_cache", "gemfilter", "kvsharer")


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_decode_graphs(name: str) -> None:
    """A captured step run again over the same tensors, requests fewer than it was captured for."""
    require_close(run(name, graph=True), run(name))


@pytest.mark.parametrize("name", BY_HEADS)
def test_decode_graphs_of_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash.install(monkeypatch)
    backend = backend_of(FlashCompressionBackend, CUDAGraphMode.FULL_AND_PIECEWISE)
    require_close(run(name, backend=backend, graph=True), run(name))
    assert calls["heads", "decode"], "graphs read all requests so"


@pytest.mark.parametrize("name", BY_HEADS)
def test_steps_beside_decode_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM keeps one schedule for graphs to read, each call has its own."""
    flash.install(monkeypatch)
    backend = backend_of(FlashCompressionBackend, CUDAGraphMode.FULL_AND_PIECEWISE)
    require_close(run(name, backend=backend), run(name))


@pytest.mark.parametrize("name", BY_HEADS)
def test_attention_of_the_cpu_engine(name: str) -> None:
    """Pages as its kernels lay them out."""
    require_close(run(name, backend=backend_of(CPUCompressionBackend)), run(name))


IN_CODES = ("int8", "fp8", "int4x2", "skvq", "think", "think-int4", "minicache")


@pytest.mark.parametrize("name", IN_CODES)
def test_codes_are_read_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a copy, by the same attention: one that rounds otherwise would give other codes."""
    calls, backend = flash.install(monkeypatch), backend_of(FlashCompressionBackend)
    found = run(name, backend=backend)
    assert calls and not any(how == "heads" for how, _ in calls), "nothing is read head by head from a copy"
    require_close(found, run(name, backend=replace(backend, takes_codes=False)))
    assert any(how == "heads" for how, _ in calls)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_triton_attention() -> None:
    found = run_child("tests.triton_attention_run", *ON_TRITON, env=dict(os.environ))
    for name in ON_TRITON:
        require_close(found[name]["rows"], run(name))
        assert bool(found[name]["num_by_heads"]) == BY_HEADS[name] and found[name]["num_ordinary"]
    require_close(found[ON_TRITON[-1]]["in_graph"], run(ON_TRITON[-1]))
    for name in ("int8", "skvq"):
        require_close(found[name]["rows"], run(name))
