"""One load on one engine on a GPU, in this process. Started by `benchmarks.gpu` through `benchmarks.child`.

Weights are random and made where they are needed (`load_format="dummy"`): they change no figure.
"""

import random
from typing import Any

from benchmarks.child import answer
from benchmarks.speed.engine import WARM_UP_OUTPUT, counters_of, random_prompt, start_engine
from benchmarks.speed.follow import follow
from benchmarks.speed.load import WARM_UP_TOKENS, Counters, Load, Setup, require_done


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, warm it up, give it its load and ask it whether it did what its setup says.

    Args:
        task: `model` (directory with a config.json), and the fields of `setup` and `load`.

    Returns:
        first_token_wall_s, wall_s: seconds from the first request's arrival; blocks_before, blocks_after: blocks held
        before and after the step that makes the first token; peak_running, num_preemptions, pool_bytes; backend: vLLM's
        name of its attention. For a rival that is not served, the sentence it says, as `refused`.

    Raises:
        RuntimeError: the engine did something else.
    """
    setup, load = Setup(**task["setup"]), Load(**task["load"])
    rng = random.Random(0)
    try:
        llm = start_engine(task["model"], setup, load, load_format="dummy", dtype="bfloat16")
        follow(llm, [random_prompt(rng, min(load.prompt_tokens, WARM_UP_TOKENS))], WARM_UP_OUTPUT)
    except Exception as error:
        if setup.is_rival:
            return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    before = counters_of(llm)
    followed = follow(
        llm, [random_prompt(rng, load.prompt_tokens) for _ in range(load.num_requests)], load.output_tokens
    )
    counters = counters_of(llm)
    if before is not None and counters is not None:
        counters = Counters(
            *(now - then for now, then in zip(vars(counters).values(), vars(before).values(), strict=True))
        )
    require_done(setup, counters, num_prompts=load.num_requests, num_preemptions=followed.num_preemptions)
    assert followed.first_token is not None, "a run makes at least one token"
    _, wall_s, blocks_before, blocks_after = followed.first_token
    return {
        "first_token_wall_s": wall_s,
        "wall_s": followed.wall_s,
        "blocks_before": blocks_before,
        "blocks_after": blocks_after,
        "peak_running": followed.peak_running,
        "num_preemptions": followed.num_preemptions,
        "pool_bytes": sum(cache.nbytes for cache in runner.kv_caches),
        "backend": runner.attn_groups[0][0].backend.get_name(),
    }


if __name__ == "__main__":
    answer(measure)
