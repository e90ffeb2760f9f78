"""Each setting of a method changes what stays, and the engine follows it exactly."""

import pytest

from tests.engine.oracle import clear, drop_of, reference
from tests.engine.settings import ASL, METHODS, MIXED, SMALL, TSP

VARIANTS = {
    "fastkv-avg": ("fastkv", TSP | {"pooling": "avg", "kernel_size": 5}),
    "snapkv-avg": ("snapkv", SMALL | {"pooling": "avg"}),
    "fastkv-sinks": ("fastkv", TSP | {"num_sink": 40}),
    "snapkv-sinks": ("snapkv", SMALL | {"num_sink": 3}),
    "fastkv-tokens": ("fastkv", {"min_tokens": 128, "budget": 100, "tsp_tokens": 150, "tsp_layer": 3}),
    "fastkv-two": ("fastkv", SMALL | {"tsp_layer": [0, 6], "tsp_ratio": [0.5, 0.2]}),
    "fastkv-first": ("fastkv", TSP | {"tsp_layer": 0}),
    "fastkv-last": ("fastkv", TSP | {"tsp_layer": 6}),
    "fastkv-window": ("fastkv", TSP | {"window_size": 45}),
    "fastkv-tightest": ("fastkv", SMALL | {"tsp_layer": 3, "tsp_ratio": 0.2}),
    "fastkv-value-norms": ("fastkv", TSP | {"value_norms": True, "num_sink": 2, "recent_share": 0.3}),
    "a2sf-decay": ("a2sf", SMALL | {"decay": 0.8}),
    "a2sf-recent": ("a2sf", SMALL | {"recent_share": 0.0}),
    "asl-earliest": ("asl", ASL | {"rank_variance": 0.99, "min_tsp_layer": 3, "tsp_layer": 5}),
    "asl-norms": ("asl", ASL | {"value_norms": True, "num_sink": 3, "pooling": "avg"}),
    "gemfilter-sinks": ("gemfilter", {"min_tokens": 128, "budget": 150, "num_sink": 3, "tsp_layer": 0}),
    "gemfilter-last": ("gemfilter", SMALL | {"tsp_layer": 6, "window_size": 1, "recent_share": 0.3}),
    "fastkv-without-tsp": ("fastkv", SMALL | {"tsp_ratio": 1.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_requests(start, variant):
    method, settings = VARIANTS[variant]
    engine = start(method, settings)
    assert any(drop_of(engine.config, len(p)) != _default_drop(engine.config, method, len(p)) for p in MIXED)
    with engine.step_tokens(100):
        engine.check(MIXED)


def test_prompts_of_one_step_are_cut_after_different_layers(start):
    """The first cut would keep all rows of the shorter prompt, the last what stays of the longer one."""
    settings = {"retention_ratio": 0.28, "tsp_layer": [1, 4, 5], "tsp_tokens": [900, 300, 200]}
    engine = start("fastkv", SMALL | settings)
    layers = [[layer for layer, _ in drop_of(engine.config, len(prompt)).cuts] for prompt in MIXED[:2]]
    assert layers == [[1, 4], [4, 5]]
    for step_tokens in (100, 2048):
        with engine.step_tokens(step_tokens):
            engine.check(MIXED)


@pytest.mark.parametrize("step_tokens", [100, 400, 2048])
def test_each_prompt_is_cut_where_its_ranks_settle(start, step_tokens):
    engine = start("asl", ASL)
    before = dict(engine.totals.worker.cut_layers)
    with engine.step_tokens(step_tokens):
        engine.check(MIXED, max_tokens=4)
    found = [clear(engine.checkpoint, engine.config, prompt, 4) for prompt in MIXED if len(prompt) > 128]
    layers = [reference(engine.checkpoint, engine.config, prompt, 4).cut_layers for prompt in found]
    counts = {layer: layers.count([layer]) + before.get(layer, 0) for (layer,) in layers}
    assert len(counts) > 1 and engine.totals.worker.cut_layers == counts


def _default_drop(config, method, num_tokens):
    """What the method's main test configuration drops."""
    main = type(config)(method=method, **METHODS.get(method, SMALL))
    return drop_of(main, num_tokens)
