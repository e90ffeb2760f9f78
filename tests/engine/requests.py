"""Requests with methods and settings of their own, served together."""

import json
from collections import Counter

from fastkv_vllm.config import CompressionConfig
from tests.engine.harness import sampling
from tests.engine.oracle import (
    blocks_encoded,
    blocks_filled,
    clear,
    freed_blocks,
    kept_entries,
    make_prompts,
    plan_of,
    reference,
)
from tests.engine.settings import REQUESTS, SERVER

LENGTHS = [1111, 700, 832, 500, 1300, 640, 901, 333, 777, 1024]


def filled(method, settings):
    """Configuration of a request of the small checkpoint, on a server of SERVER; None: not compressed."""
    if method == "none":
        return None
    settings = {"channel_groups": SERVER["channel_groups"], **settings}
    return CompressionConfig(method, **settings).for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)


def answer(engine, names=tuple(REQUESTS), max_tokens=24, shift=0):
    """These requests at once, the n-th with prompt n + shift, each held against its own reference.

    Returns prompt and configuration of each.
    """
    asked = []
    for i, (method, settings) in enumerate(REQUESTS[name] for name in names):
        config = filled(method, settings)
        (prompt,) = make_prompts([LENGTHS[(i + shift) % len(LENGTHS)]], seed=i)
        asked.append((clear(engine.checkpoint, config, prompt, max_tokens), method, settings))
    before = counts(engine.totals)
    ask(engine, asked, max_tokens)
    asked = [(prompt, filled(method, settings)) for prompt, method, settings in asked]
    if not engine.preemptions:  # a prompt compressed again counts again
        assert counts(engine.totals) - before == expected_counts(engine, asked, max_tokens)
    return asked


def ask(engine, asked, max_tokens):
    """Outputs of prompts, each with its method and settings, which are those of their references."""
    extra = [
        {"kv_compression": method} | ({"kv_compression_config": json.dumps(settings)} if settings else {})
        for _, method, settings in asked
    ]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt, _, _ in asked],
        [sampling(max_tokens, extra_args=args) for args in extra],
        use_tqdm=False,
    )
    for (prompt, method, settings), output in zip(asked, outputs, strict=True):
        engine.require_reference(prompt, output, max_tokens, config=filled(method, settings))
    engine.require_idle()
    return outputs


def counts(totals):
    """What was compressed by each method, and requests that wanted no compression."""
    found = Counter(requested=totals.left_alone.get("requested", 0))
    for method, prompts in totals.by_method.items():
        found.update({(method, name): count for name, count in vars(prompts).items()})
    return found


def expected_counts(engine, asked, max_tokens):
    """The counts of these requests, each compressed once, by what their references keep."""
    expected = Counter()
    for prompt, config in asked:
        if config is None:
            expected["requested"] += 1
            continue
        plan = plan_of(config, len(prompt))
        generation = reference(engine.checkpoint, config, prompt, max_tokens)
        freed = freed_blocks(plan, generation, engine.core.vllm_config.parallel_config.tensor_parallel_size)
        num_tokens = len(prompt) + max_tokens
        figures = {
            "requests_compressed": 1,
            "prompt_tokens_seen": len(prompt),
            "prompt_tokens_kept": kept_entries(plan, generation),
            "blocks_freed": freed,
            "decode_blocks_freed": blocks_filled(len(prompt), num_tokens)
            if plan.evicts
            else blocks_encoded(plan, num_tokens)
            if plan.encodes
            else 0,
        }
        if generation.recalls:
            least, most = generation.recalls[0], generation.recalls[-1]
            figures["guard_triggers"] = int(least < config.min_attention_recall)
            figures["guard_shortfalls"] = int(most < config.min_attention_recall)
        expected.update({(config.method, name): count for name, count in figures.items()})
    return expected
