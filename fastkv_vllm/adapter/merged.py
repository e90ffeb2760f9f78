"""Kept entries of neighbouring layers stored as one: where they lie, and how they come back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastkv_vllm.adapter.encoded import EncodedPages, stored_pages
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import PairCodec


@dataclass(frozen=True)
class MergedPages:
    """Where the entries of one compressed prompt lie some of whose layers are merged in pairs.

    The lower layer of a pair holds the records of both, the upper one its own retained entries.

    Fields:
        num_whole: whole blocks of the prompt.
        counts: pages that attention sees of each layer and head, once restored, [L, H] int64, all equal.
        stored: pages that hold them.
        codec: of records.
        upper: lower layer of each pair -> its upper layer.
    """

    num_whole: int
    counts: torch.Tensor
    stored: HeadPages
    codec: PairCodec
    upper: dict[int, int]

    @classmethod
    def share(
        cls, plan: PromptPlan, counts: torch.Tensor, codec: PairCodec, pool: PagePool, destination: Sequence[int]
    ) -> "MergedPages":
        """Give each layer and head what it needs of the destination blocks, see `HeadPages.share`."""
        stored = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, destination)
        upper = {owner: layer for layer, owner in enumerate(plan.layer_owners) if owner != layer}
        return cls(plan.num_whole_blocks, counts, stored, codec, upper)

    def places(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each record of a pair's lower layer, [H, N] int64 each."""
        per_page = records(pool, self.codec).shape[1]
        number = torch.arange(int(self.counts[layer, 0]) * pool.layout.block_size)
        return self.stored.pages[layer][:, number // per_page], (number % per_page).expand(pool.num_heads, -1)

    def decode(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, head after head, [entries, D] each."""
        for lower, upper in self.upper.items():
            if layer in (lower, upper):
                restored = self.codec.restore(
                    records(pool, self.codec)[self.places(lower, pool)], self._own(upper, pool)
                )
                return tuple(restored[int(layer == upper)].transpose(0, 1).flatten(1, 2))
        return pool.layout.take(pool.cache, *_entries(pool, self.stored.pages[layer], int(self.counts[layer, 0])))

    def num_retained(self, upper: int, pool: PagePool) -> int:
        """Entries of a head that the pages of a pair's upper layer have room for."""
        return int(self.stored.counts[upper, 0]) * pool.layout.block_size

    def _own(self, upper: int, pool: PagePool) -> torch.Tensor:
        """What the pages of a pair's upper layer hold, [H, 2, num_retained, D]."""
        num_pages = int(self.stored.counts[upper, 0])
        entries = pool.layout.take(pool.cache, *_entries(pool, self.stored.pages[upper], num_pages))
        return torch.stack(entries, dim=1).unflatten(0, (pool.num_heads, -1)).transpose(1, 2)


Held = HeadPages | EncodedPages | MergedPages


def records(pool: PagePool, codec: PairCodec) -> torch.Tensor:
    """The pool as places of records, [pages, records of a page, width]; a view."""
    pages = pool.cache.flatten(1)
    width = codec.width(pool.layout.head_dim)
    per_page = pages.shape[1] // width
    return pages.as_strided((pages.shape[0], per_page, width), (pages.shape[1], width, 1))


def _entries(pool: PagePool, pages: torch.Tensor, num_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset of the entries in the first pages of each head, [H, most] -> [H * entries] each."""
    size = pool.layout.block_size
    offsets = torch.arange(size).repeat(pool.num_heads * num_pages)
    return pages[:, :num_pages].flatten().repeat_interleave(size), offsets
