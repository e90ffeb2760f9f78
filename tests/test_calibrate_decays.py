"""Shares of rows for PyramidInfer: the curves against a slow loop, and the choice."""

from pathlib import Path

import pytest
import torch

from fastkv_vllm.calibrate import CalibrationError
from fastkv_vllm.calibrate.decays import NUM_SHARES, Votes, choose_shares, mean_share, recall_curves
from fastkv_vllm.calibrate.model import CalibrationModel
from fastkv_vllm.calibrate.prompts import Prompt
from tests.reference import ReferenceModel, make_checkpoint

NUM_TOKENS, NUM_RECENT, NUM_SINK, NUM_QUERIES = 96, 19, 2, 3
TOKENS = tuple(torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist())
PROMPT = Prompt(TOKENS, (), None, range(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("decays") / "llama", "llama", num_layers=4)


def probabilities(checkpoint: Path) -> list[torch.Tensor]:
    """Causal attention of each layer of the reference model, [Hq, N, N]."""
    model, seen = ReferenceModel(checkpoint), []
    project = model._project
    model._project = lambda *args: seen.append(project(*args)) or seen[-1]  # type: ignore[method-assign]
    model.logits(TOKENS)
    layers = []
    for queries, keys, _ in seen:
        k = keys.repeat_interleave(len(queries) // len(keys), dim=0)
        logits = queries @ k.mT / queries.shape[-1] ** 0.5
        later = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)
        layers.append(logits.masked_fill(later, float("-inf")).softmax(dim=-1))
    return layers


def test_curves_are_those_of_the_loop(checkpoint: Path) -> None:
    layers = probabilities(checkpoint)
    weights = torch.linspace(1.0, 1.2, NUM_RECENT)
    expected = torch.ones(3, NUM_SHARES)
    for layer in range(3):
        votes = (layers[layer][:, -NUM_RECENT:] * weights[:, None]).sum(dim=(0, 1)).tolist()
        forced = [p for p in range(NUM_TOKENS) if p < NUM_SINK or p >= NUM_TOKENS - NUM_RECENT]
        rest = sorted(set(range(NUM_TOKENS)) - set(forced), key=lambda p: -votes[p])
        for i in range(NUM_SHARES):
            rows = [*forced, *rest][: (i + 1) * NUM_TOKENS // NUM_SHARES]
            for later in layers[layer + 1 :]:
                mass = float(later[:, -NUM_QUERIES:, rows].sum(dim=-1).mean())
                expected[layer, i] = min(float(expected[layer, i]), mass)
    curves = recall_curves(CalibrationModel(checkpoint, dtype="float32"), PROMPT, Votes(0.2, NUM_SINK, NUM_QUERIES))
    torch.testing.assert_close(curves, expected, atol=2e-5, rtol=0)
    assert (curves[:, -1] > 0.9999).all(), "all rows hold all of the mass"


def test_a_prompt_without_voters_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CalibrationError, match=r"0\.01 of a prompt must be a token at least; a prompt has 96"):
        recall_curves(CalibrationModel(checkpoint, dtype="float32"), PROMPT, Votes(recent_ratio=0.01))


def test_choice() -> None:
    rising = torch.arange(1, NUM_SHARES + 1) / NUM_SHARES
    first = torch.stack([rising, rising.sqrt(), rising])  # the last needs more again, but its rows are gone
    second = torch.stack([rising.pow(2), rising.sqrt(), rising])
    assert choose_shares(first[None], 0.5, 0) == [0.5, 0.25, 0.25]
    assert choose_shares(torch.stack([first, second]), 0.5, 0) == [0.71875, 0.25, 0.25]  # 23 / 32 squared is 0.517
    assert choose_shares(torch.stack([first, second]), 0.5, 100) == [0.5, 0.25, 0.25]
    assert choose_shares(first[None] * 0.9, 1.0, 0) == [1.0, 1.0, 1.0], "what no share reaches needs them all"
    assert mean_share([0.5, 0.25, 0.25]) == (0.5 + 0.25 + 0.25 + 0.25) / 4
