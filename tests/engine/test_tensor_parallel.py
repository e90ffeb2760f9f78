"""Two ranks hold one KV head each: same tokens, same logprobs and same entries as on one rank."""

import os
from pathlib import Path

import pytest
import torch

from fastkv_vllm.adapter.kept import shares
from tests.engine.child import run
from tests.engine.harness import logprobs_of
from tests.engine.oracle import reference, tolerance
from tests.engine.requests import ask, filled
from tests.engine.settings import EXACT, RAGGED, SERVER
from tests.engine.test_kept import positions_of

NAMES = ["fastkv", "fastkv-cuts", "asl", "gemfilter", "snapkv", "tova", "h2o", "adakv", "duoattention"]


ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the workers
    "VLLM_PLUGINS": "fastkv,fastkv_status",  # what was kept last is noted
}


@pytest.fixture(scope="module")
def on_two_ranks(checkpoint: Path) -> dict:
    """What came of each, asked of one engine."""
    return run("tests.engine.tensor_parallel_run", str(checkpoint), *NAMES, "lazyllm", env=os.environ | ENVIRONMENT)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_with_one(start, checkpoint, on_two_ranks, name):
    """The subprocess has checked mixed batches against the reference, in chunks, too."""
    two, (method, settings) = on_two_ranks[name], (EXACT | RAGGED)[name]
    config, prompt = filled(method, settings), tuple(two["prompt"])
    require_same_answer(start("fastkv", SERVER), two, method, settings)

    expected = reference(checkpoint, config, prompt, 8)
    uneven = any(len(head) != len(layer[0]) for layer in expected.kept for head in layer)
    assert uneven == (name in RAGGED), "the test needs ranks that keep unequally many entries where heads share"
    assert two["last"]["shares"] == [[shares(head, len(prompt)) for head in layer] for layer in expected.kept]
    assert len(two["selections"]) == 2
    for rank, selections in enumerate(two["selections"]):
        columns = [torch.tensor(columns) for columns in selections]
        kept, tsp_indices = positions_of(columns, config, expected, len(prompt))
        assert [n.tolist() for n in tsp_indices] == [n.tolist() for n in expected.tsp_indices], f"rank {rank}"
        for layer, (got, want) in enumerate(zip(kept, expected.kept, strict=True)):
            assert got.tolist() == [want[rank].tolist()], f"rank {rank}, layer {layer}"


@pytest.mark.slow
def test_the_same_rows_come_back(start, checkpoint, on_two_ranks):
    """Each rank chooses by the votes of all heads: as many rows come back as in the reference, and say the same."""
    two, (method, settings) = on_two_ranks["lazyllm"], RAGGED["lazyllm"]
    require_same_answer(start("fastkv", SERVER), two, method, settings)
    expected = reference(checkpoint, filled(method, settings), tuple(two["prompt"]), 8)
    assert two["num_revived"] == expected.num_revived > 100
    first, second = two["selections"]
    assert first == second != []


@pytest.mark.slow
def test_two_ranks_draft_the_same_tokens(checkpoint):
    """The subprocess has checked their answers against the reference."""
    assert run("tests.engine.tensor_parallel_drafts_run", str(checkpoint), env=os.environ | ENVIRONMENT)["drafted"] > 0


def require_same_answer(engine, two, method, settings):
    """Tokens and logprobs of two ranks are those of one."""
    with engine.step_tokens(200):
        (one,) = ask(engine, [(tuple(two["prompt"]), method, settings)], 8)
    assert two["tokens"] == list(one.outputs[0].token_ids)
    assert max(abs(a - b) for a, b in zip(two["logprobs"], logprobs_of(one), strict=True)) < tolerance(None)
