"""Two ranks hold one KV head each: same tokens, same logprobs and same entries as on one rank."""

import os
from pathlib import Path

import pytest
import torch

from tests.engine.child import run
from tests.engine.harness import logprobs_of
from tests.engine.oracle import reference, tolerance
from tests.engine.settings import EXACT
from tests.engine.test_kept import positions_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastkv", "fastkv-cuts", "asl", "gemfilter", "snapkv", "tova", "h2o"])
def test_two_ranks_agree_with_one(start, checkpoint, name):
    """The subprocess has checked the mixed batch against the reference, in chunks, too."""
    two = run_on_two_ranks(checkpoint, name)
    engine = start(*EXACT[name])
    prompt = tuple(two["prompt"])
    with engine.step_tokens(200):
        (one,) = engine.check([prompt], max_tokens=8)
    assert two["tokens"] == list(one.outputs[0].token_ids)
    assert max(abs(a - b) for a, b in zip(two["logprobs"], logprobs_of(one), strict=True)) < tolerance(None)

    expected = reference(checkpoint, engine.config, prompt, 8)
    assert len(two["selections"]) == 2
    for rank, selections in enumerate(two["selections"]):
        columns = [torch.tensor(columns) for columns in selections]
        kept, tsp_indices = positions_of(columns, engine.config, expected, len(prompt))
        assert [n.tolist() for n in tsp_indices] == [n.tolist() for n in expected.tsp_indices], f"rank {rank}"
        for layer, (got, want) in enumerate(zip(kept, expected.kept, strict=True)):
            assert got.tolist() == [want[rank].tolist()], f"rank {rank}, layer {layer}"


def run_on_two_ranks(checkpoint: Path, name: str) -> dict:
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the workers
    }
    return run("tests.engine.tensor_parallel_run", str(checkpoint), name, env=environment)
