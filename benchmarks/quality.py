"""How often a served model still answers right when its prompts are compressed.

python -m benchmarks.quality [--methods none,fastkv,...] [--tasks niah,mk,mq] [--lengths 1024,2048] [-n 48]

One `vllm serve` per method (default: plain vLLM and all registered methods, each with its defaults), the same
questions to each through the OpenAI API, temperature 0. A cell is the share of exactly right answers with its 95 %
Wilson interval and, below plain, its ratio to plain. Of multi-turn tasks only the first question is asked.

Ends with an error where a server's own counters do not say that each prompt was compressed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment
from benchmarks.questions import CHECKPOINT, PLAIN, ask, tiny_model_config
from benchmarks.server import Server, sample_value, serve
from benchmarks.table import format_table
from benchmarks.tiny_model.language import TASKS, make_example
from fastkv_vllm.methods import method_names

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
CONCURRENCY = 4


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of questions asked."""

    num_right: int
    num_asked: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the share."""
        n, p, z = self.num_asked, self.share, Z_95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)


Cells = dict[tuple[str, int], Accuracy]  # by task and prompt length


def measure(method: str, tasks: Sequence[str], lengths: Sequence[int], num_questions: int) -> Cells:
    """Accuracy of one method in each cell, on a server of its own.

    Raises:
        RuntimeError: the server did not compress each prompt, or compressed for plain.
    """
    flags: dict[str, Any] = {}
    if method != PLAIN:
        flags = {"method": method, "config": tiny_model_config(method)}
    cells = {}
    with serve(CHECKPOINT, extra=["--enforce-eager"], **flags) as server:
        for task in tasks:
            for length in lengths:
                examples = [make_example(task, length, seed) for seed in range(num_questions)]
                replies = ask(server, examples, concurrency=CONCURRENCY)
                right = sum(reply.is_right(example) for reply, example in zip(replies, examples, strict=True))
                cells[task, length] = Accuracy(right, num_questions)
                print(f"{method}, {task} {length}: {right} of {num_questions}", file=sys.stderr, flush=True)
        _require_compressed(server, method, len(cells) * num_questions)
    return cells


def _require_compressed(server: Server, method: str, num_prompts: int) -> None:
    samples = server.metrics()
    compressed = sample_value(samples, "vllm:fastkv_requests_compressed_total")
    expected = 0 if method == PLAIN else num_prompts
    if compressed != expected:
        left_alone = sample_value(samples, "vllm:fastkv_requests_left_alone_total")
        raise RuntimeError(
            f"{method}: {num_prompts} prompts sent, {compressed:.0f} compressed (expected {expected}), "
            f"{left_alone:.0f} left alone; prompts under min_tokens cannot be measured"
        )


def print_results(results: dict[str, Cells]) -> None:
    """One row per method, one column per task and length."""
    columns = list(next(iter(results.values())))
    header = ["exact match", *(f"{task} {length}" for task, length in columns)]
    rows = [[method, *(_cell(results, method, column) for column in columns)] for method in results]
    print(f"\n{format_table(header, rows)}")


def _cell(results: dict[str, Cells], method: str, column: tuple[str, int]) -> str:
    accuracy = results[method][column]
    text = "{:.2f} [{:.2f}, {:.2f}]".format(accuracy.share, *accuracy.interval)
    ratio = _ratio(results, method, column)
    return text if ratio is None or method == PLAIN else f"{text} x{ratio:.2f}"


def _ratio(results: dict[str, Cells], method: str, column: tuple[str, int]) -> float | None:
    """Accuracy over plain's; None where plain was not measured or has no right answer."""
    plain = results[PLAIN][column].share if PLAIN in results else 0.0
    return results[method][column].share / plain if plain else None


def _as_json(results: dict[str, Cells]) -> list[dict[str, object]]:
    return [
        {
            "method": method,
            "task": task,
            "length": length,
            "num_right": accuracy.num_right,
            "num_asked": accuracy.num_asked,
            "share": accuracy.share,
            "interval_95": accuracy.interval,
            "ratio_to_plain": _ratio(results, method, (task, length)),
        }
        for method, cells in results.items()
        for (task, length), accuracy in cells.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join([PLAIN, *method_names()]), help="comma-separated")
    parser.add_argument("--tasks", default="niah,mk,mq", help=f"of {', '.join(TASKS)}, comma-separated")
    parser.add_argument("--lengths", default="1024,2048", help="prompt tokens, comma-separated")
    parser.add_argument("-n", type=int, default=48, help="questions a cell")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    methods, tasks = args.methods.split(","), args.tasks.split(",")
    lengths = [int(length) for length in args.lengths.split(",")]
    unknown = [name for name in methods if name not in (PLAIN, *method_names())]
    unknown += [name for name in tasks if name not in TASKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    environment = describe_environment()
    results = {method: measure(method, tasks, lengths, args.n) for method in methods}
    print_results(results)
    if args.json is not None:
        report = {
            "benchmark": "quality",
            "environment": environment,
            "model": CHECKPOINT.relative_to(Path(__file__).parents[1]).as_posix(),
            "configs": {method: tiny_model_config(method) for method in methods if method != PLAIN},
            "results": _as_json(results),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
