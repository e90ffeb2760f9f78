"""Choice of the TSP layer: recall against a slow loop, the choice, and answers against the reference model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.tiny_model.language import make_example
from fastkv_vllm.calibrate import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt, PromptReader
from fastkv_vllm.calibrate.tsp_layer import Propagation, choose_layer, recall_table, weakest_recall
from fastkv_vllm.calibrate.tsp_sweep import AnswerSweep, TspAttention
from tests.reference import FAMILIES, Drop, ReferenceModel, make_checkpoint
from tests.reference.selection import select_positions, window_scores

TINY = Path(__file__).parents[1] / "benchmarks/tiny_model/checkpoint"
NUM_LAYERS, NUM_TOKENS, WINDOW = 4, 83, 5
PROPAGATION = Propagation(tsp_ratio=0.25, window_size=WINDOW, kernel_size=3, pooling="avg")
NUM_ROWS = 20
DROP = {"num_kept": NUM_TOKENS, "forced_from": NUM_TOKENS - WINDOW, "window_size": WINDOW, "kernel_size": 3}
TOKENS = tuple(torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist())
PROMPT = Prompt(TOKENS, (), None, range(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        directory = root / family
        return directory if directory.exists() else make_checkpoint(directory, family, num_layers=NUM_LAYERS)

    return get


@pytest.fixture(scope="module")
def tiny() -> CalibrationModel:
    return CalibrationModel(TINY, dtype="float32")


def roped(directory: Path) -> list[tuple[Tensor, Tensor]]:
    """Roped queries and keys of each layer of the reference model."""
    model, seen = ReferenceModel(directory), []
    project = model._project
    model._project = lambda *args: seen.append(project(*args)) or seen[-1]  # type: ignore[method-assign]
    model.logits(TOKENS)
    return [(queries, keys) for queries, keys, _ in seen]


def slow_recall(directory: Path, num_queries: int) -> list[list[float]]:
    """The definition as loops over layers, heads, queries and keys."""
    layers = roped(directory)
    drop = Drop("fastkv", **DROP, pooling="avg")
    table = []
    for queries, keys in layers:
        scores = sum(window_scores(queries, keys, drop)).tolist()
        rows = select_positions(scores, range(NUM_TOKENS), NUM_ROWS, drop)
        line = []
        for later_queries, later_keys in layers:
            shares = []
            for head, q in enumerate(later_queries):
                k = later_keys[head // (len(later_queries) // len(later_keys))]
                for i in range(NUM_TOKENS - num_queries, NUM_TOKENS):
                    p = (k[: i + 1] @ q[i] / q.shape[-1] ** 0.5).softmax(dim=0)
                    shares.append(sum(float(p[j]) for j in rows if j <= i))
            line.append(sum(shares) / len(shares))
        table.append(line)
    return table


@pytest.mark.parametrize(("family", "num_queries"), [*((f, WINDOW) for f in FAMILIES), ("llama", 1), ("llama", 9)])
def test_recall_is_that_of_the_loop(checkpoint: Callable[[str], Path], family: str, num_queries: int) -> None:
    model = CalibrationModel(checkpoint(family), dtype="float32")
    table = recall_table(model, PROMPT, PROPAGATION, num_queries)
    torch.testing.assert_close(table, torch.tensor(slow_recall(checkpoint(family), num_queries)), atol=2e-5, rtol=0)


def test_everything_recalls_everything(checkpoint: Callable[[str], Path]) -> None:
    model = CalibrationModel(checkpoint("llama"), dtype="float32")
    table = recall_table(model, PROMPT, Propagation(tsp_ratio=1.0), 8)
    torch.testing.assert_close(table, torch.ones(NUM_LAYERS, NUM_LAYERS))


def test_short_prompts_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = CalibrationModel(checkpoint("llama"), dtype="float32")
    with pytest.raises(CalibrationError, match=r"0\.2 of a prompt must be more than the window's 8 tokens.*has 40"):
        recall_table(model, Prompt(TOKENS[:40], (), None, range(0)), Propagation(), 8)


def test_choice() -> None:
    unused = -9.0
    first = torch.tensor(
        [[unused, 0.9, 0.2, 0.9], [unused, unused, 0.7, 0.6], [unused, unused, unused, 0.8], [unused] * 4]
    )
    second = first + torch.tensor([[0.0], [-0.2], [0.1], [0.0]])
    recall = weakest_recall(torch.stack([first, second]), percentile=0)
    torch.testing.assert_close(recall, torch.tensor([0.2, 0.4, 0.8]))
    torch.testing.assert_close(weakest_recall(torch.stack([first, second]), 50), torch.tensor([0.2, 0.5, 0.85]))
    assert [choose_layer(recall, least) for least in (0.1, 0.3, 0.4, 0.5, 0.79)] == [0, 1, 1, 2, 2]
    with pytest.raises(CalibrationError, match=r"a recall of 0\.9 \(--min-recall\); the best, layer 2, has 0\.800"):
        choose_layer(recall, 0.9)


def attend_fully(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return causal_attention(queries, keys, values)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_decoding_is_that_of_transformers(checkpoint: Callable[[str], Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    ids = torch.tensor([TOKENS])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, NUM_TOKENS:]
    ours = CalibrationModel(checkpoint(family), dtype="float32").decode(TOKENS, 8, attend_fully)
    assert ours == [token for token in theirs.tolist() if token != 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tsp_layer", [0, 2])
def test_tsp_is_that_of_the_reference(checkpoint: Callable[[str], Path], family: str, tsp_layer: int) -> None:
    drop = Drop("fastkv", **DROP, pooling="avg", cuts=((tsp_layer, NUM_ROWS),))
    expected = ReferenceModel(checkpoint(family)).generate(TOKENS, 8, drop)
    attention = TspAttention(tsp_layer, PROPAGATION)
    tokens = CalibrationModel(checkpoint(family), dtype="float32").decode(TOKENS, 8, attention)
    assert [attention._rows.tolist()] == [rows.tolist() for rows in expected.tsp_indices]
    assert tokens == expected.tokens[: len(tokens)] and len(tokens) == [*expected.tokens, 2].index(2)
    assert tokens != ReferenceModel(checkpoint(family)).generate(TOKENS, 8).tokens, "the case must tell them apart"


def test_answers_of_the_tiny_model_need_layer_four(tiny: CalibrationModel, tmp_path: Path) -> None:
    examples = [make_example("mk", 512, seed) for seed in range(4)]
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in examples]
    (tmp_path / "tasks").write_text("\n".join(lines))
    reader = PromptReader(TINY)
    prompts = reader.read(tmp_path / "tasks")
    accuracy = {}
    for layer in (None, 2, 4, 5):
        sweep = AnswerSweep(tiny, reader, prompts, Propagation(), layer)
        for index in range(len(prompts)):
            sweep.step(index)
        accuracy[layer] = sweep.accuracy
    assert accuracy[None] == accuracy[5] == accuracy[4] == 1.0 and accuracy[2] <= 0.25

    tables = torch.stack([recall_table(tiny, prompt, Propagation(), 1) for prompt in prompts])
    recall = weakest_recall(tables, percentile=0)
    assert choose_layer(recall, 0.5) == 4, recall


def test_layers_that_slide_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "mistral", "mistral", num_layers=2)
    config = json.loads((directory / "config.json").read_text()) | {"sliding_window": 16}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalibrationError, match="plain causal attention; layer 0 has sliding_window"):
        recall_table(CalibrationModel(directory), PROMPT, PROPAGATION, 8)
