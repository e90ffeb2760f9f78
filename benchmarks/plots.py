"""Figures from the reports: python -m benchmarks.plots [--results DIR] [--out DIR] [--format svg|png]

Draws what the reports in benchmarks/results/ hold and nothing else; docs/results.md shows the files.

| file | from | shows |
|---|---|---|
| pareto | curve.json | score by retention ratio, one panel per task and protocol |
| tradeoff | tradeoff.json | score by bytes held, one line per codec, one panel per task |
| needles | quality.json | score by prompt length and the needle's depth, one panel per method |
| ttft | speed.json | time to first token by prompt length |
| decode | speed.json | time of a decode step by prompt length |
| load | speed.json | requests served well and the tail of the time to first token, by requests under way |
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastkv_vllm.codecs import NO_CODEC

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "img"
PLAIN = "none"
PLAIN_STYLE: dict[str, Any] = {"color": "0.35", "linestyle": "--", "marker": None}
# Okabe and Ito's colours, told apart by the colour blind; markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NEEDLE_TASK, NEEDLE_PROTOCOL = "mk", "question"
STYLE = {"font.size": 9, "svg.hashsalt": "fastkv", "axes.spines.top": False, "axes.spines.right": False}


def pareto(report: dict[str, Any]) -> Figure:
    """Score by retention ratio: small multiples of task and protocol, plain vLLM as a dashed line."""
    rows = report["rows"]
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != PLAIN]
    tasks = list(dict.fromkeys((row["task"], row["turns"]) for row in rows))
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    panels = [(p, t) for p in protocols for t in tasks if _select(rows, protocol=p, task=t[0], turns=t[1])]
    columns = min(6, len(tasks))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(1.9 * columns, 2.0 * lines + 0.8), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (protocol, (task, turns)) in zip(grid.flat, panels, strict=False):
        cells = _select(rows, protocol=protocol, task=task, turns=turns)
        _pareto_panel(axes, cells, methods)
        axes.set_title(f"{task}{', turns 2+' if turns != '1' else ''}\n({protocol})", fontsize=8)
    figure.supxlabel("retention ratio (share of the prompt's entries kept)", fontsize=9)
    figure.supylabel("score (share of answers\nexactly right)", fontsize=9)
    _legend(figure, grid.flat[0])
    return figure


def _pareto_panel(axes: Axes, cells: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    for plain in _select(cells, method=PLAIN):
        axes.axhline(plain["mean"], label="plain vLLM", **{**PLAIN_STYLE, "lw": 1.2})
    ratios = sorted({row["config"]["retention_ratio"] for row in cells if row["method"] != PLAIN})
    for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=False):
        points = sorted(_select(cells, method=method), key=lambda row: row["config"]["retention_ratio"])
        x, y = [row["config"]["retention_ratio"] for row in points], [row["mean"] for row in points]
        # An interval may miss its mean by a rounding.
        spread = [[max(0, r["mean"] - r["low"]) for r in points], [max(0, r["high"] - r["mean"]) for r in points]]
        axes.errorbar(x, y, yerr=spread, color=colour, marker=marker, ms=4, lw=1.2, elinewidth=0.6, label=method)
    axes.set(xscale="log", ylim=(-0.04, 1.06))
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{ratio:g}" for ratio in ratios], rotation=45, fontsize=7)
    axes.grid(axis="y", lw=0.3)


def tradeoff(report: dict[str, Any]) -> Figure:
    """Score by the share of the prompt's bytes that is held: fewer entries, or the same ones stored smaller."""
    rows = report["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    codecs = list(dict.fromkeys(row["config"].get("codec", NO_CODEC) for row in rows if row["method"] != PLAIN))
    names = {NO_CODEC: "16 bits"}
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.0 * len(tasks), 3.4), sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=True):
        for plain in _select(rows, task=task, method=PLAIN):
            axes.axhline(plain["mean"], label="plain vLLM", **{**PLAIN_STYLE, "lw": 1.2})
        cells = [row for row in _select(rows, task=task) if row["method"] != PLAIN]
        for codec, colour, marker in zip(codecs, COLOURS, MARKERS, strict=False):
            points = sorted(
                (row for row in cells if row["config"].get("codec", NO_CODEC) == codec),
                key=lambda row: (row["held"], row["kept"]),
            )
            spread = [[max(0, r[a] - r[b]) for r in points] for a, b in (("mean", "low"), ("high", "mean"))]
            x, y = [r["held"] for r in points], [r["mean"] for r in points]
            axes.errorbar(
                x,
                y,
                yerr=spread,
                color=colour,
                marker=marker,
                ms=4,
                lw=1.2,
                elinewidth=0.6,
                label=names.get(codec, codec),
            )
        axes.set(xscale="log", ylim=(-0.04, 1.06), title=task, xlabel="bytes held (share of plain vLLM's)")
        axes.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.4, 0.8]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(lw=0.3)
    grid.flat[0].set_ylabel("score (share of answers exactly right)")
    _legend(figure, grid.flat[0])
    return figure


def needles(report: dict[str, Any]) -> Figure:
    """Score by prompt length and depth of the needle, one panel per contender; empty where none was asked."""
    rows = _select(report["rows"], task=NEEDLE_TASK, protocol=NEEDLE_PROTOCOL)
    names = list(dict.fromkeys(row["method"] for row in rows))
    lengths = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(6, len(names))
    lines = -(-len(names) // columns)
    size = 2.0 * columns + 0.9, 2.7 * lines + 0.5
    figure, grid = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    image = None
    for axes, name in zip(grid.flat, names, strict=False):
        found = [_select(rows, method=name, group=length)[0]["by_depth"] for length in lengths]
        shares = [[c[i][0] / c[i][1] if c[i][1] else float("nan") for c in found] for i in range(len(found[0]))]
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="cividis", origin="upper")
        axes.set_title("plain vLLM" if name == PLAIN else name)
        axes.set_xticks(range(len(lengths)), lengths, rotation=45)
    depths = len(shares)
    grid.flat[0].set_yticks(range(depths), [f"{100 * i // depths}-{100 * (i + 1) // depths} %" for i in range(depths)])
    figure.supxlabel("prompt tokens")
    figure.supylabel("depth of the needle in the context")
    figure.colorbar(image, ax=grid.ravel().tolist(), label="share of answers exactly right", shrink=0.5)
    return figure


def ttft(report: dict[str, Any]) -> Figure:
    """Time to first token by prompt length, and how many times faster than plain vLLM."""
    return _by_length(report, "ttft-", "first_token_cpu_s", "time to first token [CPU s]", log=True)


def decode(report: dict[str, Any]) -> Figure:
    """Time of a decode step of one request by prompt length, and how many times faster than plain vLLM."""
    return _by_length(report, "ttft-", "step_ms", "decode step of one request [CPU ms]", log=False)


def _by_length(report: dict[str, Any], prefix: str, figure_name: str, label: str, *, log: bool) -> Figure:
    cases = sorted(
        (case for name, case in report["scenarios"].items() if name.startswith(prefix)),
        key=lambda case: case["load"]["prompt_tokens"],
    )
    figure, (absolute, ratio) = plt.subplots(1, 2, figsize=(8, 3.2))
    names = list(dict.fromkeys(name for case in cases for name in case["setups"]))
    for name, style in zip(names, _styles(names), strict=True):
        points = [
            (case["load"]["prompt_tokens"], case["setups"][name]["figures"][figure_name])
            for case in cases
            if figure_name in case["setups"].get(name, {}).get("figures", {})
        ]
        x = [tokens for tokens, _ in points]
        absolute.plot(x, [f["median"] for _, f in points], label=name, **style)
        ratio.plot(x, [f["ratio_to_plain"]["median"] for _, f in points], **style)
        low, high = ([f["ratio_to_plain"]["range"][i] for _, f in points] for i in (0, 1))
        ratio.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
    lengths = [case["load"]["prompt_tokens"] for case in cases]
    for axes in (absolute, ratio):
        axes.set(xscale="log", xlabel="prompt tokens")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(lengths, rotation=45)
        axes.grid(lw=0.3)
    absolute.set(yscale="log" if log else "linear", ylabel=label)
    ratio.set(ylabel="plain vLLM / this (above 1 is faster)")
    _legend(figure, absolute)
    return figure


def load(report: dict[str, Any]) -> Figure:
    """Requests per second that met the limits, and the slowest first tokens, by requests under way at a time."""
    cases = [case for name, case in report["scenarios"].items() if name.startswith("load-")]
    cases.sort(key=lambda case: case["load"]["concurrency"])
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2))
    names = list(dict.fromkeys(name for case in cases for name in case["setups"]))
    counts = [case["load"]["concurrency"] for case in cases]
    shown = {
        "request_goodput": ("served well [requests/s]", 1.0),
        "p99_ttft_ms": ("time to first token, 99th percentile [s]", 1e-3),
    }
    for axes, (figure_name, (label, unit)) in zip(panels, shown.items(), strict=True):
        for name, style in zip(names, _styles(names), strict=True):
            medians = [case["setups"][name]["figures"][figure_name]["median"] * unit for case in cases]
            axes.plot(counts, medians, label=name, **style)
        axes.set(xlabel="requests under way at a time", ylabel=label, xticks=counts, ylim=(0, None))
        axes.grid(lw=0.3)
    _legend(figure, panels[0])
    return figure


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    others = iter(zip(COLOURS, MARKERS, strict=True))
    made = []
    for name in names:
        if name == "plain":
            made.append({**PLAIN_STYLE, "lw": 1.4})
        else:
            colour, marker = next(others)
            made.append({"color": colour, "marker": marker, "ms": 5, "lw": 1.4})
    return made


def _legend(figure: Figure, axes: Axes) -> None:
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)


def _select(rows: Sequence[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "pareto": ("curve.json", pareto),
    "tradeoff": ("tradeoff.json", tradeoff),
    "needles": ("quality.json", needles),
    "ttft": ("speed.json", ttft),
    "decode": ("speed.json", decode),
    "load": ("speed.json", load),
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the same data gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the reports")
    parser.add_argument("--out", type=Path, default=IMAGES, help="directory for the figures")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args()
    with plt.rc_context(STYLE):
        for name, (source, draw) in PLOTS.items():
            if not (args.results / source).exists():
                print(f"{name}: {source} has not been measured")
                continue
            path = args.out / f"{name}.{args.format}"
            save(draw(json.loads((args.results / source).read_text())), path)
            print(path)


if __name__ == "__main__":
    main()
