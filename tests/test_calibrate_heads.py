"""Importance of heads: credit on made cases, and heads of a model that retrieves."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_model.language import make_example
from fastkv_vllm.calibrate import CalibrationError
from fastkv_vllm.calibrate.heads import HeadCredit, credit
from fastkv_vllm.calibrate.model import CalibrationModel
from fastkv_vllm.calibrate.prompts import Prompt, PromptReader

TINY = Path(__file__).parents[1] / "benchmarks/tiny_model/checkpoint"
#              0  1  2  3  4  5  6  7   needle: positions 3, 4, 5
PROMPT = Prompt((1, 7, 8, 5, 6, 7, 9, 9), (6, 7), None, range(3, 6))


def attention(**shares: float) -> torch.Tensor:
    """Probabilities over the prompt and one decoded token: p3=0.5 puts a half on position 3."""
    row = torch.zeros(9)
    for place, share in shares.items():
        row[int(place[1:])] = share
    return row


def test_r_counts_the_copied_token() -> None:
    rows = torch.stack(
        [
            attention(p5=0.6, p1=0.4),  # looks at the needle's 7 and writes 7
            attention(p1=0.6, p5=0.4),  # the same token outside the needle
            attention(p4=0.6, p5=0.4),  # the needle, but another token
            attention(p8=0.9, p5=0.1),  # a decoded token
        ]
    ).reshape(2, 2, 9)
    assert credit(rows, 7, PROMPT, "r").tolist() == [[1 / 3, 0.0], [0.0, 0.0]]
    assert credit(rows, 9, PROMPT, "r").sum() == 0


def test_r2_counts_the_needles_share_of_the_top() -> None:
    rows = torch.stack(
        [
            attention(p3=0.3, p4=0.3, p5=0.3, p0=0.1),  # the needle is the whole top 3
            attention(p3=0.1, p0=0.3, p1=0.3, p2=0.3),  # the needle is fourth
            attention(p5=0.25, p0=0.5, p8=0.2, p3=0.05),
        ]
    )[None]
    for token in (7, 9):  # what is written does not matter
        expected = torch.tensor([[0.3, 0.0, 0.25 / 3]], dtype=torch.float64)
        torch.testing.assert_close(credit(rows, token, PROMPT, "r2"), expected)


@pytest.fixture(scope="module")
def tiny() -> CalibrationModel:
    return CalibrationModel(TINY, dtype="float32")


def write(file: Path, *, right: bool) -> Path:
    lines = []
    for seed in range(3):
        example = make_example("mk", 512, seed)
        needle = f"{example.prompt.split('? ')[1]} {example.answer} ."
        answer = example.answer if right else "00 00 00 00"
        lines.append(json.dumps({"prompt": example.prompt, "answer": answer, "needle": needle}))
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("criterion", ["r", "r2"])
def test_heads_of_the_tiny_model(tiny: CalibrationModel, tmp_path: Path, criterion: str) -> None:
    reader = PromptReader(TINY)
    prompts = reader.read(write(tmp_path / "p", right=True), ["answer", "needle"])
    work = HeadCredit(tiny, reader, prompts, criterion)
    for index in range(3):
        work.step(index)
    by_query_head, by_kv_head = work.importance()
    assert work.num_right == 3
    assert by_query_head.shape == (8, 4) and by_kv_head.shape == (8, 2)
    assert by_query_head.sum() == pytest.approx(1) and by_kv_head.sum() == pytest.approx(1)
    torch.testing.assert_close(by_kv_head, by_query_head.reshape(8, 2, 2).sum(dim=2))
    assert by_query_head[4:].sum() > 0.9, "this model looks the answer up in layers 4 to 7"


def test_wrong_answers_earn_nothing(tiny: CalibrationModel, tmp_path: Path) -> None:
    reader = PromptReader(TINY)
    prompts = reader.read(write(tmp_path / "p", right=False), ["answer", "needle"])
    work = HeadCredit(tiny, reader, prompts, "r2")
    work.step(0)
    with pytest.raises(CalibrationError, match="of 3 prompts 0 were answered right and none gave any"):
        work.importance()
