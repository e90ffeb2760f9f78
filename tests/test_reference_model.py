"""The oracle itself: its model against transformers, its dropping against both that and hand-made cases."""

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache, Idefics3ForConditionalGeneration

from tests.reference import FAMILIES, Drop, Generation, ReferenceModel, make_checkpoint
from tests.reference.budgets import guard, losses_by_count, recalls_by_pages
from tests.reference.images import ROW_TOKENS, make_image_checkpoint, picture, pixels
from tests.reference.model import _attend, _Layer
from tests.reference.selection import select_positions, window_scores

NUM_TOKENS, FORCED_FROM, NUM_KEPT, NUM_TSP, TSP_LAYER = 201, 192, 40, 80, 3
SNAPKV = Drop("snapkv", NUM_KEPT, FORCED_FROM)
FASTKV = Drop("fastkv", NUM_KEPT, FORCED_FROM, cuts=((TSP_LAYER, NUM_TSP),), num_sink=2)
CUTS = Drop("fastkv", NUM_KEPT, FORCED_FROM, cuts=((2, 120), (4, NUM_TSP), (5, 50)))
STREAMINGLLM = Drop("streamingllm", NUM_KEPT, FORCED_FROM, num_sink=4)
AVERAGE = Drop("snapkv", NUM_KEPT, FORCED_FROM, window_size=5, kernel_size=3, pooling="avg")
DROPS = pytest.mark.parametrize(
    "drop", [SNAPKV, FASTKV, CUTS, STREAMINGLLM, AVERAGE], ids=["snapkv", "fastkv", "cuts", "streamingllm", "avg"]
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        return root / family if (root / family).exists() else make_checkpoint(root / family, family)

    return get


@pytest.fixture(scope="session")
def llama(checkpoint: Callable[[str], Path]) -> ReferenceModel:
    return ReferenceModel(checkpoint("llama"))


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    return torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def load_transformers(directory: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()


def kept_of(generation: Generation) -> list[Tensor]:
    """Kept positions of each layer, [H, K], where all heads keep as many."""
    return [torch.stack(layer) for layer in generation.kept]


# The whole model, nothing dropped


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_are_as_accurate_as_transformers(
    family: str, checkpoint: Callable[[str], Path], prompt: list[int]
) -> None:
    directory = checkpoint(family)
    exact = load_transformers(directory, torch.float64)(torch.tensor([prompt])).logits[0]
    theirs = load_transformers(directory)(torch.tensor([prompt])).logits[0]
    ours = ReferenceModel(directory).logits(prompt)
    rounding_step = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * ((theirs - exact).abs().max() + rounding_step)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_decode_equals_transformers_on_the_whole_text(
    family: str, checkpoint: Callable[[str], Path], prompt: list[int]
) -> None:
    directory = checkpoint(family)
    generation = ReferenceModel(directory).generate(prompt, max_tokens=60)
    logits = load_transformers(directory)(torch.tensor([prompt + generation.tokens])).logits[0, NUM_TOKENS - 1 : -1]
    top = logits.topk(2).values
    expected = logits.log_softmax(dim=-1)[torch.arange(60), generation.tokens]
    assert logits.argmax(dim=-1).tolist() == generation.tokens
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(generation.margins), top[:, 0] - top[:, 1], rtol=0, atol=1e-4)
    assert generation.kept == [] and generation.tsp_indices == []


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_vary_and_ties_are_rare(
    family: str, checkpoint: Callable[[str], Path], prompt: list[int]
) -> None:
    generation = ReferenceModel(checkpoint(family)).generate(prompt, max_tokens=60)
    assert len(set(generation.tokens)) >= 30
    assert sum(margin < 1e-3 for margin in generation.margins) <= 3


@torch.inference_mode()
def test_pictures_are_those_of_transformers(tmp_path: Path, prompt: list[int]) -> None:
    """Logits of a prompt with two pictures, to transformers one image token each and the pixels."""
    directory = make_image_checkpoint(tmp_path)
    prompt = [token for token in prompt if token != ROW_TOKENS[2]]
    prompt = [*prompt[:50], *picture(1), *prompt[50:70], *picture(0), *prompt[70:]]
    tokens = [token if token >= 0 else ROW_TOKENS[(-1 - token) % len(ROW_TOKENS)] for token in prompt]
    processor = AutoProcessor.from_pretrained(directory).image_processor
    inputs = processor([[pixels(1), pixels(0)]], input_data_format="channels_last", return_tensors="pt")
    model = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    torch.testing.assert_close(
        ReferenceModel(directory).logits(prompt), model(torch.tensor([tokens]), **inputs).logits[0], rtol=0, atol=1e-4
    )


def test_checkpoint_depends_on_the_seed_only(tmp_path: Path) -> None:
    first, again, other = (
        (make_checkpoint(tmp_path / name, "qwen2", num_layers=1, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again != other


# Dropping everything or nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_no_drop(family: str, checkpoint: Callable[[str], Path], prompt: list[int]) -> None:
    model = ReferenceModel(checkpoint(family))
    full = model.generate(prompt, max_tokens=20)
    keep_all = Drop("fastkv", NUM_TOKENS, FORCED_FROM, cuts=((TSP_LAYER, NUM_TOKENS),))
    kept = model.generate(prompt, max_tokens=20, drop=keep_all)
    assert (kept.tokens, kept.logprobs) == (full.tokens, full.logprobs)
    assert all(torch.equal(head, torch.arange(NUM_TOKENS)) for layer in kept.kept for head in layer)


@torch.inference_mode()
def test_heads_that_stream_see_what_their_caches_hold(llama: ReferenceModel, prompt: list[int]) -> None:
    """The prompt read token by token, caches of heads that do not keep it cut by hand every 48; blocks of 16."""
    num_tail, num_first, num_sink = 9, 32, 20
    weights = tuple(tuple(float((3 * layer + 5 * head) % 16) for head in range(2)) for layer in range(8))
    numbers = {"block_size": 16, "head_budgets": "retrieval", "streaming_tokens": 80, "head_weights": weights}
    drop = Drop("duoattention", 160 + num_tail, FORCED_FROM, num_sink=num_sink, stream_period=48, **numbers)
    generation = llama.generate(prompt, 6, drop)
    counts = [[len(stay) for stay in layer] for layer in generation.kept]
    assert len({n for layer in counts for n in layer}) > 2, "retrieval heads, streaming ones, and one between"
    none = torch.empty(0, llama.head_dim)
    layers = [_Layer(own, [none] * 2, [none] * 2, none, []) for own in llama.layer_weights]
    held = [[[], []] for _ in layers]
    for position, token in enumerate(prompt):
        hidden = llama._decode(layers, token, position, None)
        ends = position == NUM_TOKENS - 1
        for layer, row, positions in zip(layers, counts, held, strict=True):
            for head, count in enumerate(row):
                positions[head].append(position)
                first, most = (num_sink, count) if ends else (num_first, max(count - num_tail, num_first + 16))
                if (ends or position % 48 == 47) and len(positions[head]) > most:
                    for cache in (positions, layer.keys, layer.values):
                        recent = cache[head][first - most :]
                        start = cache[head][:first]
                        cache[head] = start + recent if cache is positions else torch.cat([start, recent])
    assert [[stay.tolist() for stay in layer] for layer in generation.kept] == held
    for number, (token, logprob) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
        assert llama._head(hidden[-1]).log_softmax(dim=-1)[token].item() == pytest.approx(logprob, abs=1e-4)
        hidden = llama._decode(layers, token, NUM_TOKENS + number, None)
    whole = llama.generate(prompt, 1, Drop("duoattention", 160 + num_tail, FORCED_FROM, num_sink=num_sink, **numbers))
    assert abs(whole.logprobs[0] - generation.logprobs[0]) > 1e-2, "the prompt's last query misses what was let go"


def test_a_layer_may_read_the_entries_of_another(llama: ReferenceModel, prompt: list[int]) -> None:
    """After the prompt, which each layer reads with its own entries."""
    keep_all = Drop("streamingllm", NUM_TOKENS, FORCED_FROM, block_size=16)
    full = llama.generate(prompt, 4, keep_all)
    shared = llama.generate(prompt, 4, replace(keep_all, layer_owners=(0, 1, 2, 3, 4, 5, 6, 2)))
    assert shared.logprobs[0] == full.logprobs[0], "the prompt is read as ever"
    assert abs(shared.logprobs[1] - full.logprobs[1]) > 1e-3
    hidden, layers, *_ = llama._prefill(prompt, None)
    last, owner = layers[7], layers[2]
    last.keys, last.values = owner.keys, owner.values
    for step, token in enumerate(shared.tokens):
        logprobs = llama._head(hidden[-1]).log_softmax(dim=-1)
        assert logprobs[token].item() == pytest.approx(shared.logprobs[step], abs=1e-5)
        position = torch.tensor([NUM_TOKENS + step])
        hidden = llama._embed([token])
        for layer in layers:
            queries, keys, values = llama._project(layer.weights, hidden, position)
            if layer is last:
                layer.keys, layer.values = owner.keys, owner.values
            else:
                layer.keys = [torch.cat(pair) for pair in zip(layer.keys, keys, strict=True)]
                layer.values = [torch.cat(pair) for pair in zip(layer.values, values, strict=True)]
            hidden = llama._finish(layer.weights, hidden, _attend(queries, layer.keys, layer.values))


def test_propagating_all_is_no_tsp(llama: ReferenceModel, prompt: list[int]) -> None:
    without = llama.generate(prompt, 20, SNAPKV)
    with_tsp = llama.generate(prompt, 20, Drop("fastkv", NUM_KEPT, FORCED_FROM, cuts=((TSP_LAYER, NUM_TOKENS),)))
    assert with_tsp.tokens == without.tokens
    assert all(torch.equal(a, b) for a, b in zip(kept_of(with_tsp), kept_of(without), strict=True))


# Which entries stay


@DROPS
def test_kept_sets_are_sorted_counted_and_hold_the_forced(drop: Drop, llama: ReferenceModel, prompt: list[int]) -> None:
    generation = llama.generate(prompt, 1, drop)
    forced = {*range(drop.num_sink), *range(FORCED_FROM, NUM_TOKENS)}
    for layer in kept_of(generation):
        assert layer.shape == (2, NUM_KEPT) and layer.dtype == torch.int64
        assert (layer.diff(dim=1) > 0).all()
        assert all(forced <= set(head.tolist()) for head in layer)


@pytest.mark.parametrize("drop", [FASTKV, CUTS], ids=["one", "three"])
def test_tsp_indices_are_sorted_counted_and_bound_the_late_layers(
    drop: Drop, llama: ReferenceModel, prompt: list[int]
) -> None:
    generation = llama.generate(prompt, 1, drop)
    seen, first = set(range(NUM_TOKENS)), 0
    for (layer, num_rows), rows in zip(drop.cuts, generation.tsp_indices, strict=True):
        propagated = set(rows.tolist())
        assert rows.shape == (num_rows,) and (rows.diff() > 0).all()
        assert {*range(drop.num_sink), *range(FORCED_FROM, NUM_TOKENS)} <= propagated < seen
        assert all(set(kept.flatten().tolist()) <= propagated for kept in kept_of(generation)[layer + 1 :])
        assert any(set(kept.flatten().tolist()) - propagated for kept in kept_of(generation)[first : layer + 1])
        seen, first = propagated, layer + 1


def test_a_late_layer_that_saw_fewer_keeps_them_all(llama: ReferenceModel, prompt: list[int]) -> None:
    generation = llama.generate(prompt, 1, Drop("fastkv", 60, FORCED_FROM, cuts=((TSP_LAYER, NUM_KEPT),)))
    assert [layer.shape[1] for layer in kept_of(generation)] == [60] * 4 + [NUM_KEPT] * 4
    assert torch.equal(kept_of(generation)[-1], generation.tsp_indices[0].expand(2, -1))


def test_streamingllm_keeps_sinks_and_the_most_recent(llama: ReferenceModel, prompt: list[int]) -> None:
    expected = [*range(4), *range(NUM_TOKENS - NUM_KEPT + 4, NUM_TOKENS)]
    assert all(
        head.tolist() == expected for layer in kept_of(llama.generate(prompt, 1, STREAMINGLLM)) for head in layer
    )


def test_window_scores_by_hand() -> None:
    # Head 0 weighs the five keys 4:1:1:2:2, head 1 1:1:4:2:2; of two window queries the first sees four keys.
    # Votes of head 0: (4/8 + 4/10, 1/8 + 1/10, 1/8 + 1/10) = (0.9, 0.225, 0.225); of head 1: the reverse.
    weights = torch.tensor([[4.0, 1, 1, 2, 2], [1, 1, 4, 2, 2]])
    keys = weights.log().T[None] * math.sqrt(2)  # [1, 5, 2]
    queries = torch.eye(2)[:, None].expand(2, 5, 2)  # [2, 5, 2]
    expected = {
        ("max", 1): [1.125, 0.45, 1.125],
        ("max", 3): [
            0.9 + 0.225,
            0.9 + 0.9,
            0.225 + 0.9,
        ],  # pooled per query head; the sum's maximum would be 1.125 thrice
        ("avg", 3): [
            1.125 / 3 + 0.45 / 3,
            1.35 / 3 + 1.35 / 3,
            0.45 / 3 + 1.125 / 3,
        ],  # a place outside counts as zero
    }
    for (pooling, kernel_size), scores in expected.items():
        drop = Drop("snapkv", 3, 3, window_size=2, kernel_size=kernel_size, pooling=pooling)
        torch.testing.assert_close(window_scores(queries, keys, drop), torch.tensor([scores]))


def test_window_scores_add_up_within_a_group_only() -> None:
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(6, 30, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
    scores = window_scores(queries, keys, SNAPKV)
    torch.testing.assert_close(scores[:1], window_scores(queries[:3], keys[:1], SNAPKV))
    torch.testing.assert_close(scores[1:], window_scores(queries[3:], keys[1:], SNAPKV))


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        (
            [5.0, 7, 7, 7, 1, 9],
            5,
            [13, 15, 34, 55, 89],
        ),  # three tie for two places beside the forced 34, 55, 89
        ([5.0, 7, 7, 7, 1, 9], 6, [13, 15, 21, 34, 55, 89]),
        ([0.0] * 6, 4, [3, 34, 55, 89]),  # all tie
        ([0.0] * 6, 3, [34, 55, 89]),  # no place beyond the forced
        ([0.0] * 6, 99, [3, 13, 15, 21, 30, 34, 55, 89]),
    ],
)
def test_ties_go_to_the_lower_position(scores: list[float], count: int, expected: list[int]) -> None:
    positions = [3, 13, 15, 21, 30, 34, 55, 89]
    assert select_positions(scores, positions, count, Drop("snapkv", 3, forced_from=34, window_size=2)) == expected


def test_sinks_are_forced_whatever_their_score() -> None:
    drop = Drop("snapkv", 4, forced_from=6, window_size=2, num_sink=1)
    assert select_positions([-9.0, 1, 2, 3, 4, 5], list(range(8)), 4, drop) == [0, 5, 6, 7]


@pytest.mark.parametrize("drop", [SNAPKV, AVERAGE, FASTKV], ids=["max", "avg", "tsp"])
@torch.inference_mode()
def test_kept_entries_outscore_the_dropped_by_transformers_attention(
    drop: Drop, checkpoint: Callable[[str], Path], llama: ReferenceModel, prompt: list[int]
) -> None:
    model = load_transformers(checkpoint("llama"), attention="eager")
    attentions = model(torch.tensor([prompt]), output_attentions=True).attentions[: TSP_LAYER + 1]
    generation = llama.generate(prompt, 1, drop)
    pool = F.max_pool1d if drop.pooling == "max" else F.avg_pool1d
    for layer, kept in zip(attentions, kept_of(generation), strict=False):
        votes = layer[0, :, -drop.window_size :, : -drop.window_size].sum(dim=1)
        scores = pool(votes, drop.kernel_size, stride=1, padding=drop.kernel_size // 2).unflatten(0, (2, 2)).sum(dim=1)
        for head in range(2):
            assert_outscored(scores[head], kept[head], drop)
    for rows in generation.tsp_indices:
        assert_outscored(scores.sum(dim=0), rows, drop)


def assert_outscored(scores: Tensor, stayed: Tensor, drop: Drop) -> None:
    candidates = set(range(drop.num_sink, FORCED_FROM))
    best, dropped = candidates & set(stayed.tolist()), candidates - set(stayed.tolist())
    assert best and dropped
    assert scores[list(best)].min() >= scores[list(dropped)].max() - 1e-6


# What is computed from them


@DROPS
@torch.inference_mode()
def test_prefill_and_decode_equal_transformers_on_the_same_entries(
    drop: Drop, checkpoint: Callable[[str], Path], llama: ReferenceModel, prompt: list[int]
) -> None:
    generation = llama.generate(prompt, 60, drop)
    model = load_transformers(checkpoint("llama"))
    logits, cache = prefill_and_drop(model, prompt, kept_of(generation), drop.cuts, generation.tsp_indices)
    for step, (token, logprob) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
        assert int(logits.argmax()) == token, f"step {step}, margin {generation.margins[step]}"
        assert abs(float(logits.log_softmax(dim=-1)[token]) - logprob) < 1e-4
        position = torch.tensor([[NUM_TOKENS + step]])
        logits = model(torch.tensor([[token]]), position_ids=position, past_key_values=cache).logits[0, -1]


def prefill_and_drop(
    model: torch.nn.Module,
    prompt: list[int],
    kept: list[Tensor],
    cuts: Sequence[tuple[int, int]],
    tsp_indices: Sequence[Tensor],
) -> tuple[Tensor, DynamicCache]:
    """Transformers' layers one by one: take the rows that go on after each cut, gather each head's kept entries."""
    full, compressed = DynamicCache(), DynamicCache()
    rows_after = {layer: rows for (layer, _), rows in zip(cuts, tsp_indices, strict=True)}
    positions, hidden = torch.arange(len(prompt)), model.model.embed_tokens(torch.tensor([prompt]))
    for index, layer in enumerate(model.model.layers):
        rope = model.model.rotary_emb(hidden, positions[None])
        hidden = layer(hidden, attention_mask=None, position_embeddings=rope, past_key_values=full)
        rows = (positions == kept[index][..., None]).long().argmax(dim=-1)[None, :, :, None]  # [1, H, K, 1]
        entries = [
            cache.gather(2, rows.expand(-1, -1, -1, 32))
            for cache in (full.layers[index].keys, full.layers[index].values)
        ]
        compressed.update(*entries, index)
        if index in rows_after:
            hidden, positions = hidden[:, torch.isin(positions, rows_after[index])], rows_after[index]
    return model.lm_head(model.model.norm(hidden[0, -1])), compressed


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "h3o"}, "method must be"),
        ({"method": "h2o"}, "decay goes with h2o or a2sf"),
        ({"pooling": "min"}, "pooling must be"),
        ({"kernel_size": 4}, "must be odd"),
        ({"cuts": ((3, 90), (3, 80))}, "must rise"),
        ({"cuts": ((3, 80), (4, 90))}, "must rise and their rows must not"),
        ({"method": "streamingllm", "cuts": ((3, 9),)}, "cuts need a method with scores"),
    ],
)
def test_drop_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drop(**({"method": "fastkv", "num_kept": 9, "forced_from": 9} | settings))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (Drop("snapkv", NUM_KEPT, NUM_TOKENS - 7), "cover the window"),
        (
            Drop("fastkv", NUM_KEPT, FORCED_FROM, cuts=((3, NUM_TSP), (8, NUM_TSP))),
            r"layers of cuts must be in \[0, 8\)",
        ),
    ],
)
def test_generate_refuses(drop: Drop, message: str, llama: ReferenceModel, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generate(prompt, 1, drop)


def test_checkpoint_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family must be one of llama"):
        make_checkpoint(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="num_heads \\* head_dim == hidden_size"):
        make_checkpoint(tmp_path, "phi3", head_dim=64)


def test_reference_imports_neither_side_of_what_it_judges() -> None:
    for file in (Path(__file__).parent / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            assert not {name.split(".")[0] for name in names} & {"vllm", "fastkv_vllm"}, file.name


def test_recalls_by_hand() -> None:
    """A head whose best entry is not the one looked at, and one where it is; the tail of one stays."""
    drop = Drop("snapkv", 3, 2, window_size=1, num_sink=0, block_size=1, min_recall=0.7, num_planned=2)
    scores, votes = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0, 1.0], [1.0, 6.0, 1.0]])
    recalls = recalls_by_pages(drop, [scores], [torch.arange(3)], [votes])
    assert recalls == pytest.approx([(0.5 + 7 / 8) / 2, 1.0])
    assert [guard(replace(drop, min_recall=floor), recalls) for floor in (0.5, 0.7)] == [2, 3]
    assert guard(replace(drop, num_kept=2), recalls[:1]) == 2, "not enough, and no more may stay"


def test_losses_of_the_halting_rule_by_hand() -> None:
    """Two query heads, two entries and a tail of one: norms 3, 5 (3 and 4), 13 (with 12), and thrice 5."""
    drop = Drop("dbudgetkv", 2, 2, num_sink=0, block_size=2, halting_loss=0.5)
    attention = torch.tensor([[12.0, 4.0, 3.0], [0.0, 0.0, 5.0]])
    losses = losses_by_count(drop, torch.tensor([[0.0, 1.0, 2.0]]), torch.arange(3), attention, tail_from=2)
    assert losses == pytest.approx([1 - (3 + 5) / 18, 1 - (5 + 5) / 18, 0.0])
