"""What compression costs and saves in prefill: time to first token and blocks held, against plain vLLM.

python -m benchmarks.speed [--quick] [--rounds 3] [--repeats 1] [--steps 2048,8192] [--json FILE]

A random 16-layer Llama, one prompt of 8192 tokens at a time, eager, one thread. Each configuration runs in a process
of its own, in turn, so that a drift of the machine meets all alike; a ratio compares runs of one round. CPU seconds of
the process (all threads) are the figure to trust on a shared machine, wall seconds are printed beside them. The last
line is JSON. Nothing is reported of an engine that did not do what its configuration says.

| name | what runs |
|---|---|
| plain | vLLM, this plugin installed, no flag |
| unloaded | vLLM, VLLM_PLUGINS="": the plugin is not even imported |
| snapkv | retention 0.1 |
| fastkv | retention 0.1, TSP after layer 7 of 0..15, 0.2 of the rows go on |
| retention 1.0 | snapkv with retention 1.0: compression on, nothing to drop |
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from benchmarks.environment import describe_environment
from benchmarks.models import LlamaShape, make_random_llama
from benchmarks.speed_child import BLOCK_SIZE, Result, Run
from benchmarks.table import format_table

# One thread, an in-process engine, glibc that keeps freed pages: page faults of fresh pages are most of the noise.
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Setup:
    """A configuration to measure; fields as in `Run`, plus what the environment adds."""

    name: str
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    compresses: bool = False
    environment: dict[str, str] = field(default_factory=dict)


SETUPS = (
    Setup("plain"),
    Setup("unloaded", environment={"VLLM_PLUGINS": ""}),
    Setup("snapkv", "snapkv", {"retention_ratio": 0.1}, True),
    Setup("fastkv", "fastkv", {"retention_ratio": 0.1, "tsp_layer": 7, "tsp_ratio": 0.2}, True),
    Setup("retention 1.0", "snapkv", {"retention_ratio": 1.0}),
)


def measure_rounds(
    model: Path, step_tokens: Sequence[int], *, prompt_tokens: int, rounds: int, repeats: int
) -> dict[int, dict[str, list[Result]]]:
    """Results by step size and configuration, one per round; progress goes to stderr.

    Each round starts with another configuration, so that none always follows the same neighbour or comes first.
    """
    results: dict[int, dict[str, list[Result]]] = {step: {setup.name: [] for setup in SETUPS} for step in step_tokens}
    for i in range(rounds):
        for step in step_tokens:
            for setup in SETUPS[i % len(SETUPS) :] + SETUPS[: i % len(SETUPS)]:
                run = Run(str(model), setup.method, setup.config, setup.compresses, prompt_tokens, step, repeats)
                result = run_child(run, setup.environment)
                results[step][setup.name].append(result)
                seconds = ", ".join(
                    f"{cpu:.2f}/{wall:.2f}" for cpu, wall in zip(result.cpu_s, result.wall_s, strict=True)
                )
                print(f"round {i + 1}, step {step}, {setup.name}: CPU/wall s {seconds}", file=sys.stderr, flush=True)
    return results


def run_child(run: Run, environment: dict[str, str]) -> Result:
    """Do `run` in a fresh process.

    Raises:
        RuntimeError: it failed, or used more than one core; the message ends with its last lines.
    """
    result = Result(**run_in_child("benchmarks.speed_child", asdict(run), environment))
    if sum(result.cpu_s) > 1.05 * sum(result.wall_s):
        raise RuntimeError(f"{run} used more than one core: CPU {result.cpu_s}, wall {result.wall_s} s")
    return result


def run_in_child(module: str, task: dict[str, Any], environment: Mapping[str, str] = MappingProxyType({})) -> Any:
    """Give a task to a module in a fresh process, through JSON files, and return its answer.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "task.json"), Path(directory, "answer.json")
        source.write_text(json.dumps(task))
        done = subprocess.run(
            [sys.executable, "-m", module, str(source), str(target)],
            env={**os.environ, **CHILD_ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise RuntimeError(f"{module} {task} failed with exit status {done.returncode}:\n{tail}")
        return json.loads(target.read_text())


def summarise(results: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Medians and ranges per configuration; `ratio_to_plain` is plain / this, paired by round: above 1 is faster."""
    summary = {}
    for name, rounds in results.items():
        cpu = [seconds for result in rounds for seconds in result.cpu_s]
        wall = [seconds for result in rounds for seconds in result.wall_s]
        ratios = [median(a.cpu_s) / median(b.cpu_s) for a, b in zip(results["plain"], rounds, strict=True)]
        summary[name] = {
            "cpu_s": median(cpu),
            "cpu_s_range": [min(cpu), max(cpu)],
            "wall_s": median(wall),
            "wall_s_range": [min(wall), max(wall)],
            "ratio_to_plain": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "score_share": _share([r.score_s for r in rounds], [median(r.wall_s) for r in rounds]),
            "compact_share": _share([r.compact_s for r in rounds], [median(r.wall_s) for r in rounds]),
            "blocks_before": rounds[0].blocks_before,
            "blocks_after": rounds[0].blocks_after,
            "blocks_end": rounds[0].blocks_end,
        }
    return summary


def print_summary(step_tokens: int, summary: dict[str, dict[str, Any]]) -> None:
    """One table for one step size."""
    header = ["", "CPU s", "range", "plain / this", "range", "wall s", "score", "compact", "blocks before / after"]
    rows = [
        [
            name,
            f"{row['cpu_s']:.2f}",
            "{:.2f}..{:.2f}".format(*row["cpu_s_range"]),
            f"{row['ratio_to_plain']:.3f}",
            "{:.3f}..{:.3f}".format(*row["ratio_range"]),
            f"{row['wall_s']:.2f}",
            f"{row['score_share']:.2%}",
            f"{row['compact_share']:.2%}",
            f"{row['blocks_before']} / {row['blocks_after']}",
        ]
        for name, row in summary.items()
    ]
    print(f"\nTime to first token, {step_tokens} tokens a step\n\n{format_table(header, rows)}")
    low, high = summary["plain"]["cpu_s_range"]
    if high > 1.05 * low:
        print(f"\nThe machine is not quiet: plain runs differ by {high / low - 1:.0%}; small differences say nothing.")


def _share(parts: Sequence[float], wholes: Sequence[float]) -> float:
    return median(part / whole for part, whole in zip(parts, wholes, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2048 tokens, 512 a step, 1 round: does it run at all")
    parser.add_argument("--prompt", type=int, default=8192, help="prompt tokens")
    parser.add_argument("--steps", default="2048,8192", help="max_num_batched_tokens, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="processes per configuration and step size")
    parser.add_argument("--repeats", type=int, default=1, help="timed prompts per process, after a warm-up")
    parser.add_argument("--json", type=Path, help="file for the JSON line, too")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.steps, args.rounds = 2048, "512", 1
    steps = [int(step) for step in args.steps.split(",")]
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory))
        results = measure_rounds(model, steps, prompt_tokens=args.prompt, rounds=args.rounds, repeats=args.repeats)
    summaries = {step: summarise(results[step]) for step in steps}
    for step, summary in summaries.items():
        print_summary(step, summary)
    report = {
        "benchmark": "speed",
        "environment": environment,
        "model": asdict(LlamaShape()),
        "block_size": BLOCK_SIZE,
        "prompt_tokens": args.prompt,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "setups": {setup.name: {"method": setup.method, "config": setup.config} for setup in SETUPS},
        "steps": summaries,
    }
    line = json.dumps(report)
    print(f"\n{line}")
    if args.json is not None:
        args.json.write_text(f"{line}\n")


if __name__ == "__main__":
    main()
