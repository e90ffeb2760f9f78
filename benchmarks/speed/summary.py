"""From what the processes said to figures: medians, ranges, and ratios to plain vLLM paired by round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.speed.load import PLAIN, Setup

Raw = Mapping[str, Any]  # what one process said: fields of its outcome, or `refused`
Value = float | None


@dataclass(frozen=True)
class Figure:
    """One figure of a run.

    Fields:
        heading: what tables call it, unit included.
        of: its value from what the process said and the fields of the load; None: this run has none.
        better: "lower" or "higher" where a ratio to plain makes sense.
        form: writes a value into a table.
    """

    heading: str
    of: Callable[[Raw, Raw], Value]
    better: str | None = None
    form: Callable[[float], str] = "{:.2f}".format


def _field(name: str) -> Callable[[Raw, Raw], Value]:
    return lambda raw, load: raw[name]


def _share(*names: str) -> Callable[[Raw, Raw], Value]:
    """Part of the wall time to the first token."""
    return lambda raw, load: sum(raw[name] for name in names) / raw["first_token_wall_s"]


def _tokens_per_s(raw: Raw, load: Raw) -> Value:
    return load["num_requests"] * (load["prompt_tokens"] + load["output_tokens"]) / raw["cpu_s"]


def _wall_tokens_per_s(raw: Raw, load: Raw) -> Value:
    return load["num_requests"] * (load["prompt_tokens"] + load["output_tokens"]) / raw["wall_s"]


def _tpot_wall_ms(raw: Raw, load: Raw) -> Value:
    """Of a request alone: from its first token to its last."""
    if load["num_requests"] > 1:
        return None
    return (raw["wall_s"] - raw["first_token_wall_s"]) / (load["output_tokens"] - 1) * 1e3


def _decode_tokens_per_s(raw: Raw, load: Raw) -> Value:
    return raw["decode_tokens"] / raw["decode_cpu_s"] if raw["decode_cpu_s"] else None


def _accepted_share(raw: Raw, load: Raw) -> Value:
    return raw["accepted"] / raw["drafted"] if raw["drafted"] else None


def _of_latency(name: str) -> dict[str, Figure]:
    """Mean, median and 99th percentile of a latency, as `vllm bench serve` reports them."""
    words = {"mean": "mean", "median": "p50", "p99": "p99"}
    return {
        f"{statistic}_{name}_ms": Figure(
            f"{name.upper()} {word} ms", _field(f"{statistic}_{name}_ms"), "lower", "{:.0f}".format
        )
        for statistic, word in words.items()
    }


FIGURES = {
    "first_token_cpu_s": Figure("CPU s", _field("first_token_cpu_s"), "lower"),
    "first_token_wall_s": Figure("wall s", _field("first_token_wall_s"), "lower"),
    # Both together: cases measured before the worker told them apart have no other.
    "choice_share": Figure("scoring and selecting", _share("score_s", "select_s"), form="{:.2%}".format),
    "score_share": Figure("scoring", _share("score_s"), form="{:.2%}".format),
    "select_share": Figure("selecting", _share("select_s"), form="{:.2%}".format),
    "compact_share": Figure("moving", _share("compact_s"), form="{:.2%}".format),
    "peak_blocks": Figure("blocks, peak", _field("peak_blocks"), form="{:.0f}".format),
    "blocks_before": Figure("blocks before the last chunk", _field("blocks_before"), form="{:.0f}".format),
    "blocks_after": Figure("blocks after it", _field("blocks_after"), form="{:.0f}".format),
    "tokens_per_s": Figure("tokens/CPU s", _tokens_per_s, "higher", "{:.1f}".format),
    "decode_tokens_per_s": Figure("decode tokens/CPU s", _decode_tokens_per_s, "higher", "{:.1f}".format),
    "accepted_share": Figure("drafts accepted", _accepted_share, form="{:.0%}".format),
    "step_ms": Figure("CPU ms a decode step", _field("step_ms"), "lower"),
    "wall_tokens_per_s": Figure("tokens/s", _wall_tokens_per_s, "higher", "{:.0f}".format),
    "tpot_wall_ms": Figure("ms a token", _tpot_wall_ms, "lower"),
    "peak_running": Figure("at once", _field("peak_running"), form="{:.0f}".format),
    "num_preemptions": Figure("preempted", _field("num_preemptions"), form="{:.0f}".format),
    "pool_mib": Figure("pool MiB", lambda raw, load: raw["pool_bytes"] / 2**20, form="{:.0f}".format),
    **_of_latency("ttft"),
    **_of_latency("tpot"),
    **_of_latency("itl"),
    "request_throughput": Figure("requests/s", _field("request_throughput"), "higher"),
    "request_goodput": Figure("served well/s", _field("request_goodput"), "higher", "{:.3f}".format),
    "token_throughput": Figure("tokens/s", _field("total_token_throughput"), "higher", "{:.0f}".format),
    "server_cpu_s": Figure("server CPU s", _field("server_cpu_s"), "lower", "{:.1f}".format),
    "worker_cpu_s": Figure("worker CPU s", _field("worker_cpu_s"), "lower", "{:.1f}".format),
    "entry_bytes": Figure("bytes a number", _field("entry_bytes"), form="{:.0f}".format),
    "is_declared": Figure("backend lists it", _field("is_declared"), form=lambda value: "yes" if value else "no"),
    "later_cpu_s": Figure("later turns, CPU s", _field("later_cpu_s"), "lower"),
    "later_cached": Figure("of it in the cache", _field("later_cached"), form="{:.0%}".format),
    "num_right": Figure("right answers", _field("num_right"), "higher", "{:.0f}".format),
}


def summarise(
    figures: Sequence[str], load: Raw, setups: Sequence[Setup], rounds: Mapping[str, Sequence[Raw]]
) -> dict[str, dict[str, Any]]:
    """Per setup its method, config, engine arguments, all raw rounds and figures; or why the engine refused it.

    Args:
        figures: names in `FIGURES`; one without a value in a round is left out for that setup.
        load: fields of the load.
        setups: what was measured; the one named plain, if there, is what ratios compare with.
        rounds: what the processes said, by setup, in the order of the rounds.
    """
    summary: dict[str, dict[str, Any]] = {}
    for setup in setups:
        fields = asdict(setup)
        entry = {name: fields[name] for name in ("method", "config", "engine")} | {"rounds": list(rounds[setup.name])}
        refusals = [raw["refused"] for raw in rounds[setup.name] if "refused" in raw]
        if refusals:
            entry["refused"] = refusals[0]
        else:
            entry["figures"] = {
                name: figure
                for name in figures
                if (figure := _summarise_figure(name, load, rounds[setup.name], rounds.get(PLAIN.name))) is not None
            }
        summary[setup.name] = entry
    return summary


def _summarise_figure(
    name: str, load: Raw, rounds: Sequence[Raw], plain: Sequence[Raw] | None
) -> dict[str, Any] | None:
    """Values per round, median and range; and how much better than plain in the same round, above 1 is better."""
    figure = FIGURES[name]
    values = [figure.of(raw, load) for raw in rounds]
    if None in values:
        return None
    summary: dict[str, Any] = statistics_of(values)
    if figure.better is not None and plain is not None:
        others = [figure.of(raw, load) for raw in plain]
        if None not in others and 0 not in others and 0 not in values:
            pairs = zip(others, values, strict=True)
            summary["ratio_to_plain"] = statistics_of([a / b if figure.better == "lower" else b / a for a, b in pairs])
    return summary


def statistics_of(values: Sequence[float]) -> dict[str, Any]:
    """The values, their median and their range."""
    return {"values": list(values), "median": median(values), "range": [min(values), max(values)]}
