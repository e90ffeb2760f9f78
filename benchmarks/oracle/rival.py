"""kvpress on transformers as a rival: speed and cache of one long request, each engine also uncompressed.

Two engines differ in far more than compression: compare a compressed run with its own engine's plain run first. Both
keep the same number of entries of the same prompt by SnapKV with average pooling (see `benchmarks.oracle.differences`),
in float32, on one thread, one request at a time, a process each, in turn. CPU seconds are those of the process.

| figure | meaning |
|---|---|
| prefill, decode tokens/s | per CPU second, median of repeats: the prompt with its first token; the tokens after |
| peak cache | most bytes at once: transformers fills layer by layer, vLLM takes all blocks of a prompt at once |
| decode cache | bytes held with the first new token or two: kvpress per entry, vLLM in whole blocks |
"""

import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.child import run_in_child
from benchmarks.environment import describe_environment
from benchmarks.judges import ROOT
from benchmarks.oracle.differences import Pair, aligned, compression_ratio
from benchmarks.oracle.judge import run_kvpress
from benchmarks.questions import CHECKPOINT
from benchmarks.table import format_table
from benchmarks.tiny_model.language import make_example

RETENTION_RATIO = 0.1
OUTPUT_TOKENS = 128
ROUNDS, REPEATS = 3, 3


@dataclass(frozen=True)
class Contender:
    """One row: an engine, plain or compressing; `plain` is the row it is compared with."""

    engine: str
    compresses: bool

    @property
    def name(self) -> str:
        return f"{self.engine} {'snapkv' if self.compresses else 'plain'}"

    @property
    def plain(self) -> str:
        return f"{self.engine} plain"


CONTENDERS = tuple(
    Contender(engine, on) for engine in ("transformers + kvpress", "vLLM + ours") for on in (False, True)
)


def compare_speed(num_tokens: int) -> dict[str, Any]:
    """Run and print everything; returns the report.

    Args:
        num_tokens: tokens of the prompt.

    Raises:
        RuntimeError: a side failed, used more than one core or did not compress.
    """
    environment = describe_environment()
    pair = aligned("snapkv", RETENTION_RATIO, num_tokens)
    prompt = make_example("mk", num_tokens, 0).prompt_ids
    load = {"prompt": prompt, "output_tokens": OUTPUT_TOKENS, "repeats": REPEATS}
    results: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in CONTENDERS}
    versions: dict[str, str] = {}
    for i in range(ROUNDS):
        for contender in CONTENDERS:
            result, found = _run(contender, pair, load)
            versions |= found
            _require_one_core(contender, result)
            results[contender.name].append(result)
            print(f"round {i + 1}, {contender.name}: {result}", file=sys.stderr, flush=True)
    summary = {contender.name: _summarise(results[contender.name], num_tokens) for contender in CONTENDERS}
    _print_summary(summary, pair)
    return {
        "benchmark": "kvpress_speed",
        "environment": environment,
        "judge": versions,
        "model": CHECKPOINT.relative_to(ROOT).as_posix(),
        "dtype": "float32",
        "prompt_tokens": num_tokens,
        "output_tokens": OUTPUT_TOKENS,
        "kept": pair.kept_by_us,
        "rounds": ROUNDS,
        "repeats": REPEATS,
        "results": summary,
    }


def _run(contender: Contender, pair: Pair, load: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """One process's figures, and the judge's versions where it was the judge's."""
    if contender.engine.startswith("vLLM"):
        method = pair.method if contender.compresses else None
        task = {"model": str(CHECKPOINT), "method": method, "config": pair.config, "load": load}
        return run_in_child("benchmarks.oracle.engine_child", task), {}
    settings = pair.settings | {"compression_ratio": compression_ratio(pair.num_tokens, pair.kept_by_them)}
    own = {"press": pair.press if contender.compresses else None, "settings": settings}
    answer = run_kvpress({"model": str(CHECKPOINT), "load": load | own})
    return answer["load"], answer["versions"]


def _require_one_core(contender: Contender, result: dict[str, Any]) -> None:
    cpu, wall = (sum(result[f"prefill_{kind}_s"] + result[f"decode_{kind}_s"]) for kind in ("cpu", "wall"))
    if cpu > 1.05 * wall:
        raise RuntimeError(f"{contender.name} used more than one core: CPU {cpu:.2f}, wall {wall:.2f} s")


def _summarise(rounds: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """Tokens per CPU second and per wall second, median and range over all repeats, and bytes of the cache."""
    summary: dict[str, Any] = {}
    for part, count in (("prefill", num_tokens), ("decode", OUTPUT_TOKENS - 1)):
        for kind in ("cpu", "wall"):
            rates = [count / seconds for result in rounds for seconds in result[f"{part}_{kind}_s"]]
            summary[f"{part}_tokens_per_{kind}_s"] = {"median": median(rates), "range": [min(rates), max(rates)]}
    for name in ("peak_cache_bytes", "decode_cache_bytes"):
        (summary[name],) = {result[name] for result in rounds}
    return summary


def _print_summary(summary: dict[str, dict[str, Any]], pair: Pair) -> None:
    header = ["", "prefill tokens/s", "range", "x plain", "decode tokens/s", "range", "x plain", "peak", "decode cache"]
    rows = []
    for contender in CONTENDERS:
        row, plain = summary[contender.name], summary[contender.plain]
        cells = [contender.name]
        for part in ("prefill", "decode"):
            rate, base = (figures[f"{part}_tokens_per_cpu_s"] for figures in (row, plain))
            cells += [f"{rate['median']:.0f}", "{:.0f}..{:.0f}".format(*rate["range"])]
            cells.append(f"{rate['median'] / base['median']:.2f}")
        rows.append([*cells, *(f"{row[name] / 2**20:.2f} MiB" for name in ("peak_cache_bytes", "decode_cache_bytes"))])
    print(
        f"Prompt of {pair.num_tokens} tokens, {pair.kept_by_us} entries kept, {OUTPUT_TOKENS} tokens made; CPU time\n"
    )
    print(format_table(header, rows))
