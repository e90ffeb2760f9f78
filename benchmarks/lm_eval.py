"""EleutherAI's lm-evaluation-harness as the judge of a compressing server, against plain vLLM.

python -m benchmarks.lm_eval [--model PATH] [--tasks tiny_niah,tiny_mk] [--include-path DIR] [--methods none,fastkv]
                             [--configs JSON] [--limit N] [--json FILE]

Needs the environment that `scripts/judge_env.sh lm-eval` makes. One `vllm serve` per method; the harness is a client of
it (model type local-completions, prompts as text, the checkpoint's tokenizer), offline, and computes its own metrics.
Tasks are the harness's own, as far as their data is cached on this machine, those of --include-path, or `tiny_NAME`:
48 questions of 1024 tokens over the tiny model's language, made on the spot.

Only tasks that generate can be compared: those that rank given answers (multiple_choice, loglikelihood) ask for
log-probabilities of the prompt, which a compressing server refuses. A prompt below min_tokens, or covered by its
budget, is rightly left alone: the table counts them. Ends with an error where the server's own counters do not account
for each prompt, or where it compressed none of a task.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.environment import describe_environment
from benchmarks.judges import ROOT, JudgeMissing, judge_python, run_judge
from benchmarks.questions import CHECKPOINT, PLAIN, tiny_model_config
from benchmarks.server import Server, sample_value, serve
from benchmarks.table import format_table
from benchmarks.tiny_model.language import TASKS, make_example
from fastkv_vllm.methods import method_names

TEMPLATE = Path(__file__).parent / "oracle" / "lm_eval_tiny" / "task.yaml"
TINY_TASKS = {f"tiny_{task}": task for task in TASKS}
TINY_TOKENS, TINY_QUESTIONS = 1024, 48
CONCURRENCY = 4


@dataclass(frozen=True)
class Counts:
    """What the server's own counters say of the prompts of one task.

    Fields:
        requests: finished.
        compressed: prompts compressed; one compressed again after preemption counts again.
        left_alone: prompts left alone, for whatever reason.
    """

    requests: int
    compressed: int
    left_alone: int


@dataclass(frozen=True)
class Score:
    """One metric of one task; `stderr` is the harness's, None where it has none."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Result:
    """A task on one method's server."""

    method: str
    scores: list[Score]
    counts: Counts


@dataclass(frozen=True)
class Harness:
    """How the harness is asked.

    Fields:
        model: checkpoint directory.
        include_path: directory of tasks that are not the harness's own.
        limit: questions per task; None: all.
        max_model_len: longest prompt and answer, tokens.
        environment: more environment for it.
    """

    model: Path
    include_path: Path | None
    limit: int | None
    max_model_len: int
    environment: Mapping[str, str]

    def run(self, server: Server, task: str) -> list[Score]:
        """Scores of one task on a running server.

        Raises:
            RuntimeError: the harness failed; the message ends with its last lines.
        """
        with tempfile.TemporaryDirectory() as directory:
            run_judge("lm-eval", self._arguments(server, task, directory), environment=self.environment)
            (report,) = Path(directory).rglob("results_*.json")
            return read_scores(json.loads(report.read_text()))

    def _arguments(self, server: Server, task: str, output: str) -> list[str]:
        model_arguments = {
            "model": server.model,
            "base_url": f"{server.base_url}/v1/completions",
            "tokenizer": str(self.model),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": "False",  # the server puts the special tokens in, as for any client
            "num_concurrent": str(CONCURRENCY),
            "max_retries": "1",  # a second try would be a second prompt
            "max_length": str(self.max_model_len),
        }
        arguments = ["-m", "lm_eval", "run", "--model", "local-completions", "--tasks", task, "--output_path", output]
        arguments += ["--model_args", ",".join(f"{name}={value}" for name, value in model_arguments.items())]
        if self.include_path is not None:
            arguments += ["--include_path", str(self.include_path)]
        if self.limit is not None:
            arguments += ["--limit", str(self.limit)]
        return arguments


def read_scores(report: Mapping[str, Any]) -> list[Score]:
    """All metrics of a results file of the harness, whose keys are `metric,filter` and `metric_stderr,filter`.

    Raises:
        RuntimeError: it has none.
    """
    scores = []
    for task, figures in report["results"].items():
        for key, value in figures.items():
            name, _, filtered = key.partition(",")
            if filtered and not name.endswith("_stderr"):
                stderr = figures.get(f"{name}_stderr,{filtered}")
                scores.append(Score(task, key, float(value), stderr if isinstance(stderr, float) else None))
    if not scores:
        raise RuntimeError(f"the harness reports no metric: {report['results']}")
    return scores


def measure(method: str, config: Mapping[str, Any], tasks: Sequence[str], harness: Harness) -> list[Result]:
    """Results of all tasks on one server.

    Args:
        method: registered name, or `PLAIN`.
        config: value of --kv-compression-config.
        tasks: names the harness knows.
        harness: how it is asked.

    Raises:
        RuntimeError: the harness failed, or the server did not compress what it should have.
    """
    flags: dict[str, Any] = {} if method == PLAIN else {"method": method, "config": config}
    results = []
    extra = ["--enforce-eager", "--max-model-len", str(harness.max_model_len)]
    with serve(harness.model, extra=extra, **flags) as server:
        before = read_counts(server)
        for task in tasks:
            scores = harness.run(server, task)
            after = read_counts(server)
            counts = Counts(*(now - then for now, then in zip(_numbers(after), _numbers(before), strict=True)))
            require_compressed(method, task, counts)
            results.append(Result(method, scores, counts))
            print(f"{method}, {task}: {scores}, {counts}", file=sys.stderr, flush=True)
            before = after
    return results


def read_counts(server: Server) -> Counts:
    """The server's counters now."""
    samples = server.metrics()
    names = ("request_success", "fastkv_requests_compressed", "fastkv_requests_left_alone")
    return Counts(*(round(sample_value(samples, f"vllm:{name}_total")) for name in names))


def require_compressed(method: str, task: str, counts: Counts) -> None:
    """Refuse a task's figures where the counters do not bear them out.

    Raises:
        RuntimeError: no request, a prompt unaccounted for, none compressed, or some compressed for plain.
    """
    if counts.requests == 0:
        raise RuntimeError(f"{method}, {task}: the server finished no request")
    if method == PLAIN:
        if counts.compressed:
            raise RuntimeError(f"{method}, {task}: the server of plain vLLM compressed prompts: {counts}")
        return
    if counts.compressed + counts.left_alone < counts.requests:
        raise RuntimeError(f"{method}, {task}: some prompts were neither compressed nor left alone: {counts}")
    if counts.compressed == 0:
        raise RuntimeError(
            f"{method}, {task}: no prompt was compressed: {counts}; lower min_tokens or the budget with --configs"
        )


def _numbers(counts: Counts) -> tuple[int, int, int]:
    return counts.requests, counts.compressed, counts.left_alone


def write_tiny_tasks(tasks: Sequence[str], directory: Path) -> None:
    """The harness's files of tasks `tiny_NAME`: a YAML from the template and the questions it names."""
    for name in tasks:
        examples = [make_example(TINY_TASKS[name], TINY_TOKENS, seed) for seed in range(TINY_QUESTIONS)]
        lines = [json.dumps({"prompt": example.prompt, "answer": example.answer}) for example in examples]
        data = directory / f"{name}.jsonl"
        data.write_text("\n".join(lines) + "\n")
        text = Template(TEMPLATE.read_text()).substitute(task=name, data=json.dumps(str(data)))
        (directory / f"{name}.yaml").write_text(text)


def ratio_to_plain(results: Sequence[Result], score: Score) -> float | None:
    """A metric over plain's of the same task; None where plain was not measured or has 0."""
    for result in results:
        for plain in result.scores:
            if result.method == PLAIN and (plain.task, plain.metric) == (score.task, score.metric) and plain.value:
                return score.value / plain.value
    return None


def print_results(results: Sequence[Result]) -> None:
    """One row per task, metric and method."""
    header = ["task", "metric", "method", "value", "x plain", "prompts", "compressed", "left alone"]
    rows = []
    for result in sorted(results, key=lambda result: result.scores[0].task):
        for score in result.scores:
            ratio = ratio_to_plain(results, score)
            value = f"{score.value:.3f}" + (f" ± {score.stderr:.3f}" if score.stderr is not None else "")
            cells = [score.task, score.metric, result.method, value, "-" if ratio is None else f"{ratio:.2f}"]
            rows.append([*cells, *map(str, _numbers(result.counts))])
    print(f"\n{format_table(header, rows)}")


def _as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {"method": result.method}
        | asdict(score)
        | {"ratio_to_plain": ratio_to_plain(results, score)}
        | asdict(result.counts)
        for result in results
        for score in result.scores
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint directory")
    parser.add_argument("--tasks", default="tiny_niah,tiny_mk,tiny_mq", help="comma-separated")
    parser.add_argument("--include-path", type=Path, help="directory of more tasks; not together with tiny_NAME")
    parser.add_argument("--methods", default=f"{PLAIN},fastkv", help="comma-separated")
    parser.add_argument("--configs", type=json.loads, default={}, help='{"METHOD": {...}}: --kv-compression-config')
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--max-model-len", type=int, default=4096, help="longest prompt and answer, tokens")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    methods, tasks, model = args.methods.split(","), args.tasks.split(","), args.model.resolve()
    if unknown := [name for name in methods if name not in (PLAIN, *method_names())]:
        parser.error(f"unknown: {', '.join(unknown)}")
    tiny = [task for task in tasks if task in TINY_TASKS]
    if tiny and args.include_path is not None:
        parser.error(f"{', '.join(tiny)} and --include-path exclude each other: the harness takes one directory")
    try:
        judge_python("lm-eval")
    except JudgeMissing as missing:
        parser.error(str(missing))
    is_tiny_model = model == CHECKPOINT.resolve()
    configs = {
        method: (tiny_model_config(method) if is_tiny_model else {}) | args.configs.get(method, {})
        for method in methods
        if method != PLAIN
    }
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_tasks(tiny, Path(directory))
        include_path = Path(directory) if tiny else args.include_path
        cache = {"HF_DATASETS_CACHE": str(Path(directory, "cache"))} if tiny else {}
        harness = Harness(model, include_path, args.limit, args.max_model_len, cache)
        results = [result for method in methods for result in measure(method, configs.get(method, {}), tasks, harness)]
    print_results(results)
    if args.json is not None:
        report = {
            "benchmark": "lm_eval",
            "environment": environment,
            "harness": run_judge("lm-eval", ["-c", "import lm_eval; print(lm_eval.__version__)"]).strip(),
            "model": model.relative_to(ROOT).as_posix() if is_tiny_model else model.name,
            "configs": configs,
            "limit": args.limit,
            "results": _as_json(results),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
