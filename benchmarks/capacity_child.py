"""Many requests in one process: total time and time per decode step. Started by `benchmarks.capacity`.

python -m benchmarks.capacity_child RUN_JSON_FILE RESULT_JSON_FILE
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

BLOCK_SIZE = 32
STEP_TOKENS = 2048


@dataclass(frozen=True)
class Load:
    """What a child is to do.

    Fields:
        model: checkpoint directory.
        method: value of kv_compression; None: plain vLLM.
        config: value of kv_compression_config.
        num_requests: requests, all sent at once.
        prompt_tokens, output_tokens: tokens of each.
        num_blocks: blocks of the pool, null block included.
    """

    model: str
    method: str | None
    config: dict[str, Any]
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_blocks: int


@dataclass
class Outcome:
    """What came out.

    Fields:
        cpu_s, wall_s: from the first request's arrival to the last one's end, process CPU and wall seconds.
        decode_cpu_s: CPU seconds in steps without prompt tokens.
        decode_tokens: tokens made in those steps.
        full_step_ms: median CPU milliseconds of the steps that decode all requests at once; None: there was none.
        num_preemptions: requests sent back for lack of blocks.
        peak_running: most requests in one step.
    """

    cpu_s: float
    wall_s: float
    decode_cpu_s: float
    decode_tokens: int
    full_step_ms: float | None
    num_preemptions: int
    peak_running: int


def measure(load: Load) -> Outcome:
    """Send all requests to an engine in this process and follow its steps.

    Raises:
        RuntimeError: the engine compressed other prompts than the load says, or lost blocks.
    """
    from vllm import LLM

    flags: dict[str, Any] = {}
    if load.method is not None:
        flags = {"kv_compression": load.method, "kv_compression_config": load.config}
    llm = LLM(
        load.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        max_model_len=load.prompt_tokens + load.output_tokens,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=load.num_requests,
        num_gpu_blocks_override=load.num_blocks,
        **flags,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    rng = random.Random(0)
    _run(llm.llm_engine, scheduler, [_prompt(rng, load)], 8)  # warms up, not counted
    outcome = _run(
        llm.llm_engine, scheduler, [_prompt(rng, load) for _ in range(load.num_requests)], load.output_tokens
    )
    if load.method is not None and scheduler.totals.requests_compressed < load.num_requests + 1:
        raise RuntimeError(f"{load.method}: not all prompts were compressed: {scheduler.totals}")
    return outcome


def _prompt(rng: random.Random, load: Load) -> dict[str, list[int]]:
    return {"prompt_token_ids": [rng.randrange(3, 512) for _ in range(load.prompt_tokens)]}


def _run(engine: Any, scheduler: Any, prompts: list[dict[str, list[int]]], output_tokens: int) -> Outcome:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    decodes: list[tuple[int, float]] = []  # requests and CPU seconds of a step without prompt tokens
    num_preemptions, peak = 0, 0
    scheduled: list[Any] = []
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        scheduled.append(output.num_scheduled_tokens)
        return output

    def watched_preempt(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_preemptions
        num_preemptions += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
    cpu, wall = time.process_time(), time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling)
    while engine.has_unfinished_requests():
        before = time.process_time()
        engine.step()
        counts = scheduled.pop().values()
        peak = max(peak, len(counts))
        if counts and max(counts) == 1:
            decodes.append((len(counts), time.process_time() - before))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del scheduler.schedule, scheduler._preempt_request
    full = [seconds for count, seconds in decodes if count == len(prompts)]
    return Outcome(
        cpu_s=cpu,
        wall_s=wall,
        decode_cpu_s=sum(seconds for _, seconds in decodes),
        decode_tokens=sum(count for count, _ in decodes),
        full_step_ms=median(full) * 1e3 if full else None,
        num_preemptions=num_preemptions,
        peak_running=peak,
    )


def main() -> None:
    """Command line."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    target.write_text(json.dumps(asdict(measure(Load(**json.loads(source.read_text()))))))


if __name__ == "__main__":
    main()
