"""The very entries the reference keeps are kept, layer by layer and head by head."""

import pytest
import torch

import fastkv_vllm.adapter.compressor
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, reference
from tests.engine.settings import SMALL, TSP

ENGINES = {
    "fastkv-max": ("fastkv", TSP),
    "fastkv-avg": ("fastkv", TSP | {"pooling": "avg"}),
    "snapkv-max": ("snapkv", SMALL),
    "snapkv-avg": ("snapkv", SMALL | {"pooling": "avg", "num_sink": 3}),
    "streamingllm": ("streamingllm", SMALL),
    "tova": ("tova", SMALL),
    "vatp": ("vatp", SMALL),
    "h2o": ("h2o", SMALL),
    "a2sf": ("a2sf", SMALL),
}
LENGTHS = (700, 704, 1001)  # a tail longer than the window, none, one inside the window


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    return start(*ENGINES[request.param])


@pytest.fixture
def selections(monkeypatch):
    """Results of all choices, in order: per layer the kept columns, after the TSP layer's rows at that layer."""
    found = []
    select = fastkv_vllm.adapter.compressor.select
    monkeypatch.setattr(
        fastkv_vllm.adapter.compressor, "select", lambda *args: found.append(select(*args)) or found[-1]
    )
    return found


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("last", [None, 3], ids=["whole", "window-in-two-chunks"])
def test_kept_entries(engine, selections, num_tokens, last):
    (prompt,) = make_prompts([num_tokens], seed=num_tokens)
    step_tokens = num_tokens if last is None else next(n for n in range(90, num_tokens) if num_tokens % n == last)
    prompt = clear(engine.checkpoint, engine.config, prompt, 4)
    with engine.step_tokens(step_tokens):
        engine.check([prompt], max_tokens=4)
    expected = reference(engine.checkpoint, engine.config, prompt, 4)
    kept, tsp_indices = positions_of(selections, engine.config, num_tokens, num_layers=len(expected.kept))
    if expected.tsp_indices is not None:
        assert tsp_indices.tolist() == expected.tsp_indices.tolist()
    for layer, (got, want) in enumerate(zip(kept, expected.kept, strict=True)):
        assert got.expand(len(want), -1).tolist() == [head.tolist() for head in want], f"layer {layer}"


def positions_of(selections, config, num_tokens, num_layers):
    """Kept positions per layer with the tail, which is not chosen, and the rows of the TSP layer."""
    columns = iter(selections)
    tail = torch.arange(num_tokens // BLOCK_SIZE * BLOCK_SIZE, num_tokens)
    positions, tsp_indices, kept = torch.arange(num_tokens), None, []
    for layer in range(num_layers):
        rows = next(columns)[0] if config.uses_tsp and layer == config.tsp_layer else None
        chosen = positions[next(columns)]
        kept.append(torch.cat([chosen, tail.expand(len(chosen), -1)], dim=1))
        if rows is not None:
            positions = tsp_indices = rows
    assert next(columns, None) is None, "more choices than layers"
    return kept, tsp_indices
