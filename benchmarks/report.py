"""docs/results.md, made from the reports: python -m benchmarks.report [--check]

The text is `benchmarks/results/results.md.in`; what stands there in double braces is filled in from the JSON reports
beside it, so that no figure is written by hand:

| in braces | becomes |
|---|---|
| `command REPORT` | the command that made a report |
| `machine REPORT` | what it ran on |
| `table quality PROTOCOL` (`quality_cuts`, `quality_codecs`, `quality_guard`, `tradeoff`) | a table |
| `table speed SCENARIO`, `table oracle` (`differences`, `kvpress`, `roofline`, `soak`) | a table |
| `speed CASE SETUP FIGURE [ratio]` | a median of the speed report, or its ratio to plain vLLM |
| `quality METHOD TASK LENGTH PROTOCOL [2+]` | a mean score |
"""

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.model import comparison_table
from benchmarks.oracle.differences import DIFFERENCES
from benchmarks.roofline import compare_measured
from benchmarks.speed.report import tables as speed_tables
from benchmarks.speed.scenarios import SCENARIOS
from benchmarks.speed.summary import FIGURES
from benchmarks.table import format_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = RESULTS / "results.md.in"
PAGE = ROOT / "docs" / "results.md"


@cache
def read(name: str) -> dict[str, Any]:
    """A report by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def command(name: str) -> str:
    return read(name)["command"]


def machine(name: str) -> str:
    environment = read(name)["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return f"{environment['cpu']}, {environment['num_cpus']} cores, {versions}, {environment['date'][:10]}"


def table(kind: str, name: str = "") -> str:
    """Markdown of a table."""
    if kind in ("quality", "quality_cuts", "quality_codecs", "quality_guard", "tradeoff"):
        return dict(quality.tables(read(kind)))[name]
    if kind == "speed":
        return dict(speed_tables(read("speed")))[SCENARIOS[name].title]
    tables = {"oracle": _oracle, "differences": _differences, "kvpress": _kvpress, "roofline": _roofline, "soak": _soak}
    return tables[kind]()


def speed(case: str, setup: str, figure: str, ratio: str = "") -> str:
    """A median; ratios have two digits."""
    statistics = read("speed")["scenarios"][case]["setups"][setup.replace("_", " ")]["figures"][figure]
    if ratio:
        return f"{statistics['ratio_to_plain']['median']:.2f}"
    return FIGURES[figure].form(statistics["median"])


def score(method: str, task: str, group: str, protocol: str, turns: str = "1") -> str:
    """A mean score."""
    wanted = {"method": method, "task": task, "group": group, "protocol": protocol, "turns": turns}
    (row,) = [row for row in read("quality")["rows"] if all(row[key] == value for key, value in wanted.items())]
    return f"{row['mean']:.2f}"


def _oracle() -> str:
    rows = []
    for pair in read("oracle")["aligned"]:
        settings = ", ".join(f"{key} {value}" for key, value in pair["settings"].items())
        answers = "" if pair["num_same_answers"] is None else f"{pair['num_same_answers']} of {pair['num_prompts']}"
        rows.append(
            [
                f"{pair['method']} {pair['config']['retention_ratio']:g}",
                f"{pair['press']} ({settings})" if settings else pair["press"],
                f"{pair['kept_by_us']} of {pair['num_tokens']}",
                str(pair["num_sets"]),
                f"{pair['minimum_overlap']:.3f}",
                f"{pair['share_identical']:.0%}",
                answers,
            ]
        )
    header = ["ours", "kvpress", "entries kept", "sets", "smallest overlap", "identical", "same answers"]
    return format_table(header, rows)


def _differences() -> str:
    """Definitions of ours and kvpress's, and the mean overlap of the kept sets with one difference left in."""
    overlaps = {(row["method"], row["what"]): f"{row['mean_overlap']:.2f}" for row in read("oracle")["left_in"]}
    rows = []
    for difference in DIFFERENCES:
        left_in = [(method, overlaps.get((method, difference.what))) for method in difference.methods]
        cells = [difference.what, ", ".join(difference.methods), difference.ours, difference.theirs]
        measured = ", ".join(f"{method} {overlap}" for method, overlap in left_in if overlap is not None)
        rows.append([*cells, difference.taken_out, measured])
    return format_table(["", "methods", "ours", "kvpress", "taken out by", "overlap if left in"], rows)


def _kvpress() -> str:
    results = read("kvpress_speed")["results"]
    rows = [
        [
            name,
            *(f"{row[f'{part}_tokens_per_cpu_s']['median']:.0f}" for part in ("prefill", "decode")),
            *(f"{row[f'{part}_cache_bytes'] / 2**20:.1f}" for part in ("peak", "decode")),
        ]
        for name, row in results.items()
    ]
    header = ["", "prefill tokens/CPU s", "decode tokens/CPU s", "cache MiB, peak", "cache MiB, decoding"]
    return format_table(header, rows)


def _roofline() -> str:
    rows, notes = compare_measured(RESULTS)
    return "\n".join([*(f"{note}\n" for note in notes), comparison_table(rows, "measured")])


def _soak() -> str:
    rows = []
    for name, entry in read("soak")["servers"].items():
        acts, metrics, memory = entry["acts"], entry["metrics"], entry["memory_mib"]
        compressed = sum(count for metric, count in metrics.items() if metric.startswith("compressed by"))
        rows.append(
            [
                "plain vLLM" if name == "none" else name,
                *(str(acts[act]) for act in ("read to the end", "left")),
                *(f"{count:.0f}" for count in (compressed, metrics["num_preemptions"], metrics["prefix_cache_hits"])),
                f"{memory[1]:.0f} -> {memory[-1]:.0f}",
                f"{len(entry['wrong'])} of {acts['sent again']}",
            ]
        )
    clients = ["read to the end", "went away"]
    header = ["server", *clients, "compressed", "preempted", "tokens from the cache", "MiB", "wrong when sent again"]
    return format_table(header, rows)


FILL = {"command": command, "machine": machine, "table": table, "speed": speed, "quality": score}


def render() -> str:
    """The page."""

    def fill(match: re.Match[str]) -> str:
        word, *arguments = match[1].split()
        return FILL[word](*arguments)

    note = "<!-- Made by `python -m benchmarks.report` from benchmarks/results/. Edit results.md.in there. -->\n"
    return note + re.sub(r"\{\{(.+?)\}\}", fill, TEMPLATE.read_text())


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is out of date")
    args = parser.parse_args()
    page = render()
    if args.check:
        return int(PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
