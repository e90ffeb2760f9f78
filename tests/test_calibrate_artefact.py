"""Artefacts and prompts: what is written comes back, what does not fit is refused in a sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.tiny_model.language import BOS, WORDS
from fastkv_vllm.calibrate import Artefact, CalibrationError, load, model_fingerprint, save
from fastkv_vllm.calibrate.artefact import make
from fastkv_vllm.calibrate.fingerprint import architecture, model_directory
from fastkv_vllm.calibrate.prompts import PromptReader, digest
from tests.reference import make_checkpoint

TINY = Path(__file__).parents[1] / "benchmarks/tiny_model/checkpoint"
DATA = {"layer": 1, "recall": [0.1, 1 / 3], "table": [[None, 0.2], [None, None]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", num_layers=2)


@pytest.fixture
def artefact(model: Path) -> Artefact:
    return make("tsp-layer", model, command="fastkv-vllm calibrate tsp-layer", settings={"queries": 8}, data=DATA)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copy(model: Path, directory: Path, change: Callable[[Path], None]) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    change(directory)
    return directory


def test_round_trip(artefact: Artefact, model: Path, tmp_path: Path) -> None:
    save(artefact, tmp_path / "a.json")
    assert load(tmp_path / "a.json", "tsp-layer", model) == artefact
    assert artefact.model == "llama" and artefact.created.endswith("+00:00")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "must have schema 1, .* it has 2: make one with `fastkv-vllm calibrate tsp-layer`"),
        ({"kind": "retrieval-heads"}, "must be of kind 'tsp-layer'; it is of kind 'retrieval-heads'"),
        ({"fingerprint": "sha256:0123456789abcdef"}, r"\(llama, sha256:\w{12}\); it was made for llama \(sha256:0123"),
        ({"surprise": 1}, "fields of schema 1; surprise differ"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    artefact: Artefact, model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(artefact, tmp_path / "a.json")
    edit_json(tmp_path / "a.json", **change)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "a.json", "tsp-layer", model)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"layer": 3}'])
def test_what_is_no_artefact_is_refused(model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CalibrationError, match="must be an artefact, a JSON object with a schema"):
        load(tmp_path / "a.json", "tsp-layer", model)
    with pytest.raises(CalibrationError, match="an artefact must be a file"):
        load(tmp_path / "b.json", "tsp-layer", model)


def test_a_number_json_has_not_is_refused(artefact: Artefact, tmp_path: Path) -> None:
    save(artefact, tmp_path / "a.json")
    broken = Artefact(**{**vars(artefact), "data": {"layer": float("nan")}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(broken, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["data"] == DATA, "the old file must survive"


def test_fingerprint_is_of_the_model_not_of_its_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_fingerprint(model)
    monkeypatch.chdir(model.parent)
    os.symlink(model, tmp_path / "link")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    with_copy = copy(model, tmp_path / "copy", lambda d: save_file({}, d / "consolidated.safetensors"))
    renamed = copy(model, tmp_path / "newer", lambda d: edit_json(d / "config.json", transformers_version="9"))
    for same in (str(model), model.name, tmp_path / "link", sharded, with_copy, renamed):
        assert model_fingerprint(same) == expected, same


def test_fingerprint_changes_with_the_model(model: Path, tmp_path: Path) -> None:
    def train(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        weights["model.layers.1.self_attn.v_proj.weight"] += 1e-3
        save_file(weights, directory / "model.safetensors")

    def stretch(directory: Path) -> None:
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
        edit_json(directory / "config.json", rope_parameters=rope)

    others = [
        copy(model, tmp_path / "trained", train),
        copy(model, tmp_path / "stretched", stretch),
        make_checkpoint(tmp_path / "half", "llama", num_layers=2, dtype="bfloat16"),
    ]
    assert len({model_fingerprint(m) for m in (model, *others)}) == 4


def test_architecture_reads_old_and_new_configurations() -> None:
    old = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5, "rope_scaling": None}
    new = {
        **{key: old[key] for key in ("model_type", "hidden_size", "num_attention_heads")},
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }
    assert architecture(old) == architecture(new) == architecture({"text_config": new})
    scaled = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert architecture(scaled)["rope"] == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="directory or a name in the local Hugging Face cache; got 'no/such'"):
        model_directory("no/such")
    with pytest.raises(CalibrationError, match=r"must hold config\.json"):
        model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CalibrationError, match="weights must be safetensors"):
        model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(CalibrationError, match=r"names x\.safetensors.*download the whole model"):
        model_fingerprint(tmp_path)


def test_reading_an_artefact_needs_no_model_code() -> None:
    code = (
        "import sys, fastkv_vllm.calibrate; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


class TestPrompts:
    """Prompts as text and as token ids."""

    TEXT = "w001 w002 ka50 kb17 04 82 33 85 . w003 ? ka50 kb17"
    IDS: ClassVar[list[int]] = [BOS, *map(WORDS.index, TEXT.split())]

    @staticmethod
    def write(file: Path, *lines: Any) -> Path:
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return file

    def test_text_and_ids_are_the_same_prompt(self, tmp_path: Path) -> None:
        lines = (
            {"prompt": self.TEXT, "answer": "04 82 33 85", "needle": "ka50 kb17 04 82 33 85 ."},
            {"prompt": self.IDS, "answer": self.IDS[5:9], "needle": self.IDS[3:10]},
            {"prompt": self.IDS, "answer": self.IDS[5:9], "needle_span": [3, 10]},
        )
        text, ids, span = PromptReader(TINY).read(self.write(tmp_path / "p", *lines), ["answer", "needle"])
        assert text.token_ids == ids.token_ids == tuple(self.IDS)
        assert text.answer_ids == ids.answer_ids and text.needle == ids.needle == range(3, 10)
        assert (text.max_new_tokens, ids.max_new_tokens) == (32, 4)
        assert ids == span and digest([ids]) == digest([span]) != digest([text])

    def test_answers(self, tmp_path: Path) -> None:
        reader = PromptReader(TINY)
        lines = {"prompt": self.TEXT, "answer": "04 82"}, {"prompt": self.IDS, "answer": self.IDS[5:7]}
        text, ids = reader.read(self.write(tmp_path / "p", *lines))
        first, second, third = self.IDS[5:8]
        assert all(reader.is_right(prompt, [first, second, third]) for prompt in (text, ids))
        assert not any(reader.is_right(prompt, [first]) for prompt in (text, ids))
        assert reader.is_right(text, [third, first, second]), "words around a text answer are allowed"
        assert not reader.is_right(ids, [third, first, second])

    def test_lengths_choose(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "p", {"prompt": [1] * 5}, {"prompt": [1] * 9})
        assert [len(p.token_ids) for p in PromptReader(TINY).read(file, lengths=(6, 9))] == [9]
        with pytest.raises(CalibrationError, match="must hold a prompt of the lengths asked for"):
            PromptReader(TINY).read(file, lengths=(10, 20))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("no json", "line 1: Expecting value"),
            ([1], "a line must be a JSON object"),
            ({"text": "a"}, "must have prompt, .* got text"),
            ({"prompt": [], "answer": [3], "needle": [2]}, "prompt must have a token"),
            ({"prompt": [1, "a"], "answer": [3], "needle": [2]}, "must be text or a list of token ids"),
            ({"prompt": [1, 2], "needle": [2]}, "needs answer, the line has none"),
            ({"prompt": [1, 2], "answer": [3]}, "needs needle, the line has none"),
            ({"prompt": [1, 2, 2], "answer": [3], "needle": [2]}, "exactly once, it does 2 times"),
            ({"prompt": "ka01 ka01", "answer": [3], "needle": "ka01"}, "exactly once; give needle_span"),
            ({"prompt": [1, 2], "answer": [3], "needle_span": [1, 3]}, r"needle_span must lie in 0\.\.2; got \[1, 3\]"),
            ({"prompt": [1, 2], "answer": [3], "needle_span": [1]}, "line 1: not enough values"),
        ],
    )
    def test_a_wrong_line_is_refused(self, tmp_path: Path, line: Any, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            PromptReader(TINY).read(self.write(tmp_path / "p", line), ["answer", "needle"])

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="prompts must be a JSONL file"):
            PromptReader(TINY).read(tmp_path / "p")
