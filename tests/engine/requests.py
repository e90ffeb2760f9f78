"""Requests with methods and settings of their own, served together."""

import json

from fastkv_vllm.config import CompressionConfig
from tests.engine.harness import sampling
from tests.engine.oracle import clear, freed_blocks, make_prompts, plan_of, reference
from tests.engine.settings import REQUESTS

LENGTHS = [1111, 700, 832, 500, 1300, 640, 901, 333, 777, 1024]


def filled(method, settings):
    """Configuration of a request of the small checkpoint; None: not compressed."""
    if method == "none":
        return None
    return CompressionConfig(method, **settings).for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)


def answer(engine, names=tuple(REQUESTS), max_tokens=24, shift=0):
    """These requests at once, the n-th with prompt n + shift, each held against its own reference.

    Returns prompt and configuration of each.
    """
    asked = []
    for i, (method, settings) in enumerate(REQUESTS[name] for name in names):
        config = filled(method, settings)
        (prompt,) = make_prompts([LENGTHS[(i + shift) % len(LENGTHS)]], seed=i)
        extra = {"kv_compression": method} | ({"kv_compression_config": json.dumps(settings)} if settings else {})
        asked.append((clear(engine.checkpoint, config, prompt, max_tokens), config, extra))
    before = engine.totals.requests_compressed, dict(engine.totals.left_alone), engine.totals.blocks_freed
    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt, _, _ in asked],
        [sampling(max_tokens, extra_args=extra) for _, _, extra in asked],
        use_tqdm=False,
    )
    for (prompt, config, _), output in zip(asked, outputs, strict=True):
        engine.require_reference(prompt, output, max_tokens, config=config)
    engine.require_idle()
    asked = [(prompt, config) for prompt, config, _ in asked]
    if not engine.preemptions:  # a prompt compressed again counts again
        require_counts(engine, before, asked, max_tokens)
    return asked


def require_counts(engine, before, asked, max_tokens):
    """What the totals have grown by: the requests to compress, those not, and the blocks their references free."""
    compressed = [(prompt, config) for prompt, config in asked if config is not None]
    assert engine.totals.requests_compressed - before[0] == len(compressed)
    assert engine.totals.left_alone.get("requested", 0) - before[1].get("requested", 0) == len(asked) - len(compressed)
    freed = [
        freed_blocks(plan_of(config, len(prompt)), reference(engine.checkpoint, config, prompt, max_tokens))
        for prompt, config in compressed
    ]
    assert engine.totals.blocks_freed - before[2] == sum(freed)
