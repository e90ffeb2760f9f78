"""What our engine does with given prompts, in one process. Started by `benchmarks.oracle.compare`.

python -m benchmarks.oracle.engine_child TASK_JSON_FILE ANSWER_JSON_FILE

A task has `model` (checkpoint directory), `method` (None: plain vLLM), `config` and either `prompts` (see `keep`) or
`load` (see `measure`). float32, eager, one request at a time, a prompt in one step.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.child import answer

BLOCK_SIZE = 32


def keep(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Per prompt its `kept` positions, per layer and KV head, ascending, and its greedy `tokens`.

    Args:
        task: beside the engine's settings `prompts` (token ids), `max_tokens` and `stop_token`.

    Raises:
        RuntimeError: a prompt was not compressed.
    """
    from vllm import SamplingParams

    kept: list[list[list[int]]] = []
    llm = _engine(task, max(map(len, task["prompts"])) + task["max_tokens"])
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    runner.compressor.watch = lambda prefill, layer, heads: kept.append([head.tolist() for head in heads])
    sampling = SamplingParams(
        max_tokens=task["max_tokens"], temperature=0.0, stop_token_ids=[task["stop_token"]], detokenize=False
    )
    num_layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
    answers = []
    for prompt in task["prompts"]:
        kept.clear()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        if len(kept) != num_layers:
            raise RuntimeError(f"{len(kept)} choices of {num_layers} layers: not compressed, or computed twice?")
        answers.append({"kept": list(kept), "tokens": list(output.outputs[0].token_ids)})
    return answers


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Process CPU and wall seconds of the prompt and of the other tokens per repeat, and bytes of the blocks held.

    Args:
        task: beside the engine's settings `load`: `prompt`, `output_tokens`, `repeats` (timed ones, after one that
            warms up and whose blocks are counted: most at once, and when the first token is out).
    """
    load = task["load"]
    llm = _engine(task, len(load["prompt"]) + load["output_tokens"])
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    cache = scheduler.kv_cache_config
    block_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors) // cache.num_blocks
    peak_blocks, decode_blocks = _count_blocks(engine, scheduler.kv_cache_manager.block_pool, load)
    result: dict[str, Any] = {"prefill_cpu_s": [], "prefill_wall_s": [], "decode_cpu_s": [], "decode_wall_s": []}
    for _ in range(load["repeats"]):
        marks: list[tuple[float, float]] = []
        _run(engine, load, lambda marks=marks: marks.append((time.process_time(), time.perf_counter())))
        for part, (start, end) in zip(("prefill", "decode"), pairwise(marks), strict=True):
            result[f"{part}_cpu_s"].append(end[0] - start[0])
            result[f"{part}_wall_s"].append(end[1] - start[1])
    if task["method"] is not None and scheduler.totals.requests_compressed != load["repeats"] + 1:
        raise RuntimeError(f"{load['repeats'] + 1} prompts sent, not all compressed: {scheduler.totals}")
    return result | {"peak_cache_bytes": peak_blocks * block_bytes, "decode_cache_bytes": decode_blocks * block_bytes}


def _engine(task: dict[str, Any], max_model_len: int) -> Any:
    from vllm import LLM

    flags: dict[str, Any] = {}
    if task["method"] is not None:
        flags = {"kv_compression": task["method"], "kv_compression_config": task["config"]}
    return LLM(
        task["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_model_len,
        max_num_seqs=1,
        **flags,
    )


def _count_blocks(engine: Any, pool: Any, load: dict[str, Any]) -> tuple[int, int]:
    """Blocks of one request: most at once, looked at each time some are taken, and held when its first token is out."""
    num_free, take = pool.get_num_free_blocks(), pool.get_new_blocks
    taken, marked = [], []

    def watched_take(*args: Any, **kwargs: Any) -> Any:
        blocks = take(*args, **kwargs)
        taken.append(num_free - pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = watched_take
    _run(engine, load, lambda: marked.append(num_free - pool.get_num_free_blocks()))
    del pool.get_new_blocks
    return max(taken), marked[1]


def _run(engine: Any, load: dict[str, Any], mark: Callable[[], None]) -> None:
    """One request; `mark` is called at its arrival, at its first token and at its end."""
    from vllm import SamplingParams

    tokens = load["output_tokens"]
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    mark()
    engine.add_request("0", {"prompt_token_ids": load["prompt"]}, sampling)
    has_token = False
    while engine.has_unfinished_requests():
        if engine.step() and not has_token:
            has_token = True
            mark()
    mark()


if __name__ == "__main__":
    answer(lambda task: measure(task) if "load" in task else keep(task))
