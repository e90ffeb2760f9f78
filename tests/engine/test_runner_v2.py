"""Model Runner V2: the tokens of the reference by vLLM's own runner, whose few Triton kernels are interpreted."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engine.child import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")]


def run_on_v2(checkpoint: Path, how: str) -> dict[str, Any]:
    """The subprocess holds each answer against the reference, and looks for what is left behind."""
    module = "tests.engine.runner_v2_run"
    return run(module, str(checkpoint), how, env=os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "1"})


def test_preempted_warmed_up_and_aborted(checkpoint: Path) -> None:
    found = run_on_v2(checkpoint, "in_turn")
    assert {True, False} == set(found["preempted"]), "before and after compaction"
    assert len(found["positions"]) > 20 and all(found["positions"]), "the sampler sees true positions"
    assert found["num_compressed"] >= 7 and found["compact_us"] > 0
    rows_in, rows_out = found["tsp_rows"]
    assert 0 < rows_out < rows_in / 2


def test_steps_scheduled_ahead_and_decode_graphs(checkpoint: Path) -> None:
    found = run_on_v2(checkpoint, "run_ahead")
    assert found["num_beside"] == 0 and found["num_revived"] > 100, "there is more to do than to read"
    assert {tuple(key) for key in found["replays"]} >= {(4, 4), (2, 1)}, "a full batch, and padding"
