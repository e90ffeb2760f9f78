"""MiniCache's report: what is read is what serving would read, and what is lost is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.merging import MergingSettings, MergingTrial
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.codecs import NO_CODEC
from tests.reference import make_checkpoint
from tests.reference.codecs import stored
from tests.reference.merging import merge_pair

NUM_ANSWER = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CalibrationModel:
    """Four layers; what the attention of the last two finds is thrown away by their output projections."""
    directory: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_layers=4)
    weights = load_file(directory / "model.safetensors")
    for layer in (2, 3):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:] = 0.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return CalibrationModel(directory)


@pytest.fixture(scope="module")
def prompts(model: CalibrationModel) -> list[Prompt]:
    """Their answers are the model's own."""
    made = []
    for row in torch.randint(3, 500, (4, 60), generator=torch.Generator().manual_seed(3)).tolist():
        answer: list[int] = []
        for _ in range(NUM_ANSWER):
            answer += model.next_tokens((*row, *answer), 1, lambda _, *entries: causal_attention(*entries)).tolist()
        made.append(Prompt(tuple(row), tuple(answer), None, range(0)))
    return made


def trial(model: CalibrationModel, prompts: list[Prompt], **settings) -> MergingTrial:
    work = MergingTrial(model, prompts, MergingSettings(num_queries=16, **settings))
    for index in range(len(prompts)):
        work.step(index)
    return work


@pytest.mark.parametrize("merge_layers", ["values", "keys_and_values"])
def test_what_merged_layers_lose(model: CalibrationModel, prompts: list[Prompt], merge_layers: str) -> None:
    """Nothing where nothing hangs on them, though their attention changes; much where something does."""
    late = trial(model, prompts, merge_layers=merge_layers, merge_gamma=0.0)
    assert late.owners == (0, 1, 2, 2)
    found = late.found()
    assert found["num_right"] == 4 * NUM_ANSWER
    assert found["lost"] == found["lost_by_pair"][2] == 0 and found["changed_by_pair"][2] > 0.1
    assert min(found["lost_by_pair"][:2]) > 0
    early = trial(model, prompts, merge_layers=merge_layers, merge_gamma=0.0, first_layer=0)
    assert early.owners == (0, 0, 2, 2)
    assert early.found()["lost"] == found["lost_by_pair"][0]
    assert early.found()["lost_by_pair"] == found["lost_by_pair"]


@pytest.mark.parametrize(
    ("merge_layers", "codec"),
    [("values", None), ("keys_and_values", None), ("values", "int2"), ("keys_and_values", "int4")],
)
def test_only_the_last_tokens_read_merged_entries(
    model: CalibrationModel, prompts: list[Prompt], merge_layers: str, codec: str | None
) -> None:
    """With entries that a reference merges, or only stores, the model predicts what the trial counts with."""
    prompt, entries, rows = prompts[0], [], {}
    settings = MergingSettings(merge_layers=merge_layers, merge_gamma=0.3, num_queries=16, codec=codec or NO_CODEC)
    token_ids = (*prompt.token_ids, *prompt.answer_ids)
    num_read = len(token_ids) - 16

    def attend(layer, queries, keys, values):
        entries.append((keys, values))
        return causal_attention(queries, keys, values)

    model.prefill(token_ids, attend)
    layers = [[*zip(keys[:, :num_read], values[:, :num_read], strict=True)] for keys, values in entries[:2]]
    most = -(-3 * num_read // 10)
    merged = [
        merge_pair(*pair, t=0.6, gamma=0.3, most=most, values_only=merge_layers == "values", codec=codec)
        for pair in zip(*layers, strict=True)
    ]  # [head][layer][keys or values]
    alone = [[stored(codec or "exact", *own) for own in pair] for pair in zip(*layers, strict=True)]

    def lost_reading(read) -> float:
        """Share of the answer with these entries of the first two layers; nothing hangs on the others."""

        def attend_them(layer, queries, keys, values):
            out = causal_attention(queries, keys, values)
            if layer > 1:
                return out
            keys, values = keys.clone(), values.clone()
            for head, parts in enumerate(read):
                keys[head, :num_read], values[head, :num_read] = parts[layer]
            last = causal_attention(queries, keys, values)
            rows[layer] = float((last - out)[:, num_read:].norm() / out[:, num_read:].norm())
            return torch.cat([out[:, :num_read], last[:, num_read:]], dim=1)

        likely = model.next_tokens(token_ids, NUM_ANSWER + 1, attend_them)[:-1]
        return float((likely != torch.tensor(prompt.answer_ids)).float().mean())

    work = MergingTrial(model, [prompt], settings)
    work.step(0)
    found = work.found()
    assert found["lost"] == pytest.approx(lost_reading(alone))
    assert found["lost_by_pair"][0] == pytest.approx(lost_reading(merged))
    assert found["changed_by_pair"][0] == pytest.approx((rows[0] + rows[1]) / 2, rel=1e-4 if codec is None else 1e-2)
    assert codec != "int2" or found["lost"] > 0, "codes of two bits must be felt"


def test_what_cannot_be_measured_is_told(model: CalibrationModel, prompts: list[Prompt]) -> None:
    with pytest.raises(CalibrationError, match="must have more than the 60 tokens that read merged entries; one has"):
        MergingTrial(model, prompts, MergingSettings(num_queries=60))
    with pytest.raises(CalibrationError, match="--first-layer must leave a pair of the model's 4 layers; 3 leaves"):
        MergingTrial(model, prompts, MergingSettings(num_queries=16, first_layer=3))
    wrong = replace(prompts[0], answer_ids=tuple(1 + (token + 7) % 400 for token in prompts[0].answer_ids))
    with pytest.raises(CalibrationError, match="the model must predict tokens of the answers; it predicts none"):
        trial(model, [wrong]).found()
