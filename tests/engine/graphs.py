"""Decode steps as graphs run them: what is built for a step counts by what it leaves in tensors that stay."""

from collections import Counter
from contextlib import contextmanager

import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

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
