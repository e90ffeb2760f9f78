"""Run by test_attention_backends.py in a process of its own: Triton attention, interpreted, in a small decoder's steps.

In one run more only codes are Triton's work: attention that rounds otherwise would give other codes.
"""

import sys
from typing import Any

import tests.interpreted  # isort: skip # noqa: F401 - before vLLM

import torch

torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM asks before it writes to the cache

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.triton_utils import HAS_TRITON  # noqa: E402
from vllm.v1.attention.backends import triton_attn  # noqa: E402

from fastkv_vllm.adapter.backends.triton import TritonCompressionBackend  # noqa: E402
from fastkv_vllm.kernels import encoded_attention, quantise  # noqa: E402
from tests.engine.child import report  # noqa: E402
from tests.small_decoder import run  # noqa: E402
from tests.vllm_backends import backend_of  # noqa: E402

GRAPHS = CUDAGraphMode.FULL_AND_PIECEWISE


def main(names: list[str]) -> None:
    """Rows of each, the calls that read heads one by one, of the last the rows of decode graphs, and those of codes."""
    assert HAS_TRITON, "vLLM's kernels are placeholders"
    original, calls = triton_attn.unified_attention, []

    def counted(**arguments: Any) -> None:
        calls.append(arguments["k"].shape[2])
        original(**arguments)

    triton_attn.unified_attention = counted
    results = {}
    for name in names:
        calls.clear()
        rows = run(name, backend=backend_of(TritonCompressionBackend))
        results[name] = {"rows": rows, "num_by_heads": calls.count(1), "num_ordinary": len(calls) - calls.count(1)}
    in_graph = run(names[-1], backend=backend_of(TritonCompressionBackend, GRAPHS), graph=True)
    results[names[-1]]["in_graph"] = in_graph
    for op in (encoded_attention, quantise):
        op.choose = lambda impl, device: "triton"  # as on a GPU
    for name in ("int8", "skvq"):
        results[name] = {"rows": run(name)}
    report(results)


if __name__ == "__main__":
    main(sys.argv[1:])
