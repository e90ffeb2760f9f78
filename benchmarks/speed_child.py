"""One configuration in one process: time to first token and blocks held. Started by `benchmarks.speed`.

python -m benchmarks.speed_child RUN_JSON_FILE RESULT_JSON_FILE
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Run:
    """What a child is to do.

    Fields:
        model: checkpoint directory.
        method: value of kv_compression; None: plain vLLM.
        config: value of kv_compression_config.
        compresses: whether prompts must come out compressed; with a method and False they must be left alone.
        prompt_tokens: tokens of each prompt.
        step_tokens: max_num_batched_tokens.
        repeats: timed prompts, after one that is not timed: it warms up and its blocks are counted.
    """

    model: str
    method: str | None
    config: dict[str, Any]
    compresses: bool
    prompt_tokens: int
    step_tokens: int
    repeats: int


@dataclass
class Result:
    """What came out.

    Fields:
        cpu_s, wall_s: per timed prompt, process CPU seconds (all threads, user and system) and wall seconds of
            `generate` with one token to make.
        score_s, compact_s: seconds per timed prompt the worker spent scoring and moving entries; 0 for plain.
        blocks_before: blocks held before the engine step that ends the prompt.
        blocks_after: blocks held when that same step has returned the first token.
        blocks_end: blocks held after the request's end; must be 0.
    """

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    score_s: float = 0.0
    compact_s: float = 0.0
    blocks_before: int = 0
    blocks_after: int = 0
    blocks_end: int = 0


def measure(run: Run) -> Result:
    """Start an engine in this process, follow one prompt through its steps, then time others.

    Raises:
        RuntimeError: the engine did not do what the run says: a figure of it would be a lie.
    """
    from vllm import LLM, SamplingParams

    flags: dict[str, Any] = {}
    if run.method is not None:
        flags = {"kv_compression": run.method, "kv_compression_config": run.config}
    llm = LLM(
        run.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        max_model_len=run.prompt_tokens + 64,
        max_num_batched_tokens=run.step_tokens,
        max_num_seqs=4,
        **flags,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    rng = random.Random(0)
    result = Result()
    _follow_blocks(llm.llm_engine, scheduler, _prompt(rng, run.prompt_tokens), result)
    before = _worker_us(run, scheduler)
    first_token = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    for _ in range(run.repeats):
        prompt = _prompt(rng, run.prompt_tokens)
        cpu, wall = time.process_time(), time.perf_counter()
        llm.generate(prompt, first_token, use_tqdm=False)
        result.cpu_s.append(time.process_time() - cpu)
        result.wall_s.append(time.perf_counter() - wall)
    after = _worker_us(run, scheduler)
    result.score_s, result.compact_s = ((b - a) / 1e6 / run.repeats for a, b in zip(before, after, strict=True))
    _require_done(run, scheduler, run.repeats + 1)
    return result


def _worker_us(run: Run, scheduler: Any) -> tuple[int, int]:
    """Microseconds of scoring and of moving entries since start-up."""
    if run.method is None:
        return 0, 0
    return scheduler.totals.worker.score_us, scheduler.totals.worker.compact_us


def _prompt(rng: random.Random, num_tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [rng.randrange(3, 512) for _ in range(num_tokens)]}


def _follow_blocks(engine: Any, scheduler: Any, prompt: dict[str, list[int]], result: Result) -> None:
    """Blocks held around the step that ends a prompt, read from vLLM's pool."""
    from vllm import SamplingParams

    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    engine.add_request("follow", prompt, SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
    held, made = 0, False
    while engine.has_unfinished_requests():
        result.blocks_before = result.blocks_before if made else held
        outputs = engine.step()
        held = free - pool.get_num_free_blocks()
        if outputs and not made:
            made, result.blocks_after = True, held
    result.blocks_end = free - pool.get_num_free_blocks()


def _require_done(run: Run, scheduler: Any, num_prompts: int) -> None:
    """Refuse figures of an engine that compressed when it should not have, or the other way round."""
    totals = vars(scheduler).get("totals")
    if run.method is None:
        if totals is not None:
            raise RuntimeError("a plain engine runs a compressing scheduler")
        return
    if totals is None:
        raise RuntimeError(f"{run.method}: not a compressing scheduler: {type(scheduler).__name__}")
    expected = num_prompts if run.compresses else 0
    if totals.requests_compressed != expected or sum(totals.left_alone.values()) != num_prompts - expected:
        raise RuntimeError(f"{run.method} {run.config}: {num_prompts} prompts sent, {expected} to compress; {totals}")


def main() -> None:
    """Command line."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    result = measure(Run(**json.loads(source.read_text())))
    target.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
