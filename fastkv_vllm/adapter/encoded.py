"""Kept entries stored by a codec: where their bytes lie, and how attention reads them.

A page's bytes are the same however many entries they hold. Each (layer, head) of a request has pages of its own, full
of groups of encoded entries. Attention reads a copy of one layer at a time, decoded into pages of the engine's layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastkv_vllm.adapter.ragged import HeadPages, HeadReads, HeadRows, PagePool
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import Codec


@dataclass(frozen=True)
class EncodedPages:
    """Where the encoded entries of one compressed request lie.

    Fields:
        num_whole: whole blocks of the text that are encoded; those after them are not.
        counts: pages that attention sees of each layer and head, once decoded, [L, H] int64.
        stored: pages that hold the bytes.
        codec: how.
    """

    num_whole: int
    counts: torch.Tensor
    stored: HeadPages
    codec: Codec

    @classmethod
    def share(
        cls, plan: PromptPlan, counts: torch.Tensor, codec: Codec, pool: PagePool, destination: Sequence[int]
    ) -> "EncodedPages":
        """Give each layer and head what its encoded entries need of the destination blocks, see `HeadPages.share`."""
        stored = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, destination)
        return cls(plan.num_whole_blocks, counts, stored, codec)

    def places(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each group of a layer, head after head, [groups] int64 each."""
        per_page = grid(pool, self.codec).shape[1]
        of_heads = self.counts[layer] * (pool.layout.block_size // self.codec.group_size)
        heads = torch.arange(len(of_heads)).repeat_interleave(of_heads)
        number = torch.arange(len(heads)) - (of_heads.cumsum(0) - of_heads)[heads]
        return self.stored.pages[layer, heads, number // per_page], number % per_page

    def with_block(self, pool: PagePool, block: int, stays: bool) -> "EncodedPages":
        """The same with the block after those encoded so far, which may become a page of each layer and head."""
        stored = self.stored.with_blocks(pool, torch.tensor([block])) if stays else self.stored
        return replace(self, num_whole=self.num_whole + 1, counts=self.counts + 1, stored=stored)

    def last_places(self, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each group of the last block, [L, H, groups] int64 each."""
        per_page = grid(pool, self.codec).shape[1]
        groups = pool.layout.block_size // self.codec.group_size
        number = (self.counts.unsqueeze(-1) - 1) * groups + torch.arange(groups)
        return self.stored.pages.gather(2, number // per_page), number % per_page

    def erase(self, pool: PagePool) -> None:
        """Leave zeros; call before another request can have the pages.

        Codes may read as NaN, and the engine's attention multiplies what lies behind a sequence's end in its last block
        with zero.
        """
        taken = torch.arange(self.stored.pages.shape[2]) < self.stored.counts.unsqueeze(-1)
        pool.cache[self.stored.pages[taken]] = 0

    def decode(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, head after head, [entries, D] float32 each."""
        return self.codec.decode(grid(pool, self.codec)[self.places(layer, pool)], pool.layout.head_dim)


Held = HeadPages | EncodedPages


def stored_pages(plan: PromptPlan, counts: torch.Tensor) -> torch.Tensor:
    """Pages with room for the bytes of so many pages of entries of each layer and head, and those awaited, [L, H]."""
    if plan.layer_owners:
        owns = torch.tensor(plan.layer_owners) == torch.arange(len(counts))
        return counts * owns.unsqueeze(1)
    if plan.page_entries is None:
        return counts
    return -(-(counts * plan.block_size + plan.num_awaited) // plan.page_entries)


def grid(pool: PagePool, codec: Codec) -> torch.Tensor:
    """The pool's bytes as places of groups, [pages, groups of a page, B] uint8; a view."""
    pages = pool.cache.view(torch.uint8).flatten(1)
    num_bytes = codec.num_bytes(pool.layout.head_dim)
    per_page = pages.shape[1] // num_bytes
    return pages.as_strided((pages.shape[0], per_page, num_bytes), (pages.shape[1], num_bytes, 1))


class EncodedReads(HeadReads):
    """Reads of such requests, from a copy of each layer that lives while its attention runs.

    The copy has the decoded pages of all sequences, then the blocks that each has after them. It is as large as what
    these requests hold of one layer.
    """

    def __init__(self, rows: Sequence[HeadRows[EncodedPages]], pool: PagePool) -> None:
        self._held = [r.held for r in rows]
        counts = torch.cat([held.counts for held in self._held], dim=1)  # [L, S]
        later = torch.tensor([len(r.blocks) for r in rows]).repeat_interleave(pool.num_heads)  # [S]
        first = counts.cumsum(1) - counts
        self._num_decoded = counts.sum(dim=1)
        first_later = self._num_decoded.unsqueeze(1) + later.cumsum(0) - later
        place = torch.arange(int((counts + later).max()))
        is_decoded, number = place < counts.unsqueeze(-1), place - counts.unsqueeze(-1)
        tables = torch.where(is_decoded, first.unsqueeze(-1) + place, first_later.unsqueeze(-1) + number)
        tables.masked_fill_(number >= later.unsqueeze(-1), 0)
        super().__init__(rows, pool, tables.to(torch.int32))

    def cache(self, layer: int) -> torch.Tensor:
        pool, size = self.pool, self.pool.layout.block_size
        later = torch.cat([pool.pages(r.blocks)[layer].flatten() for r in self.rows])
        num_decoded = int(self._num_decoded[layer])
        copy = pool.cache.new_empty(num_decoded + len(later), *pool.cache.shape[1:])
        parts = zip(*(held.decode(layer, pool) for held in self._held), strict=True)
        keys, values = (torch.cat(part).to(copy.dtype).unsqueeze(1) for part in parts)
        pool.layout.write(copy, keys, values, torch.arange(num_decoded * size))
        copy[num_decoded:] = pool.cache[later]
        return copy
