"""One load on one engine on a GPU, in this process. Started by `benchmarks.gpu` through `benchmarks.child`.

Weights are random and made where they are needed (`load_format="dummy"`): they change no figure.
"""

import random
from typing import Any

from vllm import LLM

from benchmarks.child import answer
from benchmarks.speed.follow import follow
from benchmarks.speed.load import RANDOM_IDS, WARM_UP_TOKENS, Counters, Load, Setup, require_done

WARM_UP_OUTPUT = 8


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
        llm = _start(task["model"], setup, load)
        follow(llm, [_prompt(rng, min(load.prompt_tokens, WARM_UP_TOKENS))], WARM_UP_OUTPUT)
    except Exception as error:
        if setup.is_rival:
            return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    before = _counters(core)
    followed = follow(llm, [_prompt(rng, load.prompt_tokens) for _ in range(load.num_requests)], load.output_tokens)
    counters = _counters(core)
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


def _start(model: str, setup: Setup, load: Load) -> LLM:
    flags = {"enable_prefix_caching": False} | setup.engine
    if setup.method is not None:
        flags |= {"kv_compression": setup.method, "kv_compression_config": setup.config}
    return LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=load.most_tokens,
        max_num_batched_tokens=load.step_tokens,
        max_num_seqs=load.num_requests,
        num_gpu_blocks_override=load.blocks_of(setup),
        **flags,
    )


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(*RANDOM_IDS) for _ in range(num_tokens)]


def _counters(core: Any) -> Counters | None:
    """The compressing scheduler's totals; None: it is vLLM's own."""
    totals = vars(core.scheduler).get("totals")
    if totals is None:
        return None
    left_alone = sum(totals.left_alone.values())
    return Counters(totals.requests_compressed, left_alone, totals.worker.tsp_rows_in, totals.worker.tsp_rows_out)


if __name__ == "__main__":
    answer(measure)
