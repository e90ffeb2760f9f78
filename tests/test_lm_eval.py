"""The harness as a judge of a server: what is read and refused, and (marked judge) a run of the harness itself."""

import json
import sys

import pytest
import yaml

import benchmarks.judges
import benchmarks.lm_eval as lm_eval
from benchmarks.judges import JudgeMissing, judge_python
from benchmarks.lm_eval import Counts, Harness, Result, Score
from benchmarks.questions import CHECKPOINT, PLAIN, tiny_model_config
from benchmarks.tiny_model.language import make_example


def has_harness():
    try:
        return bool(judge_python("lm-eval"))
    except JudgeMissing:
        return False


needs_harness = pytest.mark.skipif(not has_harness(), reason="no .venv-lm-eval: scripts/judge_env.sh lm-eval makes it")

REPORT = {
    "results": {
        "one": {"alias": "one", "exact_match,strip": 0.5, "exact_match_stderr,strip": 0.1, "f1,none": 1},
        "two": {"alias": "two", "bleu,none": 7.5, "bleu_stderr,none": "N/A"},
    }
}


def test_scores_of_a_report():
    assert lm_eval.read_scores(REPORT) == [
        Score("one", "exact_match,strip", 0.5, 0.1),
        Score("one", "f1,none", 1.0, None),
        Score("two", "bleu,none", 7.5, None),
    ]
    with pytest.raises(RuntimeError, match="no metric"):
        lm_eval.read_scores({"results": {"one": {"alias": "one"}}})


@pytest.mark.parametrize(
    "method, counts",
    [
        (PLAIN, Counts(4, 0, 0)),
        ("fastkv", Counts(4, 4, 0)),
        ("fastkv", Counts(4, 1, 3)),
        ("fastkv", Counts(4, 5, 0)),  # one of them twice, after preemption
    ],
)
def test_counters_that_bear_a_result_out(method, counts):
    lm_eval.require_compressed(method, "task", counts)


@pytest.mark.parametrize(
    "method, counts, message",
    [
        (PLAIN, Counts(0, 0, 0), "finished no request"),
        (PLAIN, Counts(4, 1, 0), "plain vLLM compressed"),
        ("fastkv", Counts(4, 0, 4), "no prompt was compressed"),
        ("fastkv", Counts(4, 3, 0), "neither compressed nor left alone"),
        ("fastkv", Counts(4, 0, 0), "neither compressed nor left alone"),
    ],
)
def test_counters_that_refute_a_result(method, counts, message):
    with pytest.raises(RuntimeError, match=message):
        lm_eval.require_compressed(method, "task", counts)


def result(method, value, metric="exact_match,strip"):
    return Result(method, [Score("task", metric, value, 0.1)], Counts(4, 0 if method == PLAIN else 3, 1))


def test_ratio_to_plain():
    results = [result(PLAIN, 0.8), result("fastkv", 0.6)]
    (score,) = results[1].scores
    assert lm_eval.ratio_to_plain(results, score) == pytest.approx(0.75)
    assert lm_eval.ratio_to_plain(results[1:], score) is None, "plain was not measured"
    assert lm_eval.ratio_to_plain([result(PLAIN, 0.0)], score) is None
    assert lm_eval.ratio_to_plain([result(PLAIN, 0.8, "f1,none")], score) is None, "another metric"


def test_the_table_tells_what_was_compressed(capsys):
    lm_eval.print_results([result(PLAIN, 0.8), result("fastkv", 0.6)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[0][-3:] == ["prompts", "compressed", "left alone"]
    assert lines[3] == ["task", "exact_match,strip", "fastkv", "0.600 ± 0.100", "0.75", "4", "3", "1"]


def test_tiny_tasks(tmp_path):
    lm_eval.write_tiny_tasks(["tiny_niah", "tiny_mk"], tmp_path)
    task = yaml.safe_load((tmp_path / "tiny_mk.yaml").read_text())
    assert task["task"] == "tiny_mk"
    assert task["output_type"] == "generate_until", "ranked answers need the prompt's log-probabilities"
    with open(task["dataset_kwargs"]["data_files"]["test"]) as lines:
        questions = [json.loads(line) for line in lines]
    example = make_example("mk", lm_eval.TINY_TOKENS, 3)
    assert len(questions) == lm_eval.TINY_QUESTIONS
    assert questions[3] == {"prompt": example.prompt, "answer": example.answer}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "none,nosuch"], "unknown: nosuch"),
        (["--tasks", "tiny_mk", "--include-path", "."], "exclude each other"),
        ([], "make it with scripts/judge_env.sh lm-eval"),
    ],
    ids=["method", "two-directories", "no-environment"],
)
def test_refusals_of_the_command_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(benchmarks.judges, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with pytest.raises(SystemExit):
        lm_eval.main()
    assert message in capsys.readouterr().err


@pytest.mark.judge
@pytest.mark.server
@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("method", [PLAIN, "fastkv"])
def test_the_harness_judges_a_server(monkeypatch, tmp_path, method):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # engine tests of the same session say 0
    lm_eval.write_tiny_tasks(["tiny_niah"], tmp_path)
    harness = Harness(CHECKPOINT, tmp_path, 3, 4096, {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    config = {} if method == PLAIN else tiny_model_config(method)
    (got,) = lm_eval.measure(method, config, ["tiny_niah"], harness)
    assert got.scores == [Score("tiny_niah", "exact_match,strip", 1.0, 0.0)]
    assert got.counts == Counts(3, 0 if method == PLAIN else 3, 0)
