"""What an engine must give: generations of the reference model, each computed once per session."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.reference.budgets
import tests.reference.codecs
import tests.reference.merging
import tests.reference.model
import tests.reference.revival
import tests.reference.selection
from fastkv_vllm.cache import LeftAlone, PromptPlan
from fastkv_vllm.codecs import EntryShape
from fastkv_vllm.config import CompressionConfig
from tests.reference import Drop, Generation, ReferenceModel
from tests.reference.images import num_after_image

BLOCK_SIZE = 32
COARSE = ("int2", "kivi2", "skvq")  # codecs of two bits or less
KV_CACHE = ("auto", 1.0, 1.0)  # of the reference, with its scales; a test that serves another kind sets it
ENTRY = EntryShape(head_dim=32, dtype=torch.float32)  # of the checkpoints that codecs are tested on


def make_prompts(lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts without special tokens."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(4, 500) for _ in range(length)) for length in lengths]


def plan_of(config: CompressionConfig | None, num_tokens: int, num_after_image: int = 0) -> PromptPlan | LeftAlone:
    return LeftAlone.SHORT if config is None else config.plan(num_tokens, BLOCK_SIZE, num_after_image, ENTRY)


def drop_of(config: CompressionConfig | None, num_tokens: int, num_after_image: int = 0) -> Drop | None:
    """What the reference must drop where `config` compresses; None where the prompt is left alone."""
    plan = plan_of(config, num_tokens, num_after_image)
    if isinstance(plan, LeftAlone):
        return None
    return Drop(
        method=config.method,
        num_kept=plan.num_kept,
        forced_from=plan.forced_from,
        window_size=plan.window_size,
        num_voters=plan.num_voters,
        kernel_size=config.kernel_size,
        pooling=config.pooling,
        num_sink=config.num_sink,
        cuts=plan.cuts,
        rank_variance=config.rank_variance,
        min_tsp_layer=config.min_tsp_layer,
        block_size=BLOCK_SIZE if plan.is_ragged else None,
        layer_budgets=config.layer_budgets,
        head_budgets=config.head_budgets,
        pyramid_beta=config.pyramid_beta,
        head_floor=config.head_floor,
        head_beta=config.head_beta,
        streaming_tokens=config.streaming_tokens,
        head_weights=config.head_weights,
        decay=config.decay,
        value_norms=config.value_norms,
        halting_loss=config.halting_loss,
        min_recall=config.min_attention_recall,
        num_planned=None if plan.planned_pages is None else plan.planned_pages * BLOCK_SIZE + plan.num_tail,
        period=BLOCK_SIZE if plan.evicts else None,
        num_recent=plan.num_recent,
        stream_period=None if plan.streaming is None else plan.streaming.period * BLOCK_SIZE,
        codec=None if config.codec == "none" else config.codec,
        encoded_to=None if config.codec == "none" else plan.num_whole_blocks * BLOCK_SIZE,
        num_channels=_stored_channels(config.channel_ratio),
        num_value_channels=_stored_channels(config.value_channel_ratio),
        num_exact=config.num_sink if config.codec == "skvq" else 0,
        channel_groups=config.channel_groups if config.codec == "skvq" and config.channel_groups != "none" else None,
        encode_after=BLOCK_SIZE if plan.encodes else None,
        residual=plan.residual if plan.encodes else 0,
        layer_owners=plan.layer_owners,
        merge=None
        if plan.pair_entries is None
        else (config.merge_t, config.merge_gamma, config.merge_layers == "values"),
    )


def _stored_channels(share: float | None) -> int | None:
    """Channels that a codec stores of a share of them; None: all."""
    return None if share in (None, 1) else 8 * ceil(share * ENTRY.head_dim / 8)


def kept_entries(plan: PromptPlan, generation: Generation) -> int:
    """Entries that the reference has kept, mean over layers and heads, up to whole pages, and the tail."""
    heads = [len(head) - plan.num_tail for layer in generation.kept for head in layer]
    return -(-sum(heads) // (plan.block_size * len(heads))) * plan.block_size + plan.num_tail


def freed_blocks(plan: PromptPlan, generation: Generation, num_ranks: int = 1) -> int:
    """Blocks that a prompt gives back whose pages are shared as the reference has kept entries.

    Ranks hold the heads in order, equally many; the one with the most pages decides.
    """
    awaited = plan.num_tail // plan.block_size * plan.block_size if plan.encodes else 0
    num_heads, needed = len(generation.kept[0]) // num_ranks, []
    for first in range(0, num_ranks * num_heads, num_heads):
        layers = [layer[first : first + num_heads] for layer in generation.kept]
        heads = [len(head) - plan.num_tail for layer in layers for head in layer]
        pages = sum(
            -(-(plan.sink_places + entries + awaited) // (plan.page_entries or plan.block_size)) for entries in heads
        )
        if plan.layer_owners:
            by_layer = [plan.pages_of_layers(entries // plan.block_size) for entries in heads]
            pages = sum(held[number // num_heads] for number, held in enumerate(by_layer))
        needed.append(-(-pages // len(heads)))
    return plan.num_whole_blocks - max(needed)


def blocks_filled(num_context: int, num_tokens: int) -> int:
    """Blocks filled after the context by a text of so many tokens, the last of which is not computed."""
    return (num_tokens - 1) // BLOCK_SIZE - num_context // BLOCK_SIZE


def code_blocks(plan: PromptPlan, num_encoded: int) -> int:
    """Blocks with the codes of a text whose first num_encoded blocks are encoded, and its prompt's whole ones soon."""
    later = max(num_encoded, plan.num_tokens // BLOCK_SIZE) - plan.num_whole_blocks
    return -(-(plan.sink_places + plan.num_moved + later * BLOCK_SIZE) // plan.page_entries)


def blocks_encoded(plan: PromptPlan, num_tokens: int) -> int:
    """Blocks given back by a text of so many tokens, the last of which is not computed, since its prompt ended."""
    num_encoded = (num_tokens - 1 - plan.residual) // BLOCK_SIZE
    before = code_blocks(plan, plan.num_whole_blocks)
    return num_encoded - plan.num_whole_blocks - (code_blocks(plan, num_encoded) - before)


def reference(
    checkpoint: Path,
    config: CompressionConfig | None,
    prompt: tuple[int, ...],
    max_tokens: int,
    num_context: int | None = None,
) -> Generation:
    """Greedy generation of the reference model that drops what `config` drops, after `num_context` prompt tokens."""
    end = num_context or len(prompt)
    drop = drop_of(config, end, num_after_image(prompt[:end]))
    # As far as it is clear, since mostly it is, and has been made to know that.
    generation, _ = _generate(checkpoint, prompt, max_tokens, drop, end, KV_CACHE, 2.5 * tolerance(config))
    if len(generation.tokens) == max_tokens:
        return generation
    return _generate(checkpoint, prompt, max_tokens, drop, end, KV_CACHE)[0]


def clear(
    checkpoint: Path,
    config: CompressionConfig | None,
    prompt: tuple[int, ...],
    max_tokens: int,
    num_context: int | None = None,
) -> tuple[int, ...]:
    """The prompt, its context with another last token where float32 noise could decide which entry or token is chosen.

    Two ways to add the same numbers differ by up to 1e-5 of a score in late layers; another machine adds in another
    order. Exact ties are clear: the lower position wins on both sides.
    """
    end = num_context or len(prompt)
    while not is_clear(checkpoint, config, prompt, max_tokens, end):
        prompt = (*prompt[: end - 1], 4 + (prompt[end - 1] - 3) % 496, *prompt[end:])
    return prompt


def most_off(config: CompressionConfig | None) -> float:
    """Most that float noise moves the logprob of one token of an answer; those of the others are within `tolerance`.

    A token may hang on a code that noise decides: with skvq's one was off by 0.09 where the CPU has AVX2 alone, the
    others by 2e-3 or less.
    """
    return tolerance(config) * (10 if config is not None and config.codec in COARSE else 1)


def tolerance(config: CompressionConfig | None) -> float:
    """Most that float noise moves a logprob, but for a single one of COARSE codecs.

    Two ways to add float32 numbers differ by 2e-5 here; one missing or misplaced row moves a logprob by more than 1e-2.
    With a codec such noise decides between two codes now and then: keys and values off by 2e-6 of themselves moved the
    reference's own logprobs by up to 6e-3, once by 2e-2 with codes of two bits; another codec by more than 0.5. Where
    what is generated is encoded, later codes differ because earlier ones do: twice as much.
    """
    if config is None or config.codec in ("none", "exact"):
        return 2e-4
    return (2e-2 if config.codec in COARSE else 1e-2) * (2 if config.encode_generated else 1)


def is_clear(
    checkpoint: Path, config: CompressionConfig | None, prompt: tuple[int, ...], max_tokens: int, num_context: int
) -> bool:
    """Whether float noise decides nothing about the answer."""
    drop = drop_of(config, num_context, num_after_image(prompt[:num_context]))
    least = 2.5 * tolerance(config)
    generation, smallest_gap = _generate(checkpoint, prompt, max_tokens, drop, num_context, KV_CACHE, least)
    return smallest_gap > 3e-5 and min(generation.margins) >= least


def makes_equals(drop: Drop) -> bool:
    """Whether equal scores come of the rule, by a maximum of neighbours, and not of rounding, which noise undoes."""
    own_votes = drop.decay is not None or drop.method in ("pyramidinfer", "vl_cache", "tova", "lazyllm", "gemfilter")
    return drop.has_scores and drop.pooling == "max" and not own_votes


@cache
def _model(checkpoint: Path, kv_cache: tuple[str, float, float]) -> ReferenceModel:
    return ReferenceModel(checkpoint, kv_cache)


@cache
def _generate(
    checkpoint: Path,
    prompt: tuple[int, ...],
    max_tokens: int,
    drop: Drop | None,
    num_context: int,
    kv_cache: tuple[str, float, float],
    least_margin: float = -1.0,
) -> tuple[Generation, float]:
    """Generation up to the least margin, and the smallest relative distance of a score from one chosen otherwise.

    Or between a loss and the halting rule's limit, in shares of the norm, or a recall and its floor. 0 where float
    noise decides which of two numbers the cache has.
    """
    gaps = [1.0]
    select, best_by_head = tests.reference.model.select_positions, tests.reference.budgets.best_by_head
    losses_by_count = tests.reference.budgets.losses_by_count
    recalls_by_pages = tests.reference.budgets.recalls_by_pages
    relative_variance = tests.reference.selection.relative_variance
    codecs = tests.reference.codecs
    cached = ReferenceModel._cached
    retained = tests.reference.merging.retained
    by_density, hand_out = tests.reference.budgets.by_density, tests.reference.budgets.hand_out
    wishes: list[list[float]] = []  # of layers by density

    def select_and_measure(scores: Sequence[float], positions: Sequence[int], count: int, drop: Drop) -> list[int]:
        chosen = select(scores, positions, count, drop)
        kept = set(chosen)
        rated = [(p, s) for p, s in zip(positions, scores, strict=False) if not drop.is_forced(p)]
        inside, outside = [s for p, s in rated if p in kept], [s for p, s in rated if p not in kept]
        if inside and outside:
            last = min(inside)
            # Pooling makes equal neighbours: where some equals of the last go, one above it may trade places, too.
            rivals = outside if last > max(outside) else [*inside, *outside]
            # Neither pooled nor summed over many rows, a score hangs on single logits.
            noise = 5 if drop.method == "vl_cache" else 1
            gaps.extend(abs(last - score) / abs(last) / noise for score in rivals if score != last)
            if last == max(outside) and not makes_equals(drop):
                gaps.append(0.0)
        return chosen

    def count_and_measure(
        drop: Drop, scores: Tensor, positions: Sequence[int], count: int, tail_from: int
    ) -> list[int]:
        rated = [i for i, p in enumerate(positions) if p < tail_from and not drop.is_forced(p)]
        num_forced = sum(p < tail_from for p in positions) - len(rated)
        ordered = scores[:, rated].flatten().sort(descending=True).values
        last = ordered[count - num_forced * scores.shape[0] - 1]
        # Pooling makes equal neighbours: heads change places by whole groups, so the groups must be apart.
        others = ordered[ordered != last]
        gaps.append(float(((others - last).abs() / last).min()))
        if len(ordered) - len(others) > 1 and not makes_equals(drop):
            gaps.append(0.0)
        return best_by_head(drop, scores, positions, count, tail_from)

    def lose_and_measure(drop: Drop, *layer: Any) -> list[float]:
        losses = losses_by_count(drop, *layer)
        # Lengths are rounded up to whole pages: losses between two of them decide nothing.
        gaps.extend(abs(loss - drop.halting_loss) for loss in losses[drop.block_size :: drop.block_size])
        return losses

    def recall_and_measure(drop: Drop, *layers: Any) -> list[float]:
        recalls = recalls_by_pages(drop, *layers)
        # Where noise swaps two entries of a head, the mean moves by less than one gets of the attention, a thousandth.
        gaps.extend(abs(recall - drop.min_recall) / 10 for recall in recalls)
        return recalls

    def wish_and_remember(*args: Any) -> list[float]:
        wishes.append(by_density(*args))
        return wishes[-1]

    def hand_out_and_measure(wanted: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
        pages = hand_out(wanted, total, low, high)
        if any(wanted is wished for wished in wishes):
            owners = list(zip(wanted, pages, low, high, strict=True))
            given = [wish - (n - 1) for wish, n, least, _ in owners if n > least]
            refused = [wish - n for wish, n, _, most in owners if n < most]
            # An entry at the threshold of density moves a wish by some thousandths of a page.
            gaps.append((min(given) - max(refused)) / 100 if given and refused else 1.0)
        return pages

    def measuring(parts_of: Callable[..., list[float]], num_stored: str) -> Callable[..., list[float]]:
        def part_and_measure(*args: Any) -> list[float]:
            parts, count = parts_of(*args), getattr(drop, num_stored)
            last, first_out = sorted(parts, reverse=True)[count - 1 : count + 1]
            gaps.append((last - first_out) / last)
            return parts

        return part_and_measure

    def cut_and_measure(model: ReferenceModel, x: Tensor, scale: float) -> Tensor:
        if model.float8 is not None:
            noise = 1e-6 * x.abs().mean()
            gaps.append(float(torch.equal(cached(model, x + noise, scale), cached(model, x - noise, scale))))
        return cached(model, x, scale)

    def retain_and_measure(distances: dict[int, list[float]], gamma: float, most: int) -> set[int]:
        farthest = sorted((max(of) for of in zip(*distances.values(), strict=True)), reverse=True)
        for of_half in distances.values():
            limit = max(of_half) + (min(of_half) - max(of_half)) * gamma
            gaps.extend(abs(d - limit) * 30 for d in of_half)  # an angle's noise is some 1e-7 of a half turn
        gaps.append((farthest[most - 1] - farthest[most]) * 30 if 0 < most < len(farthest) else 1.0)
        return retained(distances, gamma, most)

    def vary_and_measure(drop: Drop, *ratings: Any) -> float:
        left = relative_variance(drop, *ratings)
        gaps.append(abs(left - drop.rank_variance) / 10)  # noise swaps a few equal ranks: a thousandth is far away
        return left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tests.reference.selection, "relative_variance", vary_and_measure)
        for name, count in (("channel_parts", "num_channels"), ("value_channel_parts", "num_value_channels")):
            patch.setattr(codecs, name, measuring(getattr(codecs, name), count))
        patch.setattr(ReferenceModel, "_cached", cut_and_measure)
        patch.setattr(tests.reference.merging, "retained", retain_and_measure)
        patch.setattr(tests.reference.budgets, "by_density", wish_and_remember)
        patch.setattr(tests.reference.budgets, "hand_out", hand_out_and_measure)
        patch.setattr(tests.reference.model, "select_positions", select_and_measure)
        patch.setattr(tests.reference.revival, "select_positions", select_and_measure)
        patch.setattr(tests.reference.budgets, "best_by_head", count_and_measure)
        patch.setattr(tests.reference.budgets, "losses_by_count", lose_and_measure)
        patch.setattr(tests.reference.budgets, "recalls_by_pages", recall_and_measure)
        return _model(checkpoint, kv_cache).generate(prompt, max_tokens, drop, num_context, least_margin), min(gaps)
