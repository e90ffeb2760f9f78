"""The very entries the reference keeps are kept, layer by layer and head by head."""

import pytest
import torch

import fastkv_vllm.adapter.compressor
import fastkv_vllm.adapter.cuts
from fastkv_vllm.kernels.select import select
from fastkv_vllm.methods import method_class
from tests.engine.harness import sampling
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, reference
from tests.engine.settings import ASL, CUTS, GEMFILTER, SMALL, TSP

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
    "gemfilter": ("gemfilter", GEMFILTER),
}
LENGTHS = (700, 704, 1001)  # a tail longer than the window, none, one inside the window


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start):
    return start(*ENGINES[request.param])


@pytest.fixture
def selections(monkeypatch):
    """Results of all choices, in order: per layer the kept columns, after those of the rows that go on at a cut."""
    found = []
    for module in (fastkv_vllm.adapter.compressor, fastkv_vllm.adapter.cuts):
        monkeypatch.setattr(module, "select", lambda *args: found.append(select(*args)) or found[-1])
    return found


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("last", [None, 3], ids=["whole", "window-in-two-chunks"])
def test_kept_entries(engine, selections, num_tokens, last):
    (prompt,) = make_prompts([num_tokens], seed=num_tokens)
    step_tokens = num_tokens if last is None else next(n for n in range(90, num_tokens) if num_tokens % n == last)
    prompt = clear(engine.checkpoint, engine.config, prompt, 4)
    with engine.step_tokens(step_tokens), engine.watch_kept() as watched:
        engine.check([prompt], max_tokens=4)
    expected = reference(engine.checkpoint, engine.config, prompt, 4)
    assert watched == [[head.tolist() for head in layer] for layer in expected.kept], "what a watch is told"
    kept, tsp_indices = positions_of(selections, engine.config, expected, num_tokens)
    assert [rows.tolist() for rows in tsp_indices] == [rows.tolist() for rows in expected.tsp_indices]
    for layer, (got, want) in enumerate(zip(kept, expected.kept, strict=True)):
        assert got.expand(len(want), -1).tolist() == [head.tolist() for head in want], f"layer {layer}"


def test_tokens_are_read_again_as_a_prompt_of_their_own(start):
    """Plain vLLM answers the short prompt alike."""
    engine = start("gemfilter", GEMFILTER)
    (prompt,) = make_prompts([700], seed=700)
    prompt = clear(engine.checkpoint, engine.config, prompt, 8)
    with engine.step_tokens(90):
        (output,) = engine.check([prompt], max_tokens=8)
    (chosen,) = reference(engine.checkpoint, engine.config, prompt, 8).tsp_indices
    extra = {"kv_compression": "none"}
    short = {"prompt_token_ids": [prompt[position] for position in chosen]}
    (alone,) = engine.llm.generate([short], sampling(8, extra_args=extra), use_tqdm=False)
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def positions_of(selections, config, expected, num_tokens):
    """Kept positions per layer with the tail, which is not chosen, and the positions that go on after each cut.

    Which choices are whose follows from the layers of the cuts and their number, as the reference has them.
    """
    cut_layers, num_layers = expected.cut_layers, len(expected.kept)
    if method_class(config.method).reads_again:
        (chosen,) = selections  # once: all layers keep the tokens that go on, tail and all
        return [chosen] * num_layers, [chosen[0]]
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
