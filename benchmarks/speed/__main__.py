"""What compression costs and saves in time and memory, against plain vLLM and vLLM's own quantised caches.

python -m benchmarks.speed [--scenario NAME ...] [--quick] [--rounds N] [--json FILE]

A random 16-layer Llama, greedy, one thread. Each configuration runs in a process of its own per round, in turn, each
round beginning with another, so that a drift of the machine meets all alike; a ratio compares runs of one round. CPU
seconds (all threads, user and system) are the figures to trust on a shared machine. Each process does one request that
is not timed first. Nothing is measured unless the exactness tests of the methods pass, and nothing is reported of an
engine whose counters say that it did something else than its configuration says.

| scenario | question |
|---|---|
| ttft | time to first token and blocks held, by prompt tokens; eager, in process |
| prefill | what the plugin costs when it is installed, on with nothing to drop, on; eager, in process |
| prefix | time to first token of a prompt whose leading tokens are in vLLM's prefix cache; eager, in process |
| pool | throughput of 12 requests in a pool of fixed bytes; eager, in process |
| decode | a decode step of 4 x 8192 tokens; eager, in process |
| tpot | a decode step by requests and prompt tokens: batches of 4; those of 1 are ttft's; eager, in process |
| methods | first token, blocks and decode step of each method; eager, in process |
| codecs | the same of what stores entries in fewer bytes; eager, in process |
| drafts | decode with and without drafts, and how many are accepted, on the tiny model's questions; eager, in process |
| streaming | first token and most blocks held where heads let go while a prompt is read; eager, in process |
| ragged | a decode step of 4 x 2048 tokens with budgets by layer and head; eager, all in one engine |
| beside-codes | a decode step of requests without a codec after some with one; eager, all in one engine |
| load | `vllm serve` under `vllm bench serve`, by requests under way, in a pool of fixed bytes; eager |
| kv-dtypes | what the engine makes of vLLM's --kv-cache-dtype, with the tiny model's questions |

| configuration | what runs |
|---|---|
| plain | vLLM, this plugin installed, no flag |
| unloaded | vLLM, VLLM_PLUGINS="": the plugin is not even imported |
| snapkv | retention 0.1 |
| fastkv | retention 0.1, TSP after layer 7 of 0..15, 0.2 of the rows go on |
| retention 1.0 | snapkv with retention 1.0: compression on, nothing to drop |
| plain / snapkv, prefix caching | with --enable-prefix-caching |
| pyramidkv, adakv | retention 0.1, budgets by layer, by head |
| streamingllm and later | retention 0.1 or the method's own default |
| snapkv, head by head | snapkv's even budget read as adakv's is: what that path itself costs |
| quantspec | eight bits of which four draft five tokens at a time; its own defaults |
| fp8 | vLLM's own --kv-cache-dtype fp8, twice the blocks where the pool is fixed |

A case (`ttft-8192`) may be named instead of its scenario. With --json the file is written after each case, and cases
it already has stay: a session can be taken up again with what is missing. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_command, describe_environment
from benchmarks.models import make_random_llama
from benchmarks.speed.exactness import ExactnessFailed, check_exactness
from benchmarks.speed.load import BLOCK_SIZE
from benchmarks.speed.report import merge, read_report, tables, write_report
from benchmarks.speed.scenarios import SCENARIOS, SHAPE, Case, chosen_cases, measure_in_turn, scenario_of
from benchmarks.speed.summary import Raw, summarise
from benchmarks.tiny_model.language import build_tokenizer


def measure_rounds(name: str, case: Case, model: Path, num_rounds: int) -> dict[str, list[Raw]]:
    """What the processes said, by setup and round; progress goes to stderr.

    Each round starts with another setup, so that none always follows the same neighbour or comes first.
    """
    if case.in_turn:
        return measure_in_turn(model, case, num_rounds)
    measure = SCENARIOS[scenario_of(name)].measure
    said: dict[str, list[Raw]] = {setup.name: [] for setup in case.setups}
    for i in range(num_rounds):
        start = i % len(case.setups)
        for setup in (*case.setups[start:], *case.setups[:start]):
            said[setup.name].append(measure(model, setup, case.load))
            print(f"{name}, round {i + 1}, {setup.name}: {said[setup.name][-1]}", file=sys.stderr, flush=True)
    return said


def measure_case(name: str, case: Case, random_llama: Path, num_rounds: int) -> dict[str, Any]:
    """The report's entry of one case."""
    scenario, environment = SCENARIOS[scenario_of(name)], describe_environment()
    said = measure_rounds(name, case, scenario.checkpoint or random_llama, num_rounds)
    load = asdict(case.load)
    return {
        "label": case.label,
        "load": load,
        "rounds": num_rounds,
        "environment": environment,
        "setups": summarise(scenario.figures, load, case.setups, said),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=[], metavar="NAME", help="scenarios or cases (all)")
    parser.add_argument("--quick", action="store_true", help="small loads, one round: does it run at all")
    parser.add_argument("--rounds", type=int, help="runs of each configuration (1 to 7 by case)")
    parser.add_argument("--json", type=Path, help="file to write after each case and to add to")
    args = parser.parse_args()
    cases = chosen_cases(args.scenario, quick=args.quick)
    earlier = read_report(args.json) if args.json else None
    report: dict[str, Any] = {
        "benchmark": "speed",
        "command": describe_command(),
        "quick": args.quick,
        "environment": describe_environment(),
        "model": asdict(SHAPE),
        "block_size": BLOCK_SIZE,
        "scenarios": {},
    }
    report = merge(earlier, report)
    methods = sorted({setup.method for case in cases.values() for setup in case.setups if setup.compresses})
    try:
        report["exactness"] = check_exactness(methods, quick=args.quick)
    except ExactnessFailed as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory), SHAPE)
        build_tokenizer().save_pretrained(model)
        for name, case in cases.items():
            num_rounds = 1 if args.quick else args.rounds or case.rounds
            entry = measure_case(name, case, model, num_rounds)
            report["scenarios"][name] = entry | {name: report[name] for name in ("command", "exactness")}
            if args.json is not None:
                write_report(args.json, report)
    for title, markdown in tables(report):
        print(f"\n{title}\n\n{markdown}")
    print(f"\n{json.dumps(report)}")


if __name__ == "__main__":
    main()
