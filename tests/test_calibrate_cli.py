"""The command line: interruption and resumption, settings, errors, and the samples in the docs."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastkv_vllm.calibrate import load
from fastkv_vllm.calibrate.__main__ import build_parser, main
from fastkv_vllm.calibrate.artefact import MAKERS
from fastkv_vllm.calibrate.channels import ChannelRanges, ClipSearch
from fastkv_vllm.calibrate.decays import RecallCurves
from fastkv_vllm.calibrate.duo import GateTrainer
from fastkv_vllm.calibrate.heads import HeadCredit
from fastkv_vllm.calibrate.merging import MergingTrial
from fastkv_vllm.calibrate.progress import PartialFile
from fastkv_vllm.calibrate.prompts import PromptReader
from fastkv_vllm.calibrate.sharing import LayerDistances
from fastkv_vllm.calibrate.tsp_layer import RecallTables
from fastkv_vllm.calibrate.tsp_sweep import AnswerSweep

ROOT = Path(__file__).parents[1]
TINY = ROOT / "benchmarks/tiny_model/checkpoint"
DOCS = (ROOT / "docs/calibration.md").read_text()
COMMANDS = [
    shlex.split(text.replace("\\\n", " "))
    for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL)
    for text in re.split(r"\n(?=fastkv-vllm)", block.strip())
]
SMALL = ["--num-prompts", "5", "--save-every", "2"]
KINDS: dict[str, tuple[type, list[str]]] = {
    "tsp-layer": (RecallTables, ["--queries", "1"]),
    "heads": (HeadCredit, ["--criterion", "r"]),
    "decays": (RecallCurves, ["--queries", "2"]),
    "sharing": (LayerDistances, ["--layers", "1"]),
    "merging": (MergingTrial, ["--queries", "24"]),
    "channels": (ChannelRanges, []),
    "duo": (GateTrainer, ["--steps", "5", "--num-sink", "4", "--window-size", "64"]),
}
KIND_OF = {maker: kind for kind, maker in MAKERS.items()}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Written by the first sample of the docs, but shorter."""
    sample = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)[0]
    path = tmp_path / "prompts.jsonl"
    sample = sample.replace("1024", "256").replace("prompts.jsonl", str(path))
    exec(sample, {})
    return path


@pytest.fixture
def calibrate(prompts: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a subcommand and gives the data of its artefact."""

    def run(kind: str, *more: str, out: str = "out.json") -> dict[str, Any]:
        path = tmp_path / out
        main(["calibrate", kind, "--model", str(TINY), "--prompts", str(prompts), "--out", str(path), *SMALL, *more])
        artefact = load(path, KIND_OF[kind], TINY)
        assert artefact.command.startswith(f"fastkv-vllm calibrate {kind} --model")
        assert not path.with_name(out + ".partial").exists()
        return dict(artefact.data)

    return run


def interrupt(monkeypatch: pytest.MonkeyPatch, work: type, at: int) -> None:
    """The step `at` ends as ctrl-C would end it."""
    step = work.step  # type: ignore[attr-defined]

    def cut(self: Any, index: int) -> None:
        if index == at:
            raise KeyboardInterrupt
        step(self, index)

    monkeypatch.setattr(work, "step", cut)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(
    calibrate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    work, options = KINDS[kind]
    whole = calibrate(kind, *options, out="whole.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, work, at=3)
        calibrate(kind, *options)
    (phase,) = json.loads((tmp_path / "out.json.partial").read_text()).values()
    assert phase["done"] == 2
    with monkeypatch.context() as patch:
        interrupt(patch, work, at=1)  # steps that are done are not done again
        assert calibrate(kind, *options, "--resume") == whole


def test_the_sweep_resumes_too(
    calibrate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    options = ["--tasks", str(prompts), "--min-recall", "0.3"]
    whole = calibrate("tsp-layer", *options, out="whole.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, AnswerSweep, at=4)
        calibrate("tsp-layer", *options)
    with monkeypatch.context() as patch:
        interrupt(patch, RecallTables, at=0)
        assert calibrate("tsp-layer", *options, "--resume") == whole
    layer, sweep = whole["layer"], whole["sweep"]
    assert set(sweep["layers"]) == {str(i) for i in (layer - 1, layer, layer + 1)} and sweep["num_prompts"] == 5


def test_the_second_phase_of_channels_resumes_too(
    calibrate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate("channels", out="whole.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, ClipSearch, at=4)
        calibrate("channels")
    with monkeypatch.context() as patch:
        interrupt(patch, ChannelRanges, at=0)
        assert calibrate("channels", "--resume") == whole


def test_a_threshold_nothing_reaches_keeps_the_measurement(
    calibrate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        calibrate("tsp-layer", "--min-recall", "1")
    assert "run again with --resume and a lower --min-recall" in capsys.readouterr().err
    interrupt(monkeypatch, RecallTables, at=0)
    data = calibrate("tsp-layer", "--min-recall", "0.3", "--resume")
    assert data["recall"][data["layer"]] >= 0.3 and data["num_prompts"] == 5
    assert data["table"][7] == [None] * 8 and data["table"][6][7] > 0


def test_resume_refuses_other_settings(
    calibrate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, RecallTables, at=3)
        calibrate("tsp-layer")
    with pytest.raises(SystemExit, match="2"):
        calibrate("tsp-layer", "--tsp-ratio", "0.3", "--queries", "1", "--resume")
    assert "--resume needs the settings of the interrupted run; queries, tsp_ratio changed" in capsys.readouterr().err
    calibrate("tsp-layer", "--tsp-ratio", "0.3", "--min-recall", "0.1")


def test_an_old_partial_file_is_forgotten_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    path.write_text('{"count": {"identity": {}, "done": 9, "state": {}}}')

    class Count:
        steps: list[int]

        def __init__(self) -> None:
            self.steps = []

        def step(self, index: int) -> None:
            self.steps.append(index)

        def state(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def restore(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    work = Count()
    PartialFile(path, resume=False, every=2).run("count", work, 3, identity={"a": 1})
    assert work.steps == [0, 1, 2]
    again = Count()
    PartialFile(path, resume=True, every=2).run("count", again, 4, identity={"a": 1})
    assert again.steps == [0, 1, 2, 3]


def test_plot(calibrate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    calibrate("tsp-layer", "--min-recall", "0.3", "--plot", str(tmp_path / "recall.png"))
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def errors(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    return capsys.readouterr().err


def test_errors_come_before_the_measurement(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastkv_vllm.calibrate.commands.CalibrationModel", None)  # a call would raise TypeError
    good = {"--model": str(TINY), "--prompts": str(prompts), "--out": str(tmp_path / "a.json")}

    def message(kind: str, **changes: str) -> str:
        changed = good | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return errors(capsys, ["calibrate", kind, *(word for pair in changed.items() for word in pair)])

    assert "directory or a name in the local Hugging Face cache" in message("duo", model="no/such")
    assert "prompts must be a JSONL file" in message("heads", prompts="none.jsonl")
    assert "--out must lie in a directory that exists" in message("heads", out=str(tmp_path / "x/y.json"))
    assert "widen --lengths" in message("duo", lengths="9000:9999")
    assert "invalid choice: 'r3'" in message("heads", criterion="r3")
    assert "must be an integer, at least 1; got 0" in message("duo", steps="0")
    assert "must be odd and positive; got 4" in message("tsp-layer", kernel_size="4")
    assert "must be in (0, 1]; got 1.5" in message("tsp-layer", min_recall="1.5")
    assert "must be in 0..100; got -1" in message("tsp-layer", percentile="-1")
    assert "must be MIN:MAX in tokens, such as 1000:8000; got 12" in message("duo", lengths="12")
    assert "must be positive; got x" in message("duo", penalty="x")
    prompts.write_text('{"prompt": [1, 2, 3]}')
    assert "this calibration needs answer" in message("duo")
    prompts.write_text('{"prompt": [1, 2, 3], "answer": [4]}')
    assert "this calibration needs needle" in message("heads")
    monkeypatch.setattr("fastkv_vllm.calibrate.plot.find_spec", lambda name: None)
    assert "--plot needs matplotlib, which is not installed" in message("tsp-layer", plot="a.png")


@pytest.mark.parametrize("argv", [[], ["calibrate"], ["calibrate", "all"], ["calibrate", "duo"]], ids=len)
def test_incomplete_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: fastkv-vllm" in errors(capsys, argv)


@pytest.mark.parametrize("kind", KINDS)
def test_help(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["calibrate", kind, "--help"])
    assert "--resume" in capsys.readouterr().out


def test_samples_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for sample in re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL):
        exec(sample, {})
    for name, count in (("prompts.jsonl", 24), ("needles.jsonl", 22)):
        read = PromptReader(TINY).read(Path(name), ["answer", "needle"])
        assert len(read) == count
    assert [command[:2] for command in COMMANDS] == [["fastkv-vllm", "calibrate"]] * len(KINDS)
    assert {command[2] for command in COMMANDS} == set(KINDS)
    for command in COMMANDS:
        build_parser().parse_args(command[1:])


def test_docs_name_each_kind() -> None:
    for kind, maker in MAKERS.items():
        assert f"| `{kind}` | `calibrate {maker}` |" in DOCS
