"""Do we keep what kvpress keeps? The same checkpoint, prompts and counts in both, entry by entry.

python -m benchmarks.oracle.compare [--methods snapkv,tova,...] [--ratios 0.1,0.2,0.5] [--prompts 8] [--length 1024]
                                    [--json FILE]
python -m benchmarks.oracle.compare --speed [--length 4096] [--json FILE]

Needs the environment that `scripts/judge_env.sh kvpress` makes. Printed: per method and ratio the overlap of the two
kept sets, |ours & theirs| / max(|ours|, |theirs|), over all (prompt, layer, KV head), with each difference of
definition taken out, and at the middle ratio once more with the window and kernel that kvpress ships; then the
differences, and the overlap with one of them left in. float32 and greedy on both sides. FastKV is not in kvpress: its
layers up to the TSP layer are compared with SnapKV's. Uneven budgets (pyramidkv, adakv) follow other arithmetic there:
kvpress gets our count of each layer and head and chooses by its own scores. DuoAttention is compared where half of the
heads stream, by the same gates, whatever the ratios.

Ends with exit status 1 where a difference taken out does not explain what is left: sets that differ by more than a
tie, or other answers. --speed is described in `benchmarks.oracle.rival`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import run_in_child
from benchmarks.environment import describe_command, describe_environment
from benchmarks.judges import ROOT, JudgeMissing, judge_python
from benchmarks.oracle import rival
from benchmarks.oracle.differences import (
    DIFFERENCES,
    DUO,
    KVPRESS_VOTING,
    POOLING,
    Pair,
    aligned,
    aligned_duo,
    compression_ratio,
)
from benchmarks.oracle.judge import run_kvpress
from benchmarks.oracle.overlap import Agreement, Kept, add_prompt
from benchmarks.questions import CHECKPOINT, MAX_ANSWER_TOKENS, TSP_LAYER
from benchmarks.table import format_table
from benchmarks.tiny_model.language import END, TASKS, make_example

METHODS = ("snapkv", "streamingllm", "fastkv", "pyramidkv", "adakv", "tova")  # compared at any ratio

Answers = list[dict[str, Any]]  # per prompt `kept`, `tokens` and, from the judge, `scores`


@dataclass(frozen=True)
class Outcome:
    """What a pair came to; `num_same` of `num_prompts` answers agree, None where answers cannot."""

    agreement: Agreement
    num_prompts: int
    num_same: int | None

    @property
    def num_unexplained(self) -> int:
        """Sets that differ by more than a tie, and answers that differ."""
        sets = len(self.agreement.disagreements) - self.agreement.num_ties
        return sets + (0 if self.num_same is None else self.num_prompts - self.num_same)


def make_prompts(num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts of the tiny model's language, its tasks in turn."""
    tasks = list(TASKS)
    return [make_example(tasks[i % len(tasks)], num_tokens, i).prompt_ids for i in range(num_prompts)]


def compare(pairs: Sequence[Pair], num_prompts: int) -> tuple[list[Outcome], dict[str, str]]:
    """Outcomes in order, and the judge's versions; what several pairs share runs once.

    Raises:
        RuntimeError: a side failed, or kept another number of entries than it was told to.
    """
    ours: dict[str, Answers] = {}
    for pair in pairs:
        task = _our_task(pair, num_prompts)
        if _key(task) not in ours:
            print(f"ours: {pair.method} {pair.config}, {pair.num_tokens} tokens", file=sys.stderr, flush=True)
            ours[_key(task)] = run_in_child("benchmarks.oracle.engine_child", task)
    answers = [ours[_key(_our_task(pair, num_prompts))] for pair in pairs]
    jobs = [_their_job(pair, mine, num_prompts) for pair, mine in zip(pairs, answers, strict=True)]
    different = {_key(job): job for job in jobs}
    print(f"kvpress: {len(different)} settings", file=sys.stderr, flush=True)
    answer = run_kvpress({"model": str(CHECKPOINT), "jobs": list(different.values())})
    theirs = dict(zip(different, answer["jobs"], strict=True))
    outcomes = [judge(pair, mine, theirs[_key(job)]) for pair, mine, job in zip(pairs, answers, jobs, strict=True)]
    return outcomes, answer["versions"]


def judge(pair: Pair, ours: Answers, theirs: Answers) -> Outcome:
    """Compare the two sides' answers to the same prompts.

    Raises:
        RuntimeError: a side kept another number of entries than it was told to.
    """
    agreement = Agreement()
    for prompt, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        _require_count(pair, "we", mine["kept"], pair.kept_by_us)
        _require_count(pair, "kvpress", other["kept"], pair.kept_by_them)
        add_prompt(agreement, prompt, mine["kept"], other["kept"], other["scores"], pair.layers)
    same = [mine["tokens"] == other["tokens"] for mine, other in zip(ours, theirs, strict=True)]
    return Outcome(agreement, len(same), sum(same) if pair.compares_answers else None)


def _require_count(pair: Pair, side: str, kept: Kept, count: int) -> None:
    """Each layer and head keeps the count; uneven ones in the mean, which each layer's rounding may move by a half."""
    counts = [len(head) for layer in pair.layers for head in kept[layer]]
    if pair.plan.is_ragged:
        if abs(sum(counts) / len(counts) - count) > 0.5:
            raise RuntimeError(f"{pair}: {side} should keep {count} entries in the mean and kept {counts}")
    elif set(counts) != {count}:
        raise RuntimeError(f"{pair}: {side} should keep {count} entries and kept {sorted(set(counts))}")


def _our_task(pair: Pair, num_prompts: int) -> dict[str, Any]:
    return {"model": str(CHECKPOINT), "method": pair.method, "config": pair.config, **_questions(pair, num_prompts)}


def _their_job(pair: Pair, ours: Answers, num_prompts: int) -> dict[str, Any]:
    if pair.method == DUO:
        settings = pair.settings | {"gates": pair.config["head_weights"]}
    else:
        settings = pair.settings | {"compression_ratio": compression_ratio(pair.num_tokens, pair.kept_by_them)}
    counts = None
    if pair.plan.is_ragged and pair.num_kept is None:
        counts = [[[len(head) for head in layer] for layer in answer["kept"]] for answer in ours]
    return {"press": pair.press, "settings": settings, "counts": counts, **_questions(pair, num_prompts)}


def _questions(pair: Pair, num_prompts: int) -> dict[str, Any]:
    prompts = make_prompts(num_prompts, pair.num_tokens)
    return {"prompts": prompts, "max_tokens": MAX_ANSWER_TOKENS, "stop_token": END}


def _key(task: dict[str, Any]) -> str:
    return json.dumps(task, sort_keys=True)


def print_outcomes(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> None:
    """One row per method and ratio, and each disagreement down to its entries."""
    header = [
        "method",
        "ratio",
        "window, kernel",
        "kept",
        "sets",
        "mean overlap",
        "minimum",
        "identical",
        "ties",
        "same answers",
    ]
    rows = []
    for pair, outcome in zip(pairs, outcomes, strict=True):
        agreement = outcome.agreement
        rows.append(
            [
                _name(pair),
                f"{pair.config['retention_ratio']:.3g}",
                ", ".join(str(pair.settings[name]) for name in KVPRESS_VOTING if name in pair.settings) or "-",
                f"{pair.kept_by_us} of {pair.num_tokens}",
                str(len(agreement.overlaps)),
                f"{agreement.mean:.4f}",
                f"{agreement.minimum:.4f}",
                f"{agreement.share_identical:.1%}",
                str(agreement.num_ties),
                "-" if outcome.num_same is None else f"{outcome.num_same} of {outcome.num_prompts}",
            ]
        )
    print(format_table(header, rows))
    for pair, outcome in zip(pairs, outcomes, strict=True):
        for disagreement in outcome.agreement.disagreements:
            print(f"{_name(pair)} {pair.config['retention_ratio']:.3g}: {disagreement}")


def print_differences(method: str, left_in: dict[str, Outcome]) -> None:
    """The differences of one method; `left_in` has the outcome of each that was put back, by what it is."""
    header = ["", "ours", "kvpress", "taken out by", "overlap if left in", "same answers"]
    rows = []
    for difference in DIFFERENCES:
        if method in difference.methods:
            cells = ["-", "-"]
            if difference.what in left_in:
                outcome = left_in[difference.what]
                cells = [f"{outcome.agreement.mean:.3f}, least {outcome.agreement.minimum:.3f}", "-"]
                if outcome.num_same is not None:
                    cells[1] = f"{outcome.num_same} of {outcome.num_prompts}"
            rows.append([difference.what, difference.ours, difference.theirs, difference.taken_out, *cells])
    print(f"\nDifferences of definition: {method}\n\n{format_table(header, rows)}")


def _name(pair: Pair) -> str:
    return f"fastkv (layers <= {TSP_LAYER})" if pair.method == "fastkv" else pair.method


def _as_json(pair: Pair, outcome: Outcome) -> dict[str, Any]:
    agreement = outcome.agreement
    return {
        "method": pair.method,
        "config": pair.config,
        "press": pair.press,
        "settings": pair.settings,
        "num_tokens": pair.num_tokens,
        "kept_by_us": pair.kept_by_us,
        "kept_by_them": pair.kept_by_them,
        "compression_ratio": compression_ratio(pair.num_tokens, pair.kept_by_them),
        "layers": list(pair.layers),
        "num_sets": len(agreement.overlaps),
        "mean_overlap": agreement.mean,
        "minimum_overlap": agreement.minimum,
        "share_identical": agreement.share_identical,
        "num_ties": agreement.num_ties,
        "num_prompts": outcome.num_prompts,
        "num_same_answers": outcome.num_same,
    }


def compare_all(methods: Sequence[str], ratios: Sequence[float], num_prompts: int, num_tokens: int) -> dict[str, Any]:
    """Run and print everything; returns the report."""
    middle = sorted(ratios)[len(ratios) // 2]
    with_ratios = [method for method in methods if method != DUO]
    pairs = [aligned(method, ratio, num_tokens) for method in with_ratios for ratio in ratios]
    pairs += [aligned(method, middle, num_tokens, **KVPRESS_VOTING) for method in methods if method in POOLING]
    pairs += [aligned_duo(num_tokens)] if DUO in methods else []
    put_back = [
        (method, difference.what, difference.left_in(aligned(method, middle, num_tokens)))
        for method in with_ratios
        for difference in DIFFERENCES
        if method in difference.methods and difference.left_in is not None
    ]
    outcomes, versions = compare([*pairs, *(pair for _, _, pair in put_back)], num_prompts)
    print_outcomes(pairs, outcomes[: len(pairs)])
    others = list(zip(put_back, outcomes[len(pairs) :], strict=True))
    for method in methods:
        print_differences(method, {what: outcome for (name, what, _), outcome in others if name == method})
    return {
        "benchmark": "oracle",
        "environment": describe_environment(),
        "judge": versions,
        "model": CHECKPOINT.relative_to(ROOT).as_posix(),
        "num_unexplained": sum(outcome.num_unexplained for outcome in outcomes[: len(pairs)]),
        "aligned": [
            _as_json(pair, outcome) | {"disagreements": [asdict(d) for d in outcome.agreement.disagreements]}
            for pair, outcome in zip(pairs, outcomes, strict=False)
        ],
        "left_in": [{"what": what} | _as_json(pair, outcome) for (_, what, pair), outcome in others],
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join((*METHODS, DUO)), help="comma-separated")
    parser.add_argument("--ratios", default="0.1,0.2,0.5", help="retention ratios, comma-separated")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per ratio")
    parser.add_argument("--length", type=int, help="prompt tokens; default 1024, with --speed 4096")
    parser.add_argument("--speed", action="store_true", help="time and memory instead of entries")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if unknown := [method for method in methods if method not in (*METHODS, DUO)]:
        parser.error(f"unknown: {', '.join(unknown)}")
    try:
        judge_python("kvpress")
    except JudgeMissing as missing:
        parser.error(str(missing))
    if args.speed:
        report = rival.compare_speed(args.length or 4096)
    else:
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
        report = compare_all(methods, ratios, args.prompts, args.length or 1024)
    report["command"] = describe_command()
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if report.get("num_unexplained"):
        print(f"UNEXPLAINED: {report['num_unexplained']} sets or answers differ by more than a tie", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
