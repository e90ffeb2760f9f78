"""Each setting of a method changes what stays, and the engine follows it exactly."""

import pytest

from tests.engine.oracle import drop_of
from tests.engine.settings import METHODS, MIXED, SMALL, TSP

VARIANTS = {
    "fastkv-avg": ("fastkv", TSP | {"pooling": "avg", "kernel_size": 5}),
    "snapkv-avg": ("snapkv", SMALL | {"pooling": "avg"}),
    "fastkv-sinks": ("fastkv", TSP | {"num_sink": 40}),
    "snapkv-sinks": ("snapkv", SMALL | {"num_sink": 3}),
    "fastkv-tokens": ("fastkv", {"min_tokens": 128, "budget": 100, "tsp_tokens": 150, "tsp_layer": 3}),
    "fastkv-two": ("fastkv", SMALL | {"tsp_layer": [0, 6], "tsp_ratio": [0.5, 0.2]}),
    # Prompts of one batch are cut at other layers: the first cut keeps all rows of some, the last two are equal.
    "fastkv-cuts-tokens": (
        "fastkv",
        {"min_tokens": 128, "budget": 100, "tsp_layer": [1, 4, 5, 6], "tsp_tokens": [900, 720, 300, 300]},
    ),
    "fastkv-first": ("fastkv", TSP | {"tsp_layer": 0}),
    "fastkv-last": ("fastkv", TSP | {"tsp_layer": 6}),
    "fastkv-window": ("fastkv", TSP | {"window_size": 45}),
    "fastkv-tightest": ("fastkv", SMALL | {"tsp_layer": 3, "tsp_ratio": 0.2}),
    "fastkv-value-norms": ("fastkv", TSP | {"value_norms": True, "num_sink": 2, "recent_share": 0.3}),
    "a2sf-decay": ("a2sf", SMALL | {"decay": 0.8}),
    "a2sf-recent": ("a2sf", SMALL | {"recent_share": 0.0}),
    "fastkv-without-tsp": ("fastkv", SMALL | {"tsp_ratio": 1.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_requests(start, variant):
    method, settings = VARIANTS[variant]
    engine = start(method, settings)
    assert any(drop_of(engine.config, len(p)) != _default_drop(engine.config, method, len(p)) for p in MIXED)
    with engine.step_tokens(100):
        engine.check(MIXED)


def _default_drop(config, method, num_tokens):
    """What the method's main test configuration drops."""
    main = type(config)(method=method, **METHODS.get(method, SMALL))
    return drop_of(main, num_tokens)
