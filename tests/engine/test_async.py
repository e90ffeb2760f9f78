"""Run-ahead scheduling: step N + 1 is scheduled before step N has been sampled."""

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform

from fastkv_vllm.adapter import wiring
from fastkv_vllm.adapter.scheduler import AsyncCompressionScheduler
from tests.engine.oracle import make_prompts
from tests.engine.settings import DUO, HALTING, METHODS, MIXED, WEIGHTS

ASYNC = f"{AsyncCompressionScheduler.__module__}.{AsyncCompressionScheduler.__qualname__}"


ENGINES = {name: METHODS[name] for name in ("fastkv", "asl", "gemfilter", "snapkv", "h2o")} | {
    "dbudgetkv": HALTING,
    "duoattention": DUO | {"head_weights": WEIGHTS},
}


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    """vLLM switches run-ahead off on CPU; here its scheduler gets it and a queue of two batches.

    The worker stays synchronous: what is tested is the order of scheduling, freeing and execution.
    """
    wire = wiring.wire_compression

    def wire_async(vllm_config, config):
        wire(vllm_config, config)
        vllm_config.scheduler_config.scheduler_cls = ASYNC

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkv_vllm.adapter.patches.engine_args_config.wire_compression", wire_async)
        patch.setattr(VllmConfig, "max_concurrent_batches", property(lambda self: 2))
        engine = start(request.param, ENGINES[request.param])
    assert type(engine.scheduler) is AsyncCompressionScheduler
    assert engine.core.step_fn == engine.core.step_with_batch_queue
    return engine


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    in_flight = []
    with (
        engine.step_tokens(step_tokens),
        engine.watch(before=lambda _: in_flight.append(len(engine.core.batch_queue))),
    ):
        engine.check(MIXED)
    assert sum(in_flight) > 0.8 * len(in_flight), "steps were not scheduled ahead"


def test_preempted_with_a_batch_in_flight(engine):
    """The sampled token of the step in flight is thrown away and sampled again."""
    prompts = make_prompts([450, 90, 300])

    def preempt(number):
        if number in (2, 11, 15):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        engine.check(prompts, max_tokens=24)
    assert any(p.compressed for p in engine.preemptions)
    assert any(not p.prompt_ended for p in engine.preemptions)


@pytest.mark.parametrize("run_ahead_is_on", [False, True])
def test_the_scheduler_follows_vllms_choice(checkpoint, monkeypatch, run_ahead_is_on):
    original = CpuPlatform.check_and_update_config

    def keep(cls, vllm_config):
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = run_ahead_is_on

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    args = EngineArgs(model=str(checkpoint), skip_tokenizer_init=True, kv_compression="snapkv")
    name = args.create_engine_config().scheduler_config.scheduler_cls
    assert name == (ASYNC if run_ahead_is_on else ASYNC.replace("Async", ""))
