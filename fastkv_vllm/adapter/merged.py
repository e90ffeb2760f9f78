"""Kept entries of neighbouring layers stored as one: where they lie, and how they come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fastkv_vllm.adapter.encoded import EncodedPages, byte_places, erase_codes, stored_pages
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import EntryShape, PairCodec


@dataclass(frozen=True)
class MergedPages:
    """Where the entries of one compressed prompt lie some of whose layers are merged in pairs.

    The lower layer of a pair holds the records of both, the upper one its own retained entries.

    Fields:
        num_whole: whole blocks of the prompt.
        counts: pages that attention sees of each layer and head, once restored, [L, H] int64, all equal.
        stored: pages that hold them.
        codec: of records; that of their vectors stores all other entries.
        entry: what an entry is.
        upper: lower layer of each pair -> its upper layer.
        num_retained: entries of a head that the upper layer of a pair has room for.
        num_own: those it has, once they are stored, [L, H] int32.
    """

    num_whole: int
    counts: torch.Tensor
    stored: HeadPages
    codec: PairCodec
    entry: EntryShape
    upper: dict[int, int]
    num_retained: int
    num_own: torch.Tensor

    @cached_property
    def host_counts(self) -> torch.Tensor:
        return self.counts.cpu()

    @classmethod
    def share(
        cls, plan: PromptPlan, counts: torch.Tensor, codec: PairCodec, pool: PagePool, destination: Sequence[int]
    ) -> "MergedPages":
        """Give each layer and head what it needs of the destination blocks, see `HeadPages.share`."""
        stored = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, destination)
        upper = {owner: layer for layer, owner in enumerate(plan.layer_owners) if owner != layer}
        entry = EntryShape(pool.layout.head_dim, pool.cache.dtype)
        num_retained = plan.most_retained(int(counts[0, 0]))
        num_own = counts.new_zeros(counts.shape, dtype=torch.int32)
        return cls(plan.num_whole_blocks, counts, stored, codec, entry, upper, num_retained, num_own)

    def grid(self, layer: int, pool: PagePool) -> torch.Tensor:
        """The pool's bytes as places of what a layer stores, [pages, places of a page, B] uint8; a view."""
        codec = self.codec if layer in self.upper else self.codec.vectors
        return byte_places(pool, codec.num_bytes(self.entry))

    def places(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each record or entry that a layer has room for, [H, N] int64 each."""
        per_page = self.grid(layer, pool).shape[1]
        is_upper = layer in self.upper.values()
        number = torch.arange(self.num_retained if is_upper else int(self.counts[layer, 0]) * pool.layout.block_size)
        return self.stored.pages[layer][:, number // per_page], (number % per_page).expand(pool.num_heads, -1)

    def erase(self, pool: PagePool) -> None:
        """See `erase_codes`."""
        erase_codes(self.stored, pool)

    def decode(self, layer: int, pool: PagePool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """See `DecodedPages`; the layers of a pair come back together."""
        pair = next((pair for pair in self.upper.items() if layer in pair), None)
        if pair is None:
            return {layer: self._entries(layer, pool)}
        lower, upper = pair
        own = torch.stack(self._entries(upper, pool), dim=1)
        own = own.view(pool.num_heads, self.num_retained, *own.shape[1:]).transpose(1, 2)  # [H, 2, n, D]
        records = self.grid(lower, pool)[self.places(lower, pool)]
        restored = self.codec.restore(records, own, self.entry).transpose(1, 2).flatten(2, 3)  # [2, 2, H * N, D]
        return {of: (keys, values) for of, (keys, values) in zip(pair, restored, strict=True)}

    def _entries(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a layer has room for, head after head, [entries, D] float32 each."""
        return self.codec.vectors.decode(self.grid(layer, pool)[self.places(layer, pool)].flatten(0, 1), self.entry)


Held = HeadPages | EncodedPages | MergedPages
