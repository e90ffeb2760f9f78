"""The report: one JSON file that grows case by case, and the tables made from it alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.load import PLAIN
from benchmarks.speed.scenarios import SCENARIOS, scenario_of
from benchmarks.speed.summary import FIGURES
from benchmarks.table import format_table

Report = Mapping[str, Any]
FIXED = ("benchmark", "quick", "model", "block_size")  # what all cases of a file have in common


def read_report(path: Path) -> dict[str, Any] | None:
    """A report written earlier; None: there is no such file.

    Raises:
        ValueError: it is something else's.
    """
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    missing = [name for name in (*FIXED, "scenarios") if name not in report]
    if missing:
        raise ValueError(f"{path} is not a report of benchmarks.speed: it has no {', '.join(missing)}; move it away")
    return report


def merge(earlier: Report | None, new: Report) -> dict[str, Any]:
    """The new report with the earlier one's cases, where it has not measured them again.

    Raises:
        ValueError: they are not of the same kind.
    """
    if earlier is None:
        return dict(new)
    for name in FIXED:
        if earlier[name] != new[name]:
            raise ValueError(f"{name} is {earlier[name]} in the file and {new[name]} here: name another file")
    return {**new, "scenarios": {**earlier["scenarios"], **new["scenarios"]}}


def write_report(path: Path, report: Report) -> None:
    path.write_text(f"{json.dumps(report, indent=1)}\n")


def tables(report: Report) -> list[tuple[str, str]]:
    """Title and Markdown of each scenario the report has cases of, in the scenarios' order."""
    found = []
    for name, scenario in SCENARIOS.items():
        if any(scenario_of(case) == name for case in report["scenarios"]):
            cases = [
                entry for case, entry in report["scenarios"].items() if scenario_of(case) in (name, *scenario.rows_of)
            ]
            cases.sort(key=lambda entry: tuple(entry["load"][key] or 0 for key in _ORDER))
            found.append((scenario.title, _table(scenario.columns, cases)))
    return found


_ORDER = ("num_requests", "prompt_tokens", "step_tokens", "concurrency")


def _table(columns: tuple[str, ...], cases: list[Report]) -> str:
    """Rows of the cases; a column that none of them has is left out: an earlier version did not measure it."""
    known = {name for entry in cases for setup in entry["setups"].values() for name in setup.get("figures", ())}
    columns = tuple(column for column in columns if column.removesuffix(" ratio") in known)
    headings = [FIGURES[column].heading if column in FIGURES else _ratio_heading(column) for column in columns]
    rows, previous = [], None
    for entry in cases:
        for name, setup in entry["setups"].items():
            rows.append(["" if entry is previous else entry["label"], name, *_cells(columns, setup)])
            previous = entry
    notes = "".join(f"\n\n{note}" for note in _notes(columns, cases))
    return format_table(["", "", *headings], rows) + notes


def _ratio_heading(column: str) -> str:
    better = FIGURES[column.removesuffix(" ratio")].better
    return "plain / this" if better == "lower" else "this / plain"


def _cells(columns: tuple[str, ...], setup: Report) -> list[str]:
    if "refused" in setup:
        return [f"refused: {setup['refused']}", *[""] * (len(columns) - 1)]
    return [_cell(column, setup["figures"]) for column in columns]


def _cell(column: str, figures: Report) -> str:
    """Median, and the range where there is one."""
    name = column.removesuffix(" ratio")
    statistics, form = figures.get(name), FIGURES[name].form
    if column != name and statistics is not None:
        statistics, form = statistics.get("ratio_to_plain"), "{:.3f}".format
    if statistics is None:
        return ""
    middle, low, high = (form(value) for value in (statistics["median"], *statistics["range"]))
    return middle if low == high else f"{middle} ({low}..{high})"


def _notes(columns: tuple[str, ...], cases: list[Report]) -> list[str]:
    """How far runs of plain vLLM differ in the first column; nothing of one round."""
    name = columns[0]
    spreads = []
    for entry in cases:
        plain = entry["setups"].get(PLAIN.name, {}).get("figures", {}).get(name)
        if plain is not None and FIGURES[name].better is not None and len(plain["values"]) > 1:
            spreads.append(plain["range"][1] / plain["range"][0] - 1)
    if not spreads:
        return []
    return [f"Runs of plain vLLM under one load differ by up to {max(spreads):.1%}: smaller differences say nothing."]
