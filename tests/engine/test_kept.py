"""The very entries the reference keeps are kept, layer by layer and head by head."""

import pytest
import torch

import fastkv_vllm.adapter.compressor
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, reference
from tests.engine.settings import ASL, CUTS, SMALL, TSP

ENGINES = {
    "fastkv-max": ("fastkv", TSP),
    "fastkv-cuts": ("fastkv", CUTS),
    "asl": ("asl", ASL),
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
    """Results of all choices, in order: per layer the kept columns, after those of the rows that go on at a cut."""
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
    kept, tsp_indices = positions_of(selections, expected.cut_layers, num_tokens, num_layers=len(expected.kept))
    assert [rows.tolist() for rows in tsp_indices] == [rows.tolist() for rows in expected.tsp_indices]
    for layer, (got, want) in enumerate(zip(kept, expected.kept, strict=True)):
        assert got.expand(len(want), -1).tolist() == [head.tolist() for head in want], f"layer {layer}"


def positions_of(selections, cut_layers, num_tokens, num_layers):
    """Kept positions per layer with the tail, which is not chosen, and the positions that go on after each cut."""
    columns = iter(selections)
    tail = torch.arange(num_tokens // BLOCK_SIZE * BLOCK_SIZE, num_tokens)
    positions, tsp_indices, kept = torch.arange(num_tokens), [], []
    for layer in range(num_layers):
        rows = next(columns)[0] if layer in cut_layers else None
        chosen = positions[next(columns)]
        kept.append(torch.cat([chosen, tail.expand(len(chosen), -1)], dim=1))
        if rows is not None:
            positions = positions[rows]
            tsp_indices.append(positions)
    assert next(columns, None) is None, "more choices than layers"
    return kept, tsp_indices
