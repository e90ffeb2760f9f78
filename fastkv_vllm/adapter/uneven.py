"""Prompts whose layers and KV heads share pages unevenly, or whose entries are not stored as they are.

Such pages cross layers and heads: what each layer tells is held until all have run, then the pages are shared at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from fastkv_vllm.adapter.batch import LayerRows, PrefillRows
from fastkv_vllm.adapter.encoded import EncodedPages, stored_pages
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.moving import Move, pages_read, uneven_moves
from fastkv_vllm.adapter.ragged import HeadPages, PagePool, SharedPages, blocks_for
from fastkv_vllm.adapter.ranks import mean_recall, rank_of, shared_pages
from fastkv_vllm.adapter.step import WorkerStats
from fastkv_vllm.codecs import Codec
from fastkv_vllm.kernels.select import select_ragged
from fastkv_vllm.methods import (
    DENSITY,
    attention_mass,
    density,
    guarded_pages,
    halting_pages,
    kept_norms,
    last_attention,
    recall_by_pages,
)


@dataclass(frozen=True)
class Shared:
    """What such a prompt comes to.

    Fields:
        held: its pages.
        counts: pages of entries that attention sees of each layer and head, [L, H] int64, but for layers with an owner.
        kept: columns of each layer that stay before the tail, head after head.
        moves: of the entries to their pages.
    """

    held: Held
    counts: torch.Tensor
    kept: Sequence[torch.Tensor]
    moves: Sequence[Move]


@dataclass
class UnevenPrompt:
    """What the layers have told of one prompt in the step that it ends in.

    Fields, of each layer in order:
        prefills: the rows that it ran on.
        scores: of its entries before the tail, forced ones at +inf, [H or 1, n].
        voters: queries of the voters, [W, Hq, D], where channels are dropped.
        densities: density added over all heads, where layers share by it.
        most: most pages by the halting rule, where there is one.
        recalls: attention recall by pages, where there is a guard.
    """

    prefills: list[PrefillRows] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    voters: list[torch.Tensor] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    recalls: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, prefill: PrefillRows, rows: LayerRows, inputs: Mapping[str, torch.Tensor], scores: torch.Tensor
    ) -> None:
        """Take down a layer, in order.

        Args:
            prefill: the prompt's rows in it.
            rows: of all requests.
            inputs: see `Votes.inputs`.
            scores: see `scores`.
        """
        plan, config = prefill.plan, prefill.recipe.config
        self.prefills.append(prefill)
        self.scores.append(scores)
        if config.drops_channels:
            self.voters.append(inputs["voters"])
        if config.layer_budgets == DENSITY:
            of_heads = density(inputs["queries"], inputs["keys"]).sum(dim=0, keepdim=True)
            self.densities.append(float(tensor_model_parallel_all_reduce(of_heads)))
        if config.halting_loss is not None:
            self.most.append(_halting_pages(prefill, rows, scores, config.halting_loss))
        if plan.planned_pages is not None:
            mass = attention_mass(inputs["queries"], inputs["keys"])
            self.recalls.append(recall_by_pages(scores, mass, plan.block_size))

    def follow(self, owner: int) -> None:
        """Take down a layer, in order, that has the entries of an earlier one."""
        self.prefills.append(self.prefills[owner])
        self.scores.append(self.scores[owner])

    def share(self, prefill: PrefillRows, pool: PagePool, codecs: Mapping[str, Codec], stats: WorkerStats) -> Shared:
        """Pages for every layer and head, and copies of what goes there.

        Args:
            prefill: the prompt's rows in the whole step.
            pool: of the engine.
            codecs: by name, with what was measured of this rank's heads.
            stats: of the step.
        """
        plan, scores = prefill.plan, self.scores
        with stats.timed("select_us"):
            by_block = _pages_by_block(prefill, pool)
            if by_block is not None:
                gone = (by_block < 0).repeat_interleave(plan.block_size, dim=2)
                scores = [of.masked_fill(layer, -float("inf")) for of, layer in zip(scores, gone, strict=True)]
            counts = self._counts(prefill, scores, pool, stats)
            held = _hold(prefill, counts, pool, codecs)
            kept: list[torch.Tensor] = []
            for layer, owner in enumerate(plan.layer_owners or range(len(scores))):
                num_kept = counts[layer] * plan.block_size
                own = owner == layer
                kept.append(select_ragged(scores[layer].expand(pool.num_heads, -1), num_kept) if own else kept[owner])
        with stats.timed("compact_us"):
            num_seen = [layer.shape[1] for layer in scores]
            moves = uneven_moves(prefill, pool, held, kept, num_seen, by_block, self.voters)
        return Shared(held, counts, kept, moves)

    def _counts(
        self, prefill: PrefillRows, scores: Sequence[torch.Tensor], pool: PagePool, stats: WorkerStats
    ) -> torch.Tensor:
        """Pages of entries of each layer and of this rank's heads, [L, H]; what the plan has too much is noted."""
        plan, most = prefill.plan, self.most or None
        assert prefill.destination is not None, "the prompt ends"
        if self.recalls:
            most = [self._guarded_pages(prefill, stats)] * len(scores)
        of_all = shared_pages(prefill, scores, pool.num_heads, self.densities, most)
        if blocks_for(of_all) < plan.num_pages:
            stats.fewer_pages[prefill.request_id] = blocks_for(of_all)
        by_rank = of_all.chunk(plan.num_ranks, dim=1)
        num_needed = max(blocks_for(stored_pages(plan, counts)) for counts in by_rank)
        stats.surplus[prefill.request_id] = len(prefill.destination) - num_needed
        return by_rank[rank_of(plan)]

    def _guarded_pages(self, prefill: PrefillRows, stats: WorkerStats) -> int:
        """Pages of each layer and head that the guard lets stay."""
        plan, floor = prefill.plan, prefill.recipe.config.min_attention_recall
        assert plan.planned_pages is not None and floor is not None, "asked by the caller"
        recall = mean_recall(self.recalls, plan.num_pages)
        pages = guarded_pages(recall, floor, plan.planned_pages)
        stats.recalls[prefill.request_id] = float(recall[plan.planned_pages - 1]), float(recall[pages - 1])
        return pages


def _halting_pages(prefill: PrefillRows, rows: LayerRows, scores: torch.Tensor, loss: float) -> int:
    """Pages of each head of a layer by the halting rule, from the prompt's last query.

    Norms are added over ranks, so that all of them need the same blocks.
    """
    attention = last_attention(rows.query[prefill.rows][-1] * rows.scale, rows.keys(prefill))
    norms = tensor_model_parallel_all_reduce(kept_norms(scores, attention, prefill.plan.block_size))
    return halting_pages(norms, loss, prefill.plan.least_pages)


def _pages_by_block(prefill: PrefillRows, pool: PagePool) -> torch.Tensor | None:
    """Page of each block of each layer and head, [L, H, blocks], -1 where it was let go; None: all have their own."""
    plan = prefill.plan
    if prefill.held is None:
        return None
    assert plan.streaming is not None, "only then does an unfinished prompt hold pages of its own"
    return pages_read(prefill, pool, plan.num_whole_blocks).by_block(plan.streaming.num_sink_pages)


def _hold(prefill: PrefillRows, counts: torch.Tensor, pool: PagePool, codecs: Mapping[str, Codec]) -> Held:
    """Give each layer and head what it needs of the destination blocks for so many pages of entries, [L, H]."""
    plan, config, destination = prefill.plan, prefill.recipe.config, prefill.destination
    assert destination is not None, "the prompt ends"
    if plan.pair_entries is not None:
        return MergedPages.share(plan, counts, config.pair_codec(), pool, destination)
    if plan.layer_owners:
        owned = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, destination)
        return SharedPages.of(owned, plan.layer_owners)
    if plan.page_entries is not None:
        assert config.codec is not None, "filled in by CompressionConfig"
        return EncodedPages.share(plan, counts, config, codecs[config.codec], pool, destination)
    return HeadPages.share(plan.num_whole_blocks, counts, pool, destination)
