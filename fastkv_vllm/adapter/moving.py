"""Entries on their way to the pages that they stay in.

All moves of a step are made before the first is carried out, since a destination may be the source of another. Entries
that stay as they are move first, all at once; what is stored otherwise was copied when its move was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastkv_vllm.adapter.batch import PrefillRows
from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.codecs import ExactCodec


@dataclass(frozen=True)
class EntryMove:
    """Entries as they are, of some (request, layer, KV head) sequences.

    Fields:
        sources: slots of the pool that they come from, page * block_size + offset, [M, block_size] int64; -1: what is
            there stays.
        pages: that they go to, [M] int64, sequence after sequence.
        counts: pages of each sequence, [S] int64.
    """

    sources: torch.Tensor
    pages: torch.Tensor
    counts: torch.Tensor


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


Move = EntryMove | Overwrite


def carry_out(moves: Sequence[Move], pool: PagePool) -> None:
    """Carry out all moves of a step, or of a layer."""
    of_entries = [move for move in moves if isinstance(move, EntryMove)]
    if of_entries:
        sources, pages, counts = (
            torch.cat([getattr(move, name) for move in of_entries]) for name in ("sources", "pages", "counts")
        )
        pool.layout.move(pool.cache, sources, pages, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    for move in moves:
        if isinstance(move, Overwrite):
            move.carry_out()


def pages_read(prefill: PrefillRows, pool: PagePool, num_whole: int) -> HeadPages:
    """All pages that hold entries of the prompt's first blocks, before what this step moves."""
    if prefill.held is None:
        return HeadPages.whole(pool, prefill.blocks[:num_whole])
    return prefill.held.with_blocks(pool, prefill.blocks[prefill.held.num_whole : num_whole])


def even_moves(prefill: PrefillRows, kept: torch.Tensor, layer: int, pool: PagePool) -> list[EntryMove]:
    """The kept entries of a layer to the blocks that stay, as many of each head, and a tail to its slots.

    Args:
        prefill: the prompt, which ends.
        kept: columns that stay before the tail, [H, K], K a multiple of the block size.
        layer: its index.
        pool: of the engine.
    """
    plan = prefill.plan
    pages = pool.pages(torch.tensor(prefill.destination), layer)  # [H, R]
    sources = slots_of(pool.pages(prefill.blocks, layer), kept, plan.block_size)
    counts = torch.full((pool.num_heads,), pages.shape[1])
    moves = [EntryMove(sources.view(-1, plan.block_size), pages.flatten(), counts)]
    if prefill.positions is not None and plan.num_tail:
        moves.append(_tail_move(prefill, pool, layer, prefill.count - plan.num_tail))
    return moves


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

    def sources(layer: int) -> torch.Tensor:
        """Slots of the layer's kept entries, head after head."""
        blocks = kept[layer] // plan.block_size
        heads = torch.arange(pool.num_heads).repeat_interleave(held.counts[layer] * plan.block_size)
        of_heads = pool.pages(prefill.blocks, layer) if by_block is None else by_block[layer]
        return of_heads[heads, blocks] * plan.block_size + kept[layer] % plan.block_size

    def of_layer(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = sources(layer)
        return pool.layout.take(pool.cache, slots // plan.block_size, slots % plan.block_size)

    for layer in range(len(kept)):
        if plan.layer_owners and plan.layer_owners[layer] != layer:
            continue  # nobody reads its entries, or they are merged with its owner's
        if isinstance(held, MergedPages):
            above = of_layer(held.upper[layer]) if layer in held.upper else None
            moves += _merge(held, pool, layer, of_layer(layer), above)
        elif isinstance(held, EncodedPages):
            keys, values = of_layer(layer)
            if held.drops_channels:
                held.choose_channels(layer, voters[layer], keys, values)
            codes = held.encode(keys, values, held.heads_of(layer, plan.block_size))
            moves.append(Overwrite(held.grid(pool), held.places(layer, pool), codes))
            if held.num_exact:  # after their codes, in whose places they lie
                sinks = held.sinks_of(layer, plan.block_size)
                data = ExactCodec().encode(keys[sinks], values[sinks]).unflatten(0, (-1, held.num_exact)).flatten(1)
                moves.append(Overwrite(*held.sink_bytes(layer, pool), data))
        else:
            moves.append(EntryMove(sources(layer).view(-1, plan.block_size), held.of_layer(layer), held.counts[layer]))
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
    held.num_own[held.upper[layer]] = retained.sum(dim=1)
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
    own = pool.pages(prefill.blocks[plan.num_whole_blocks :], layer)  # [H, blocks]
    rows = torch.arange(num_seen, num_seen + plan.num_tail).expand(pool.num_heads, -1)
    sources = slots_of(pool.pages(prefill.blocks, layer), rows, plan.block_size)
    padded = torch.nn.functional.pad(sources, (0, own.shape[1] * plan.block_size - plan.num_tail), value=-1)
    counts = torch.full((pool.num_heads,), own.shape[1])
    return EntryMove(padded.view(-1, plan.block_size), own.flatten(), counts)


def slots_of(pages: torch.Tensor, entries: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots of entries of heads whose pages are these in order, [H, B], [H, N] -> [H, N] int64."""
    return pages.gather(1, entries // block_size) * block_size + entries % block_size
