"""The questions, and the loads and configurations that answer them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.child import run_in_child
from benchmarks.models import LlamaShape
from benchmarks.questions import CHECKPOINT
from benchmarks.speed.load import (
    ADAKV,
    BESIDE_CODES,
    CACHED,
    CACHED_SNAPKV,
    CUTS,
    EVEN_HEADS,
    FASTKV,
    FP8,
    NO_DRAFTS,
    OTHERS,
    PLAIN,
    PLAIN_REQUESTS,
    PYRAMIDKV,
    QUANTSPEC,
    RETAINING,
    SNAPKV,
    STORED_SMALLER,
    STREAMING,
    UNLOADED,
    Load,
    Setup,
)
from benchmarks.speed.serving import measure_server

SHAPE = LlamaShape(max_position_embeddings=65536)
METHODS = (PLAIN, SNAPKV, FASTKV)
# Of the load on a server: between what plain vLLM gives to two requests at a time and to twelve.
SERVED_WELL_MS = (10_000, 150)
QUICK_DTYPES = ("fp8", "int8_per_token_head")


@dataclass(frozen=True)
class Case:
    """One load for some configurations.

    Fields:
        label: names the load in tables.
        load: the same for all.
        setups: each in a process of its own per round.
        rounds: how often, where the command line does not say.
        in_turn: all setups in one engine instead, by their requests' own settings: for differences smaller than those
            between two processes that do the same.
    """

    label: str
    load: Load
    setups: Sequence[Setup]
    rounds: int = 2
    in_turn: bool = False


@dataclass(frozen=True)
class Scenario:
    """A question and its cases.

    Fields:
        title: the question.
        cases: by name, which begins with the scenario's; quick ones for True.
        figures: what is reported.
        columns: what the table shows: figures, and `FIGURE ratio` for how much better than plain.
        measure: does a case's load once, from checkpoint, setup and load.
        checkpoint: None for the random Llama of `SHAPE`.
        rows_of: scenarios whose cases answer this question, too, and stand in its table.
    """

    title: str
    cases: Callable[[bool], dict[str, Case]]
    figures: Sequence[str]
    columns: Sequence[str]
    measure: Callable[[Path, Setup, Load], dict[str, Any]]
    checkpoint: Path | None = None
    rows_of: Sequence[str] = ()


def measure_engine(model: Path, setup: Setup, load: Load) -> dict[str, Any]:
    """Fields of `engine.Outcome`, or `refused`, from a fresh process."""
    task = {"model": str(model), "setup": asdict(setup), "load": asdict(load)}
    return run_in_child("benchmarks.speed.engine", task, setup.environment)


def measure_in_turn(model: Path, case: Case, num_rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Fields of `engine.Outcome` of each setup and round, from one engine in a fresh process."""
    setups = [asdict(setup) for setup in case.setups]
    task = {"model": str(model), "setups": setups, "load": asdict(case.load), "rounds": num_rounds}
    return run_in_child("benchmarks.speed.engine", task)


def _ttft(quick: bool) -> dict[str, Case]:
    setups = (*METHODS, CUTS)
    if quick:
        return {f"ttft-{n}": Case(f"{n} / 512", Load(1, n, 8, 512), setups) for n in (1024, 2048)}
    # The longest takes minutes a process: one round less says enough.
    lengths = {2048: 3, 4096: 3, 8192: 3, 16384: 2, 32768: 1}
    return {f"ttft-{n}": Case(f"{n} / 2048", Load(1, n, 32), setups, rounds) for n, rounds in lengths.items()}


def _prefill(quick: bool) -> dict[str, Case]:
    prompt, steps = (1024, (512,)) if quick else (8192, (2048, 8192))
    setups = (PLAIN, UNLOADED, SNAPKV, FASTKV, RETAINING, FP8)
    return {f"prefill-{n}": Case(f"{prompt} / {n}", Load(1, prompt, 4, n), setups) for n in steps}


def _prefix(quick: bool) -> dict[str, Case]:
    load = Load(1, 1024, 4, 512, shared_tokens=896) if quick else Load(1, 4096, 8, shared_tokens=3584)
    label = f"{load.shared_tokens} of {load.prompt_tokens}"
    return {"prefix": Case(label, load, (PLAIN, CACHED, CACHED_SNAPKV, FASTKV))}


def _turns(quick: bool) -> dict[str, Case]:
    if quick:
        load, pools = Load(3, 512, 8, 512, turns=2, turn_tokens=64), (80, 40)
    else:
        load, pools = Load(6, 2048, 32, turns=3, turn_tokens=256), (600, 300, 150)
    setups = (PLAIN, CACHED, CACHED_SNAPKV)
    return {f"turns-{n}": Case(f"{n} blocks", replace(load, num_blocks=n), setups, rounds=1) for n in pools}


def _pool(quick: bool) -> dict[str, Case]:
    load = Load(4, 1024, 32, 512, num_blocks=80) if quick else Load(12, 2048, 384, num_blocks=250)
    return {"pool": Case(_shape_of(load), load, (*METHODS, FP8))}


def _decode(quick: bool) -> dict[str, Case]:
    load = Load(4, 1024, 16, 512) if quick else Load(4, 8192, 48)
    return {"decode": Case(_shape_of(load), load, (*METHODS, FP8))}


def _ragged(quick: bool) -> dict[str, Case]:
    load = Load(4, 1024, 16, 512) if quick else Load(4, 2048, 96)
    setups = (PLAIN_REQUESTS, SNAPKV, EVEN_HEADS, PYRAMIDKV, ADAKV)
    return {"ragged": Case(_shape_of(load), load, setups, 1 if quick else 7, in_turn=True)}


def _beside_codes(quick: bool) -> dict[str, Case]:
    load = Load(4, 512, 16, 512) if quick else Load(4, 1024, 96)
    return {"beside-codes": Case(_shape_of(load), load, BESIDE_CODES, 1 if quick else 7, in_turn=True)}


def _methods(quick: bool) -> dict[str, Case]:
    load = Load(1, 1024, 8, 512) if quick else Load(1, 4096, 32)
    return {"methods": Case(_shape_of(load), load, (*METHODS, CUTS, PYRAMIDKV, ADAKV, *OTHERS), 1 if quick else 2)}


def _codecs(quick: bool) -> dict[str, Case]:
    load = Load(1, 1024, 8, 512) if quick else Load(1, 4096, 32)
    return {"codecs": Case(_shape_of(load), load, (PLAIN, SNAPKV, *STORED_SMALLER), 1 if quick else 2)}


def _streaming(quick: bool) -> dict[str, Case]:
    loads = [Load(1, 1024, 8, 512)] if quick else [Load(1, 4096, 8), Load(1, 16384, 8)]
    return {
        f"streaming-{n.prompt_tokens}": Case(f"{n.prompt_tokens} / {n.step_tokens}", n, (PLAIN, STREAMING), 1)
        for n in loads
    }


def _drafts(quick: bool) -> dict[str, Case]:
    loads = [Load(1, 1024, 24, 512, task="niah")] if quick else [Load(n, 2048, 64, task="niah") for n in (1, 4)]
    setups = (PLAIN, NO_DRAFTS, QUANTSPEC)
    return {f"drafts-{n.num_requests}": Case(_shape_of(n), n, setups, 1 if quick else 2) for n in loads}


def _tpot(quick: bool) -> dict[str, Case]:
    loads = [Load(4, 512, 16, 512)] if quick else [Load(4, 2048, 48), Load(4, 4096, 48)]
    return {f"tpot-{n.num_requests}x{n.prompt_tokens}": Case(_shape_of(n), n, (*METHODS, FP8)) for n in loads}


def _load(quick: bool) -> dict[str, Case]:
    counts = (4,) if quick else (1, 2, 4, 8, 12)
    requests, prompt, output, blocks = (4, 1024, 32, 80) if quick else (12, 2048, 128, 250)
    return {
        f"load-{n}": Case(
            f"{n} at a time",
            Load(requests, prompt, output, num_blocks=blocks, concurrency=n, goodput_ms=SERVED_WELL_MS),
            (*METHODS, FP8),
            rounds=1,
        )
        for n in counts
    }


def _kv_dtypes(quick: bool) -> dict[str, Case]:
    from vllm.config.cache import CacheDType  # takes seconds

    names = QUICK_DTYPES if quick else [name for name in get_args(CacheDType) if name != "auto"]
    setups = [Setup(name, engine={"kv_cache_dtype": name}, entry_bytes=None) for name in names]
    load = Load(2 if quick else 16, 512, 8, task="niah")
    return {"kv-dtypes": Case(f"{load.num_requests} questions", load, (PLAIN, *setups), rounds=1)}


def _shape_of(load: Load) -> str:
    return f"{load.num_requests} x {load.prompt_tokens}"


_SHARES = ("choice_share", "score_share", "select_share", "compact_share")
_PREFILL = ("first_token_cpu_s", "first_token_wall_s", *_SHARES, "peak_blocks")
_PREFILL_COLUMNS = ("first_token_cpu_s", "first_token_cpu_s ratio", *_PREFILL[2:], "blocks_before", "blocks_after")
_LATENCIES = tuple(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl") for kind in ("mean", "median", "p99"))

SCENARIOS = {
    "ttft": Scenario(
        "Time to first token by prompt tokens / tokens a step",
        _ttft,
        (*_PREFILL, "blocks_before", "blocks_after", "step_ms"),
        _PREFILL_COLUMNS,
        measure_engine,
    ),
    "prefill": Scenario(
        "What being installed, on, and compressing costs by prompt tokens / tokens a step",
        _prefill,
        (*_PREFILL, "blocks_before", "blocks_after"),
        _PREFILL_COLUMNS,
        measure_engine,
    ),
    "prefix": Scenario(
        "Time to first token where leading tokens of the prompt were sent before",
        _prefix,
        ("first_token_cpu_s", "first_token_wall_s", "blocks_before", "blocks_after"),
        ("first_token_cpu_s", "first_token_cpu_s ratio", "blocks_before", "blocks_after"),
        measure_engine,
    ),
    "turns": Scenario(
        "Later turns of conversations by blocks of the pool",
        _turns,
        ("later_cpu_s", "later_cached", "num_preemptions"),
        ("later_cpu_s", "later_cpu_s ratio", "later_cached", "num_preemptions"),
        measure_engine,
    ),
    "pool": Scenario(
        "Throughput in a pool of fixed bytes that holds few whole prompts",
        _pool,
        ("tokens_per_s", "decode_tokens_per_s", "peak_running", "num_preemptions", "pool_mib"),
        (
            *("tokens_per_s", "tokens_per_s ratio", "decode_tokens_per_s", "decode_tokens_per_s ratio"),
            *("peak_running", "num_preemptions", "pool_mib"),
        ),
        measure_engine,
    ),
    "decode": Scenario(
        "A decode step of four long requests",
        _decode,
        ("step_ms", "peak_running"),
        ("step_ms", "step_ms ratio"),
        measure_engine,
    ),
    "methods": Scenario(
        "Each method: first token, blocks that stay, decode step",
        _methods,
        (*_PREFILL, "blocks_after", "step_ms"),
        ("first_token_cpu_s ratio", *_SHARES, "blocks_after", "step_ms ratio"),
        measure_engine,
    ),
    "codecs": Scenario(
        "Entries stored in fewer bytes: first token, blocks that stay, decode step",
        _codecs,
        (*_PREFILL, "blocks_after", "step_ms"),
        ("first_token_cpu_s ratio", "compact_share", "blocks_after", "step_ms ratio"),
        measure_engine,
    ),
    "streaming": Scenario(
        "Heads that let go while a prompt is read, by prompt tokens / tokens a step",
        _streaming,
        (*_PREFILL, "blocks_after"),
        ("first_token_cpu_s", "first_token_cpu_s ratio", "compact_share", "peak_blocks", "blocks_after"),
        measure_engine,
    ),
    "drafts": Scenario(
        "Tokens drafted by four bits of the cache and verified by eight, on the tiny model's questions",
        _drafts,
        ("decode_tokens_per_s", "accepted_share", "blocks_after", "num_right"),
        ("decode_tokens_per_s", "decode_tokens_per_s ratio", "accepted_share", "blocks_after", "num_right"),
        measure_engine,
        CHECKPOINT,
    ),
    "tpot": Scenario(
        "A decode step by requests x prompt tokens (one request: prompt tokens / tokens a step)",
        _tpot,
        ("step_ms", "peak_running"),
        ("step_ms", "step_ms ratio"),
        measure_engine,
        rows_of=("ttft", "decode"),
    ),
    "ragged": Scenario(
        "Budgets by layer and head: what it costs to read head by head, and to score and move",
        _ragged,
        ("step_ms", *_SHARES, "blocks_after"),
        ("step_ms", "step_ms ratio", *_SHARES, "blocks_after"),
        measure_engine,
    ),
    "beside-codes": Scenario(
        "Requests without a codec on an engine that has just served some with one",
        _beside_codes,
        ("step_ms", "blocks_after"),
        ("step_ms", "step_ms ratio", "blocks_after"),
        measure_engine,
    ),
    "load": Scenario(
        "A server under load, a pool of fixed bytes",
        _load,
        (
            *_LATENCIES,
            "request_throughput",
            "request_goodput",
            "token_throughput",
            "server_cpu_s",
            "worker_cpu_s",
            "num_preemptions",
        ),
        (
            *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms"),
            *(
                "request_goodput",
                "token_throughput",
                "token_throughput ratio",
                "server_cpu_s",
                "worker_cpu_s",
                "worker_cpu_s ratio",
            ),
        ),
        measure_server,
    ),
    "kv-dtypes": Scenario(
        "Types of vLLM's --kv-cache-dtype on this engine: does it start, does it save, are the answers right",
        _kv_dtypes,
        ("is_declared", "entry_bytes", "num_right"),
        ("is_declared", "entry_bytes", "num_right"),
        measure_engine,
        CHECKPOINT,
    ),
}


def scenario_of(case: str) -> str:
    """Name of the scenario a case belongs to."""
    return next(name for name in SCENARIOS if case == name or case.startswith(f"{name}-"))


def chosen_cases(names: Sequence[str], *, quick: bool) -> dict[str, Case]:
    """Cases by name, in the scenarios' order.

    Args:
        names: of scenarios and of cases; none: all.
        quick: small loads.

    Raises:
        ValueError: a name is neither a scenario's nor a case's.
    """
    found: dict[str, Case] = {}
    unknown = set(names)
    for scenario, parts in SCENARIOS.items():
        wanted = {name for name in names if name == scenario or name.startswith(f"{scenario}-")}
        if names and not wanted:
            continue
        cases = parts.cases(quick)
        found |= {case: cases[case] for case in cases if not names or scenario in wanted or case in wanted}
        unknown -= {scenario, *cases}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no scenario and no case; scenarios are {', '.join(SCENARIOS)}")
    return found
