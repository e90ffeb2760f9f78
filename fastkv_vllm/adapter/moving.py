"""Entries on their way to the pages that they stay in: copies of them, and where they are written.

Sources are copied when a move is made, destinations are written when it is carried out: all moves of a step are made
before the first is carried out, since a destination may be the source of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastkv_vllm.adapter.batch import LayerRows, PrefillRows
from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.codecs import ExactCodec


class Move(Protocol):
    """Copies, and where they go."""

    def carry_out(self) -> None: ...


@dataclass(frozen=True)
class EntryMove:
    """Entries as they are.

    Fields:
        layout: of pages.
        cache: [num_blocks, H, block_size, 2 * D]; changed in place.
        keys, values: [K, H, D].
        slots: where they go, [K] int64.
    """

    layout: PageLayout
    cache: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor

    def carry_out(self) -> None:
        self.layout.write(self.cache, self.keys, self.values, self.slots)


@dataclass(frozen=True)
class Overwrite:
    """Whole pages, or groups of encoded entries.

    Fields:
        target: what is changed in place.
        index: where, [n] int64 each.
        data: what is written there, [n, ..].
    """

    target: torch.Tensor
    index: tuple[torch.Tensor, ...]
    data: torch.Tensor

    def carry_out(self) -> None:
        self.target[self.index] = self.data


def pages_read(prefill: PrefillRows, pool: PagePool, num_whole: int) -> HeadPages:
    """All pages that hold entries of the prompt's first blocks, before what this step moves."""
    if prefill.held is None:
        return HeadPages.whole(pool, prefill.blocks[:num_whole])
    return prefill.held.with_blocks(pool, prefill.blocks[prefill.held.num_whole : num_whole])


def even_move(prefill: PrefillRows, kept: torch.Tensor, rows: LayerRows) -> EntryMove:
    """The kept entries of a layer to the blocks that stay, as many of each head.

    Args:
        prefill: the prompt, which ends.
        kept: columns that stay before the tail, [H, K].
        rows: of the layer.
    """
    plan, layout, kv_cache = prefill.plan, rows.layout, rows.kv_cache
    offsets = torch.arange(plan.block_size)
    slots = (torch.tensor(prefill.destination).unsqueeze(1) * plan.block_size + offsets).flatten()
    if prefill.positions is not None and plan.num_tail:
        # The chosen rows were cached densely; the tail's true slots are still empty in this layer.
        tail = prefill.blocks[-1] * plan.block_size + offsets[: plan.num_tail]
        slots = torch.cat([slots, tail])
        columns = torch.arange(prefill.count - plan.num_tail, prefill.count)
        kept = torch.cat([kept, columns.expand(len(kept), -1)], dim=1)
    if prefill.start or layout.float8 is not None:
        return EntryMove(layout, kv_cache, *layout.gather(kv_cache, prefill.blocks, kept), slots)
    key, value = rows.key[prefill.rows], rows.value[prefill.rows]
    index = kept.T.unsqueeze(-1).expand(-1, -1, key.shape[-1])
    return EntryMove(layout, kv_cache, key.gather(0, index), value.gather(0, index), slots)


def uneven_moves(
    prefill: PrefillRows,
    pool: PagePool,
    held: Held,
    kept: Sequence[torch.Tensor],
    num_seen: Sequence[int],
    by_block: torch.Tensor | None,
    voters: Sequence[torch.Tensor],
) -> list[Move]:
    """The kept entries of all layers to the pages that hold them from now on, and tails to their slots.

    Args:
        prefill: the prompt, which ends.
        pool: of the engine.
        held: where entries stay.
        kept: of each layer, columns that stay before the tail, head after head.
        num_seen: of each layer, columns before the tail.
        by_block: page of each block of each layer and head, [L, H, blocks]; None: its own.
        voters: of each layer, queries of the voters, [W, Hq, D], where not all channels are stored.
    """
    plan, moves = prefill.plan, list[Move]()

    def of_layer(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        entries = kept[layer]
        heads = torch.arange(pool.num_heads).repeat_interleave(held.counts[layer] * plan.block_size)
        if by_block is None:
            pages = pool.first[layer] + prefill.blocks[entries // plan.block_size] * pool.num_heads + heads
        else:
            pages = by_block[layer, heads, entries // plan.block_size]
        return pool.layout.take(pool.cache, pages, entries % plan.block_size)

    for layer in range(len(kept)):
        if plan.layer_owners and plan.layer_owners[layer] != layer:
            continue  # nobody reads its entries, or they are merged with its owner's
        keys, values = of_layer(layer)
        if isinstance(held, MergedPages):
            moves += _merge(
                held, pool, layer, (keys, values), of_layer(held.upper[layer]) if layer in held.upper else None
            )
        elif isinstance(held, EncodedPages):
            if held.drops_channels:
                held.choose_channels(layer, voters[layer], keys, values)
            codes = held.encode(keys, values, held.heads_of(layer, plan.block_size))
            moves.append(Overwrite(held.grid(pool), held.places(layer, pool), codes))
            if held.num_exact:  # after their codes, in whose places they lie
                sinks = held.sinks_of(layer, plan.block_size)
                data = ExactCodec().encode(keys[sinks], values[sinks]).unflatten(0, (-1, held.num_exact)).flatten(1)
                moves.append(Overwrite(*held.sink_bytes(layer, pool), data))
        else:
            slots = held.slots(layer, plan.block_size)
            moves.append(EntryMove(pool.layout, pool.cache, keys.unsqueeze(1), values.unsqueeze(1), slots))
        if num_seen[layer] + plan.num_tail < plan.num_tokens and plan.num_tail:
            moves.append(_tail_move(prefill, pool, layer, num_seen[layer]))
    return moves


def encoding_move(held: EncodedPages, pool: PagePool, block: int) -> Overwrite:
    """The entries of a block, the last that is encoded, to the places of their codes."""
    pages = pool.pages(torch.tensor([block])).flatten()
    num_entries = len(pages) * pool.layout.block_size
    keys, values = (
        read(pool.cache, pages, num_entries)[0] for read in (pool.layout.read_keys, pool.layout.read_values)
    )
    heads = torch.arange(len(pages)).repeat_interleave(pool.layout.block_size)
    codes = held.encode(keys, values, heads).unflatten(0, (*held.counts.shape, -1))  # [L, H, groups, B]
    return Overwrite(held.grid(pool), held.last_places(pool), codes)


def _merge(
    held: MergedPages,
    pool: PagePool,
    layer: int,
    own: tuple[torch.Tensor, torch.Tensor],
    above: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[Move]:
    """A layer's entries to its pages: by themselves, or as records together with those of the layer above.

    Args:
        held: where they go.
        pool: of the engine.
        layer: not the upper one of a pair.
        own, above: keys and values head after head, [H * N, D] each.
    """
    places, vectors = held.places(layer, pool), held.codec.vectors
    if above is None:
        codes = vectors.encode(*own).unflatten(0, places[0].shape)
        return [Overwrite(held.grid(layer, pool), places, codes)]
    lower, upper = (torch.stack(pair).unflatten(1, (pool.num_heads, -1)).transpose(0, 1) for pair in (own, above))
    records, retained = held.codec.merge(lower, upper, held.num_retained)
    moves: list[Move] = [Overwrite(held.grid(layer, pool), places, records)]
    if retained.any():
        heads, entries = retained.nonzero(as_tuple=True)
        number = (retained.cumsum(dim=1) - 1)[retained]
        keys, values = upper[heads, :, entries].unbind(dim=1)
        pages, offsets = held.places(held.upper[layer], pool)
        index = pages[heads, number], offsets[heads, number]
        moves.append(Overwrite(held.grid(held.upper[layer], pool), index, vectors.encode(keys, values)))
    return moves


def _tail_move(prefill: PrefillRows, pool: PagePool, layer: int, num_seen: int) -> EntryMove:
    """Rows chosen at a cut were cached densely, `num_seen` before the tail: its true slots are still empty here."""
    plan = prefill.plan
    size, tail = plan.block_size, torch.arange(plan.num_tail)
    rows = num_seen + tail
    pages = pool.pages(prefill.blocks[rows // size])[layer]  # [H, tail]
    keys, values = pool.layout.take(pool.cache, pages.flatten(), (rows % size).repeat(pool.num_heads))
    own = pool.pages(prefill.blocks[plan.num_whole_blocks :])[layer]  # [H, blocks]
    slots = own[:, tail // size] * size + tail % size
    return EntryMove(pool.layout, pool.cache, keys.unsqueeze(1), values.unsqueeze(1), slots.flatten())
