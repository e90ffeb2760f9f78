"""One load on one engine in this process. Started by `benchmarks.speed` through `benchmarks.child`."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm import LLM

from benchmarks.child import answer
from benchmarks.speed.follow import Followed, follow
from benchmarks.speed.load import BLOCK_SIZE, RANDOM_IDS, WARM_UP_TOKENS, Counters, Load, Setup, require_done
from benchmarks.tiny_model.language import END, Example, make_example, to_text

WARM_UP_OUTPUT = 8
CPU_SLACK_S = 0.1  # threads beside the engine's; matters to runs of a second


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Fields:
        cpu_s, wall_s: from the first request's arrival to the last one's end; CPU: user and system, all threads.
        first_token_cpu_s, first_token_wall_s: from the first request's arrival to the first token.
        decode_cpu_s: CPU seconds in steps without prompt tokens.
        decode_tokens: tokens made in those steps.
        drafted, accepted: tokens drafted, and those of them accepted, in those steps.
        step_ms: median CPU milliseconds of the steps that decode all requests at once; None: there was none.
        score_s, select_s, compact_s: wall seconds the worker spent scoring, selecting and moving entries.
        peak_blocks: most blocks held at a time until the first token, looked at after each allocation.
        blocks_before, blocks_after: blocks held before and after the engine step that makes the first token.
        peak_running: most requests in one step.
        num_preemptions: requests sent back for lack of blocks.
        entry_bytes: bytes of one number in the cache.
        pool_bytes: bytes of the cache.
        is_declared: whether the attention backend lists the cache's type among those it supports.
        num_right: right answers to questions; None: random tokens were sent.
        later_cpu_s: CPU seconds of all turns after the first.
        later_cached: share of their prompts found in the prefix cache; None: there were none.
    """

    cpu_s: float
    wall_s: float
    first_token_cpu_s: float
    first_token_wall_s: float
    decode_cpu_s: float
    decode_tokens: int
    drafted: int
    accepted: int
    step_ms: float | None
    score_s: float
    select_s: float
    compact_s: float
    peak_blocks: int
    blocks_before: int
    blocks_after: int
    peak_running: int
    num_preemptions: int
    entry_bytes: int
    pool_bytes: int
    is_declared: bool
    num_right: int | None
    later_cpu_s: float
    later_cached: float | None


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, warm it up, give it its load and ask it whether it did what its setup says.

    Args:
        task: `model` (checkpoint directory), and the fields of `setup` and `load`.

    Returns:
        Fields of `Outcome`; for a rival the engine does not serve, the sentence it says, as `refused`.

    Raises:
        RuntimeError: the engine did something else.
    """
    setup, load = Setup(**task["setup"]), Load(**task["load"])
    rng = random.Random(0)
    shared = random_prompt(rng, load.shared_tokens)
    own_tokens = load.prompt_tokens - load.shared_tokens
    more_tokens = (load.turns - 1) * load.turn_tokens
    try:
        llm = start_engine(task["model"], setup, load, enforce_eager=True, block_size=BLOCK_SIZE)
        warm_up = follow(llm, [shared + random_prompt(rng, min(own_tokens, WARM_UP_TOKENS))], WARM_UP_OUTPUT)
    except Exception as error:  # what an engine cannot serve may fail anywhere on the way
        if setup.is_rival:
            return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise
    examples = _questions(load)
    prompts = [e.prompt_ids for e in examples] or [
        shared + random_prompt(rng, own_tokens + more_tokens) for _ in range(load.num_requests)
    ]
    before = _worker_s(llm, setup)
    turns = [
        follow(llm, [prompt[: len(prompt) - left * load.turn_tokens] for prompt in prompts], load.output_tokens)
        for left in reversed(range(load.turns))
    ]
    after = _worker_s(llm, setup)
    num_preemptions = sum(followed.num_preemptions for followed in (warm_up, *turns))
    require_done(setup, counters_of(llm), num_prompts=len(prompts) * load.turns + 1, num_preemptions=num_preemptions)
    worker_s = [end - start for start, end in zip(before, after, strict=True)]
    outcome = _outcome(llm, turns, load, examples, worker_s)
    _require_rules(setup, outcome, turns)
    return asdict(outcome)


def measure_in_turn(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Give one engine a load as often as there are setups and rounds, each time with the requests' own settings.

    Args:
        task: `model` (checkpoint directory), fields of the `setups` and of the `load`, number of `rounds`. The engine
            is started with the first setup that compresses; its cache serves them all.

    Returns:
        By setup the fields of `Outcome` of each round.

    Raises:
        RuntimeError: the engine did something else.
    """
    setups, load = [Setup(**fields) for fields in task["setups"]], Load(**task["load"])
    rng = random.Random(0)
    llm = start_engine(
        task["model"], next(s for s in setups if s.compresses), load, enforce_eager=True, block_size=BLOCK_SIZE
    )
    prompts = [random_prompt(rng, load.prompt_tokens) for _ in range(load.num_requests)]
    outcomes: dict[str, list[dict[str, Any]]] = {setup.name: [] for setup in setups}
    for i in range(-1, task["rounds"]):  # one that is not counted: it warms up what each of them calls
        for setup in _begin_with(setups, i):
            outcome = _measure_requests(llm, setup, load, prompts)
            if i >= 0:
                outcomes[setup.name].append(asdict(outcome))
    return outcomes


def _begin_with(setups: Sequence[Setup], number: int) -> list[Setup]:
    """All of them, another one first each time."""
    start = number % len(setups)
    return [*setups[start:], *setups[:start]]


def _measure_requests(llm: LLM, setup: Setup, load: Load, prompts: list[list[int]]) -> Outcome:
    """A load with a setup's settings in its requests, on an engine that compresses."""
    earlier, before = counters_of(llm), _worker_s(llm, setup)
    followed = follow(llm, prompts, load.output_tokens, {"kv_compression": setup.method, **setup.config})
    after, now = _worker_s(llm, setup), counters_of(llm)
    assert now is not None and earlier is not None, "it compresses"
    require_done(setup, now.since(earlier), num_prompts=len(prompts), num_preemptions=followed.num_preemptions)
    outcome = _outcome(llm, [followed], load, [], [end - start for start, end in zip(before, after, strict=True)])
    _require_rules(setup, outcome, [followed])
    return outcome


def start_engine(model: str, setup: Setup, load: Load, **more: Any) -> LLM:
    """An engine for a load by its setup, with more engine arguments."""
    flags = {"enable_prefix_caching": False} | setup.engine
    if setup.method is not None:
        flags |= {"kv_compression": setup.method, "kv_compression_config": setup.config}
    return LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=load.most_tokens,
        max_num_batched_tokens=load.step_tokens,
        max_num_seqs=load.num_requests,
        num_gpu_blocks_override=load.blocks_of(setup),
        **flags,
        **more,
    )


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids of a prompt."""
    return [rng.randrange(*RANDOM_IDS) for _ in range(num_tokens)]


def _questions(load: Load) -> list[Example]:
    if load.task is None:
        return []
    return [make_example(load.task, load.prompt_tokens, seed) for seed in range(load.num_requests)]


def _scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def counters_of(llm: LLM) -> Counters | None:
    """The compressing scheduler's totals; None: it is vLLM's own."""
    totals = vars(_scheduler(llm)).get("totals")
    if totals is None:
        return None
    left_alone = sum(totals.left_alone.values())
    return Counters(totals.requests_compressed, left_alone, totals.worker.tsp_rows_in, totals.worker.tsp_rows_out)


def _worker_s(llm: LLM, setup: Setup) -> tuple[float, float, float]:
    """Seconds of scoring, selecting and moving entries, since the start."""
    if setup.method is None:
        return 0.0, 0.0, 0.0
    worker = _scheduler(llm).totals.worker
    return worker.score_us / 1e6, worker.select_us / 1e6, worker.compact_us / 1e6


def _outcome(
    llm: LLM, turns: Sequence[Followed], load: Load, examples: list[Example], worker_s: Sequence[float]
) -> Outcome:
    followed, later = turns[0], turns[1:]
    later_tokens = sum(load.prompt_tokens + (i + 1) * load.turn_tokens for i in range(len(later))) * load.num_requests
    assert followed.first_token is not None, "a run makes at least one token"
    cpu_s, wall_s, blocks_before, blocks_after = followed.first_token
    score_s, select_s, compact_s = worker_s
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    backend = runner.attn_groups[0][0].backend
    return Outcome(
        cpu_s=followed.cpu_s,
        wall_s=followed.wall_s,
        first_token_cpu_s=cpu_s,
        first_token_wall_s=wall_s,
        decode_cpu_s=sum(seconds for _, seconds in followed.decodes),
        decode_tokens=sum(count for count, _ in followed.decodes) + followed.accepted,
        drafted=followed.drafted,
        accepted=followed.accepted,
        step_ms=followed.step_ms,
        score_s=score_s,
        select_s=select_s,
        compact_s=compact_s,
        peak_blocks=followed.peak_blocks,
        blocks_before=blocks_before,
        blocks_after=blocks_after,
        peak_running=followed.peak_running,
        num_preemptions=sum(turn.num_preemptions for turn in turns),
        entry_bytes=runner.kv_caches[0].element_size(),
        pool_bytes=sum(cache.nbytes for cache in runner.kv_caches),
        is_declared=backend.supports_kv_cache_dtype(core.vllm_config.cache_config.cache_dtype),
        num_right=_num_right(followed, examples) if examples else None,
        later_cpu_s=sum(turn.cpu_s for turn in later),
        later_cached=sum(turn.cached_tokens for turn in later) / later_tokens if later else None,
    )


def _num_right(followed: Followed, examples: list[Example]) -> int:
    """Exact matches: the right words and then the end mark."""
    answers = [followed.answers[str(i)] for i in range(len(examples))]
    texts = [to_text(ids[: ids.index(END)]) if END in ids else None for ids in answers]
    return sum(text == example.answer for text, example in zip(texts, examples, strict=True))


def _require_rules(setup: Setup, outcome: Outcome, turns: Sequence[Followed]) -> None:
    blocks_left = sum(turn.blocks_left for turn in turns)
    if blocks_left:
        raise RuntimeError(f"{setup.name}: {blocks_left} blocks did not come back")
    if setup.entry_bytes not in (None, outcome.entry_bytes):
        raise RuntimeError(f"{setup.name}: a number takes {outcome.entry_bytes} bytes, not {setup.entry_bytes}")
    if outcome.cpu_s > 1.05 * outcome.wall_s + CPU_SLACK_S:
        raise RuntimeError(f"{setup.name} used more than one core: {outcome}")


if __name__ == "__main__":
    answer(lambda task: measure_in_turn(task) if "setups" in task else measure(task))
