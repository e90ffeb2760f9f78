"""What keeps everything, and what is not asked for, leaves vLLM as it is."""

import pytest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.engine.harness import logprobs_of
from tests.engine.settings import MIXED, SMALL, TSP

OFF = {
    "fastkv": {"min_tokens": 128, "retention_ratio": 1.0, "tsp_ratio": 1.0},
    "snapkv": {"min_tokens": 128, "retention_ratio": 1.0},
    "streamingllm": {"min_tokens": 128, "retention_ratio": 1.0},
}
STEPS = (100, 2048)


@pytest.fixture(scope="module")
def plain_runs(start):
    return runs_of(start())


def runs_of(engine, **arguments):
    """Tokens, logprobs and the number of free blocks after each step, for some chunkings."""
    runs = []
    for step_tokens in STEPS:
        with engine.step_tokens(step_tokens), engine.watch():
            outputs = engine.generate(MIXED, 36)
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            runs.append((tokens, [logprobs_of(output) for output in outputs], list(engine.free_blocks)))
        engine.require_idle()
    return runs


def classes_of(engine):
    context = engine.core.vllm_config.compilation_config.static_forward_context
    impls = {type(layer.impl) for layer in context.values() if isinstance(layer, Attention)}
    runner = engine.worker.model_runner
    group = runner.kv_cache_config.kv_cache_groups[0]
    return {
        "scheduler": type(engine.scheduler),
        "manager": type(engine.manager),
        "worker": type(getattr(engine.worker, "worker", engine.worker)),
        "runner": type(runner),
        "attention": impls,
        "builder": type(runner.attn_groups[0][0].get_metadata_builder(0)),
        "specification": type(group.kv_cache_spec),
    }


VLLM_CLASSES = {
    "scheduler": Scheduler,
    "manager": FullAttentionManager,
    "worker": CPUWorker,
    "runner": CPUModelRunner,
    "attention": {CPUAttentionBackendImpl},
    "builder": CPUAttentionMetadataBuilder,
    "specification": FullAttentionSpec,
}


def test_without_the_flag_the_classes_are_vllms(plain_runs, start):
    engine = start()
    assert classes_of(engine) == VLLM_CLASSES
    assert "fastkv" not in engine.core.vllm_config.additional_config
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    engine.check(MIXED)


@pytest.mark.parametrize("method", OFF)
def test_keeping_everything_is_plain_vllm(plain_runs, start, method):
    """Tokens, logprobs to the bit, and each step's block count."""
    engine = start(method, OFF[method])
    assert runs_of(engine) == plain_runs
    assert engine.totals.requests_compressed == 0
    assert engine.totals.left_alone == {"short": 2 * len(STEPS), "budget_covers_prompt": 4 * len(STEPS)}


def test_tsp_of_all_rows_keeps_all_rows(plain_runs, start):
    """TSP is on, with a budget and tsp_tokens that no prompt reaches."""
    engine = start("fastkv", {"min_tokens": 128, "budget": 2048, "tsp_tokens": 2048, "tsp_layer": 3})
    assert engine.config.uses_tsp
    assert runs_of(engine) == plain_runs


def test_compression_is_seen_in_the_block_counts(plain_runs, start):
    """The comparison above can fail."""
    engine = start("snapkv", SMALL)
    for (tokens, _, free_blocks), plain in zip(runs_of(engine), plain_runs, strict=True):
        assert tokens != plain[0]
        assert free_blocks != plain[2]
        assert max(free_blocks[-8:]) > max(plain[2][-8:])


def checks_of_requests():
    responses = OpenAIServingResponses._generate_with_builtin_tools
    return [vars(Platform)["validate_request"].__func__, AsyncLLM.generate, responses]


def test_plain_vllm_after_compression_is_untouched(plain_runs, start):
    start("fastkv", TSP).check(MIXED[:2], max_tokens=4)
    assert all("__fastkv_original__" in vars(check) for check in checks_of_requests())
    engine = start()
    assert runs_of(engine) == plain_runs
    assert classes_of(engine) == VLLM_CLASSES
    assert not any("__fastkv_original__" in vars(check) for check in checks_of_requests())
    engine.generate(MIXED[2:3], 4, prompt_logprobs=0)
