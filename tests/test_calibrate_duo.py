"""DuoAttention's gates: streaming attention against a dense mask, gates of heads made useless or needed."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkv_vllm.calibrate.duo import DuoSettings, GateTrainer, streaming_attention
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from tests.reference import make_checkpoint

HEAD_DIM, GROUP_SIZE = 32, 2
SETTINGS = DuoSettings(num_steps=80, num_sink=1, window_size=6)


def prompts(count: int, length: int = 40) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 512, (count, length + 3), generator=generator).tolist()
    return [Prompt(tuple(row[:length]), tuple(row[length:]), None, range(0)) for row in ids]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of two KV heads; what KV head 1 of layer 0 finds is thrown away by the output projection."""
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_layers=2)
    weights = load_file(directory / "model.safetensors")
    columns = slice(GROUP_SIZE * HEAD_DIM, 2 * GROUP_SIZE * HEAD_DIM)
    weights["model.layers.0.self_attn.o_proj.weight"][:, columns] = 0.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def model(checkpoint: Path) -> CalibrationModel:
    return CalibrationModel(checkpoint)


@pytest.mark.parametrize(
    ("num_tokens", "num_sink", "window_size"),
    [(1, 0, 1), (1, 4, 8), (127, 4, 16), (129, 4, 16), (300, 0, 1), (300, 7, 131), (257, 128, 128), (300, 400, 3)],
)
def test_streaming_is_the_dense_mask(num_tokens: int, num_sink: int, window_size: int) -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(heads, num_tokens, 8) for heads in (4, 2, 2))
    out = streaming_attention(queries, keys, values, num_sink=num_sink, window_size=window_size)
    logits = queries @ keys.repeat_interleave(2, dim=0).mT
    for i in range(num_tokens):
        for j in range(num_tokens):
            if j > i or (j >= num_sink and i - j >= window_size):
                logits[:, i, j] = -torch.inf
    expected = logits.softmax(dim=-1) @ values.repeat_interleave(2, dim=0)
    torch.testing.assert_close(out, expected)


def test_all_seen_is_full_attention() -> None:
    queries, keys, values = (torch.randn(heads, 200, 8) for heads in (4, 2, 2))
    full = causal_attention(queries, keys, values)
    for sink, window in ((0, 200), (200, 1)):
        out = streaming_attention(queries, keys, values, num_sink=sink, window_size=window)
        torch.testing.assert_close(out, full)


def test_learning_rate_rises_and_falls() -> None:
    rates = [DuoSettings(num_steps=2000).learning_rate_at(step) for step in range(2000)]
    assert rates[0] == pytest.approx(0.002) and rates[399] == rates[1000] == rates[1600] == 0.02
    assert rates[1800] == pytest.approx(0.01) and rates[1999] == pytest.approx(0.002)
    assert all(a <= b for a, b in itertools.pairwise(rates[:400]))
    assert all(0 < DuoSettings(num_steps=n).learning_rate_at(n - 1) <= 0.02 for n in (1, 2, 4, 5))


def test_gates_of_needed_heads_stay_and_of_useless_heads_fall(model: CalibrationModel) -> None:
    trainer = GateTrainer(model, prompts(5), SETTINGS)
    for index in range(SETTINGS.num_steps):
        trainer.step(index)
    gates = trainer.gates.detach()
    assert gates[0, 1] == 0.0
    assert (gates.flatten()[[0, 2, 3]] > 0.7).all(), gates
    assert all(weight.grad is None for weight in model._model.parameters()), "only gates are learnt"


def test_without_need_all_gates_fall(model: CalibrationModel) -> None:
    """A window as long as the prompt: streaming is full attention."""
    settings = DuoSettings(num_steps=70, num_sink=0, window_size=43)
    trainer = GateTrainer(model, prompts(2), settings)
    for index in range(settings.num_steps):
        trainer.step(index)
    assert (trainer.gates == 0).all() and trainer.last_distance < 1e-9


def test_distance_of_gates_at_zero_is_that_of_streaming(model: CalibrationModel) -> None:
    """The trained output equals a model with the mixture computed apart."""
    (prompt,) = prompts(1)
    ids = (*prompt.token_ids, *prompt.answer_ids)

    def attend_with(mix: Callable[..., torch.Tensor]) -> torch.Tensor:
        return model.final_hidden(ids, slice(39, 42), lambda layer, *qkv: mix(*qkv)).detach()

    full = attend_with(causal_attention)
    streaming = attend_with(lambda *qkv: streaming_attention(*qkv, num_sink=1, window_size=6))
    trainer = GateTrainer(model, [prompt], SETTINGS)
    with torch.no_grad():
        trainer.gates.zero_()
    trainer.step(0)
    assert trainer.last_distance == pytest.approx(float((full - streaming).square().mean()), rel=1e-5)


def test_each_pass_takes_every_prompt_once_in_an_order_of_its_own(model: CalibrationModel) -> None:
    six = prompts(6)
    trainer = GateTrainer(model, six, SETTINGS)
    turns = [[six.index(trainer._prompt_of(turn * 6 + i)) for i in range(6)] for turn in range(4)]
    assert all(sorted(turn) == list(range(6)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_a_state_through_json_goes_on_bit_for_bit(model: CalibrationModel) -> None:
    whole = GateTrainer(model, prompts(3), SETTINGS)
    for index in range(12):
        whole.step(index)
    first = GateTrainer(model, prompts(3), SETTINGS)
    for index in range(5):
        first.step(index)
    second = GateTrainer(model, prompts(3), SETTINGS)
    second.restore(json.loads(json.dumps(first.state())))
    for index in range(5, 12):
        second.step(index)
    assert second.state() == whole.state()
