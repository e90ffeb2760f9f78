"""What compression does to throughput in a fixed pool, and to decode steps at long context, against plain vLLM.

python -m benchmarks.capacity [--rounds 2] [--only pool|decode] [--json FILE]

The random model and the processes of `benchmarks.speed`, steps of 2048 tokens, one thread, configurations in turn.

| scenario | load | figure |
|---|---|---|
| pool | 12 requests of 2048 + 384 tokens, 250 blocks of 32 | tokens per CPU second, in all and in decode |
| decode | 4 requests of 8192 + 48 tokens, room for all | CPU milliseconds per step of all four |
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.capacity_child import Load, Outcome
from benchmarks.environment import describe_environment
from benchmarks.models import LlamaShape, make_random_llama
from benchmarks.speed import run_in_child
from benchmarks.table import format_table

SETUPS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "snapkv": ("snapkv", {"retention_ratio": 0.1}),
    "fastkv": ("fastkv", {"retention_ratio": 0.1, "tsp_layer": 7, "tsp_ratio": 0.2}),
}
SCENARIOS = {"pool": (12, 2048, 384, 250), "decode": (4, 8192, 48, 1100)}


def measure_rounds(model: Path, scenario: str, rounds: int) -> dict[str, list[Outcome]]:
    """Outcomes by configuration, one per round; progress goes to stderr."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in SETUPS}
    for i in range(rounds):
        for name, (method, config) in SETUPS.items():
            load = Load(str(model), method, config, *SCENARIOS[scenario])
            outcome = Outcome(**run_in_child("benchmarks.capacity_child", asdict(load)))
            outcomes[name].append(outcome)
            print(f"{scenario}, round {i + 1}, {name}: {outcome}", file=sys.stderr, flush=True)
    return outcomes


def figures(scenario: str) -> dict[str, Callable[[Outcome], float | None]]:
    """Figures of a scenario by their headings; those per second are better when higher, those in ms when lower."""
    requests, prompt, output, _ = SCENARIOS[scenario]
    if scenario == "decode":
        return {"ms per step": lambda o: o.full_step_ms}
    return {
        "tokens/s": lambda o: requests * (prompt + output) / o.cpu_s,
        "decode tokens/s": lambda o: o.decode_tokens / o.decode_cpu_s,
    }


def summarise(scenario: str, outcomes: dict[str, list[Outcome]]) -> dict[str, dict[str, Any]]:
    """Per configuration: median, range and, paired by round, gain over plain (above 1 is better) of each figure."""
    summary: dict[str, dict[str, Any]] = {}
    for name, rounds in outcomes.items():
        summary[name] = {
            "peak_running": rounds[0].peak_running,
            "num_preemptions": [o.num_preemptions for o in rounds],
        }
        for heading, figure in figures(scenario).items():
            values = [_number(figure(o)) for o in rounds]
            plain = [_number(figure(o)) for o in outcomes["plain"]]
            gains = [a / b if heading.startswith("ms") else b / a for a, b in zip(plain, values, strict=True)]
            summary[name][heading] = {"median": median(values), "range": [min(values), max(values)], "gain": gains}
    return summary


def _number(value: float | None) -> float:
    if value is None:
        raise RuntimeError("no step decoded all requests at once: the pool is too small for this scenario")
    return value


def print_summary(scenario: str, summary: dict[str, dict[str, Any]]) -> None:
    """One table for one scenario."""
    headings = list(figures(scenario))
    header = ["", "at once", "preempted", *(h for heading in headings for h in (heading, "gain"))]
    rows = []
    for name, row in summary.items():
        cells = [name, str(row["peak_running"]), "/".join(map(str, row["num_preemptions"]))]
        for heading in headings:
            cells += [f"{row[heading]['median']:.1f}", " ".join(f"{gain:.2f}" for gain in row[heading]["gain"])]
        rows.append(cells)
    print(f"\n{scenario}: requests, prompt, output, blocks = {SCENARIOS[scenario]}\n\n{format_table(header, rows)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="processes per configuration and scenario")
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario")
    parser.add_argument("--json", type=Path, help="file for the JSON line, too")
    args = parser.parse_args()
    environment = describe_environment()
    summaries = {}
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory))
        for scenario in [args.only] if args.only else SCENARIOS:
            summaries[scenario] = summarise(scenario, measure_rounds(model, scenario, args.rounds))
    for scenario, summary in summaries.items():
        print_summary(scenario, summary)
    line = json.dumps(
        {
            "benchmark": "capacity",
            "environment": environment,
            "model": asdict(LlamaShape()),
            "scenarios": SCENARIOS,
            "setups": SETUPS,
            "results": summaries,
        }
    )
    print(f"\n{line}")
    if args.json is not None:
        args.json.write_text(f"{line}\n")


if __name__ == "__main__":
    main()
