"""Run by test_runner_v2.py in a process of its own: vLLM's Model Runner V2, its Triton kernels interpreted."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tests.interpreted  # isort: skip # noqa: F401 - before vLLM
from tests.engine.harness import Engine, sampling  # isort: skip # loads vLLM as an engine's process does

import pytest
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, prepare_inputs_to_capture
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

from fastkv_vllm.adapter import wiring
from fastkv_vllm.adapter.runner_v2 import CPUCompressionRunnerV2
from tests import flash
from tests.engine.child import report
from tests.engine.oracle import make_prompts
from tests.engine.requests import answer
from tests.engine.settings import MIXED, SERVER
from tests.engine.test_async import ASYNC

SIZES = (4, 2)  # of captured batches, the largest first, as vLLM has them


@contextmanager
def sampled_positions() -> Iterator[list[bool]]:
    """Within it, the list gets whether the sampler of a step saw true positions."""
    sample, found = Sampler.__call__, []

    def look(self: Sampler, logits: Any, batch: Any) -> Any:
        last = batch.num_computed_tokens_np + batch.num_scheduled_tokens - 1
        found.append(batch.positions[batch.logits_indices].tolist() == last.tolist())
        return sample(self, logits, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", look)
        yield found


@contextmanager
def decode_graphs(runner: Any) -> Iterator[Counter]:
    """Within it, vLLM hands decode steps to graphs, which are captured first.

    A replay is the model called with the metadata of the capture: what is built for the step counts by what it leaves
    in their tensors. Yields how many there were, by captured size and requests.
    """
    manager, buffers, replays = runner.cudagraph_manager, runner.input_buffers, Counter()
    shared = (runner.model_state, buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config)
    captured = {
        size: prepare_inputs_to_capture(size, size, *shared, full_cudagraph=True, max_query_len=1) for size in SIZES
    }

    def dispatch(num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any) -> Any:
        size = min((size for size in SIZES if size >= num_tokens), default=None)
        if uniform_token_count != 1 or size is None:
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, uniform_token_count=1)

    def replay(desc: BatchExecutionDescriptor) -> Any:
        size, state = desc.num_tokens, captured[desc.num_tokens]
        replays[size, len(runner._rows.request_ids)] += 1
        with set_forward_context(state.attn_metadata, runner.vllm_config, size, slot_mapping=state.slot_mappings):
            return runner.model(input_ids=buffers.input_ids[:size], positions=buffers.positions[:size])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "dispatch", dispatch)
        patch.setattr(manager, "run_fullgraph", replay)
        yield replays


def in_turn(checkpoint: Path) -> dict[str, Any]:
    """What happened in an engine that does one step after the other."""
    engine = Engine(checkpoint, "fastkv", SERVER)
    runner, worker = engine.worker.model_runner, engine.worker
    assert type(runner) is CPUCompressionRunnerV2
    with runner.warming_up():  # as vLLM's GPU worker does
        assert run_mixed_prefill_decode_warmup(runner, worker.execute_model, worker.sample_tokens, num_tokens=16)

    def preempt(number: int) -> None:
        if number in (3, 15):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        engine.check(make_prompts([450, 90, 300]), max_tokens=16)
        preempted = [preemption.compressed for preemption in engine.preemptions]
    with engine.step_tokens(300), sampled_positions() as positions:
        answer(engine, ("gemfilter", "dbudgetkv", "minicache", "none"))
    abort_one(engine)
    totals = engine.totals
    engine.close()
    return {
        "preempted": preempted,
        "positions": positions,
        "num_compressed": totals.requests_compressed,
        "tsp_rows": [totals.worker.tsp_rows_in, totals.worker.tsp_rows_out],
        "compact_us": totals.worker.compact_us,
    }


def abort_one(engine: Engine) -> None:
    """Of two requests that decode; the other one goes on undisturbed."""
    llm, (victim, other) = engine.llm.llm_engine, MIXED[:2]
    for name, prompt in (("victim", victim), ("other", other)):
        llm.add_request(name, {"prompt_token_ids": list(prompt)}, sampling(8))
    for _ in range(3):
        llm.step()
    (answer_of_other,) = engine.abort("victim")
    engine.require_reference(other, answer_of_other, 8)


def run_ahead(checkpoint: Path) -> dict[str, Any]:
    """What happened in one whose steps are scheduled ahead and, where they decode, run by graphs; on FlashAttention."""
    wire = wiring.wire_compression

    def wire_async(vllm_config: Any, config: Any) -> None:
        wire(vllm_config, config)
        vllm_config.scheduler_config.scheduler_cls = ASYNC

    with pytest.MonkeyPatch.context() as patch:
        flash.install(patch)
        patch.setattr("fastkv_vllm.adapter.patches.engine_args_config.wire_compression", wire_async)
        patch.setattr(VllmConfig, "max_concurrent_batches", property(lambda self: 2))
        engine = Engine(checkpoint, "fastkv", SERVER)
        with decode_graphs(engine.worker.model_runner) as replays, engine.step_tokens(300):
            answer(engine, ("fastkv-evicting", "kivi", "lazyllm"))
            num_beside, num_revived = sum(replays.values()), engine.totals.worker.revived_rows
            answer(engine, ("none", "snapkv", "fastkv", "adakv", "gemfilter", "duoattention"))
        engine.close()
    return {"num_beside": num_beside, "num_revived": num_revived, "replays": [*replays]}


if __name__ == "__main__":
    report({"in_turn": in_turn, "run_ahead": run_ahead}[sys.argv[2]](Path(sys.argv[1])))
