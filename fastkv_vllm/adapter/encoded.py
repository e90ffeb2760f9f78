"""Kept entries stored by a codec: where their bytes lie, and how attention reads them.

A page's bytes are the same however many entries they hold. Each (layer, head) of a request has pages of its own, full
of groups of encoded entries; where its sinks are stored as they are, they begin the first. Attention reads a copy of
one layer at a time, decoded into pages of the engine's layout.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from fastkv_vllm.adapter.ragged import HeadPages, KeptPages, PagePool
from fastkv_vllm.adapter.reads import HeadReads, HeadRows, layers_alike, query_starts
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import Codec, EntryShape, ExactCodec, best_channels, best_value_channels
from fastkv_vllm.config import CompressionConfig


@dataclass(frozen=True)
class EncodedPages:
    """Where the encoded entries of one compressed request lie.

    Fields:
        num_whole: whole blocks of the text that are encoded; those after them are not.
        counts: pages that attention sees of each layer and head, once decoded, [L, H] int64.
        stored: pages that hold the bytes.
        codec: how.
        entry: what an entry is, and what of it is stored.
        num_exact: first entries of each head that are stored as they are.
        key_channels, value_channels: those of each layer's and head's keys and values that are stored, ascending,
            [L, H, Dk] and [L, H, Dv] int64, once they are chosen; None: all.
        draft_tokens: most tokens that may be drafted at a time from the codec's coarser view.
    """

    num_whole: int
    counts: torch.Tensor
    stored: HeadPages
    codec: Codec
    entry: EntryShape
    num_exact: int
    key_channels: torch.Tensor | None
    value_channels: torch.Tensor | None
    draft_tokens: int

    @cached_property
    def host_counts(self) -> torch.Tensor:
        return self.counts.cpu()

    @cached_property
    def draft_view(self) -> "EncodedPages":
        """The same pages as drafts read them."""
        codec = self.codec.draft_view()
        assert codec is not None, "checked by CompressionConfig where tokens are drafted"
        return replace(self, codec=codec)

    @classmethod
    def share(
        cls,
        plan: PromptPlan,
        counts: torch.Tensor,
        config: CompressionConfig,
        codec: Codec,
        pool: PagePool,
        destination: Sequence[int],
    ) -> "EncodedPages":
        """Give each layer and head what its encoded entries need of the destination blocks, see `HeadPages.share`."""
        stored = HeadPages.share(plan.num_whole_blocks, stored_pages(plan, counts), pool, destination)
        entry = config.stored_entry(EntryShape(pool.layout.head_dim, pool.cache.dtype))
        of_keys, of_values = (
            counts.new_zeros(*counts.shape, size) if size < entry.head_dim else None
            for size in (entry.key_dim, entry.value_dim)
        )
        num_exact = plan.num_sink if codec.exact_sinks else 0
        assert config.draft_tokens is not None, "filled in by CompressionConfig"
        channels = of_keys, of_values
        return cls(plan.num_whole_blocks, counts, stored, codec, entry, num_exact, *channels, config.draft_tokens)

    def places(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each group of a layer, head after head, [groups] int64 each."""
        per_page = self.grid(pool).shape[1]
        of_heads = self.counts[layer] * (pool.layout.block_size // self.codec.group_size)
        heads = torch.arange(len(of_heads)).repeat_interleave(of_heads)
        number = torch.arange(len(heads)) - (of_heads.cumsum(0) - of_heads)[heads] + self.shift
        return self.stored.pages[layer, heads, number // per_page], number % per_page

    def with_block(self, pool: PagePool, block: int, stays: bool) -> "EncodedPages":
        """The same with the block after those encoded so far, which may become a page of each layer and head."""
        stored = self.stored.with_blocks(pool, torch.tensor([block])) if stays else self.stored
        return replace(self, num_whole=self.num_whole + 1, counts=self.counts + 1, stored=stored)

    def last_places(self, pool: PagePool) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and place in it of each group of the last block, [L, H, groups] int64 each."""
        per_page = self.grid(pool).shape[1]
        groups = pool.layout.block_size // self.codec.group_size
        number = (self.counts.unsqueeze(-1) - 1) * groups + torch.arange(groups) + self.shift
        return self.stored.pages.gather(2, number // per_page), number % per_page

    @property
    def shift(self) -> int:
        """Places that codes begin later than they would: their own places of the sinks lie below what these take."""
        return self.codec.sink_places(self.num_exact, self.entry)

    def erase(self, pool: PagePool) -> None:
        """See `erase_codes`."""
        erase_codes(self.stored, pool)

    def grid(self, pool: PagePool) -> torch.Tensor:
        """The pool's bytes as places of groups, [pages, groups of a page, B] uint8; a view."""
        return byte_places(pool, self.codec.num_bytes(self.entry))

    @property
    def drops_channels(self) -> bool:
        return self.key_channels is not None or self.value_channels is not None

    def choose_channels(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Choose which channels of a layer's keys and values are stored, once.

        Args:
            layer: index of the layer.
            queries: of the voters, [W, Hq, D].
            keys, values: that are to be stored, head after head, [entries, D] each.
        """
        counts = self.counts[layer]
        sizes = (counts * (len(keys) // counts.sum())).tolist()
        heads = zip(queries.chunk(len(counts), dim=1), keys.split(sizes), values.split(sizes), strict=True)
        for head, (group, of_keys, of_values) in enumerate(heads):
            if self.key_channels is not None:
                self.key_channels[layer, head] = best_channels(group, of_keys, self.entry.key_dim)
            if self.value_channels is not None:
                best = best_value_channels(group, of_keys, of_values, self.entry.value_dim)
                self.value_channels[layer, head] = best

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Bytes of entries, [n, D] each, of these heads, [n] int64, counted layer after layer."""
        if self.key_channels is not None:
            keys = keys.gather(1, self.key_channels.flatten(0, 1)[heads])
        if self.value_channels is not None:
            values = values.gather(1, self.value_channels.flatten(0, 1)[heads])
        return self.codec.of_heads(heads).encode(keys, values)

    @staticmethod
    def decode(
        requests: Sequence["EncodedPages"], layer: int, pool: PagePool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a layer of requests that have one codec and shape of entries; see `DecodedPages`.

        Together, since there are many operations and each is short. Zeros in channels not stored.
        """
        of_requests = [held.heads_of(layer, pool.layout.block_size) for held in requests]
        heads, first = torch.cat(of_requests), requests[0]
        codec = first.codec.of_heads(heads)
        pages, places = (torch.cat(each) for each in zip(*(h.places(layer, pool) for h in requests), strict=True))
        needed = first.grid(pool)[..., : codec.read_bytes(first.entry)]
        keys, values = codec.decode(needed[pages, places], first.entry)
        sizes = [len(each) for each in of_requests]
        return [
            held._completed(layer, pool, heads, *own)
            for held, heads, *own in zip(requests, of_requests, keys.split(sizes), values.split(sizes), strict=True)
        ]

    def _completed(
        self, layer: int, pool: PagePool, heads: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded entries with all channels, and with sinks as they are stored."""
        if self.key_channels is not None:
            keys = self._whole(keys, self.key_channels.flatten(0, 1)[heads])
        if self.value_channels is not None:
            values = self._whole(values, self.value_channels.flatten(0, 1)[heads])
        if self.num_exact:
            sinks, (target, index) = self.sinks_of(layer, pool.layout.block_size), self.sink_bytes(layer, pool)
            data = target[index].unflatten(1, (self.num_exact, -1)).flatten(0, 1)
            keys[sinks], values[sinks] = ExactCodec().decode(data, replace(self.entry, channel_ratio=1.0))
        return keys, values

    def _whole(self, stored: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        """Keys or values [n, D] of which these channels are stored, [n, Dk or Dv] each."""
        return stored.new_zeros(len(stored), self.entry.head_dim).scatter_(1, channels, stored)

    def heads_of(self, layer: int, block_size: int) -> torch.Tensor:
        """Head of each entry of a layer, head after head, [entries] int64; heads are counted layer after layer."""
        of_heads = self.counts[layer] * block_size
        return (layer * len(of_heads) + torch.arange(len(of_heads))).repeat_interleave(of_heads)

    def sinks_of(self, layer: int, block_size: int) -> torch.Tensor:
        """Numbers of the entries of a layer, head after head, that are stored as they are, [H * num_exact] int64."""
        of_heads = self.counts[layer] * block_size
        return ((of_heads.cumsum(0) - of_heads).unsqueeze(1) + torch.arange(self.num_exact)).flatten()

    def sink_bytes(self, layer: int, pool: PagePool) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        """Where they lie: the pool as [pages, bytes of a head's sinks], a view, and the pages of a layer's heads."""
        pages = pool.cache.view(torch.uint8).flatten(1)
        return pages[:, : self.num_exact * self.entry.num_bytes], (self.stored.pages[layer, :, 0],)


class DecodedPages(KeptPages, Protocol):
    """Where kept entries lie that attention reads from a copy, and that each request decodes by itself."""

    def decode(self, layer: int, pool: PagePool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a layer, and of those that are stored with it, head after head, [entries, D] float32."""
        ...


def byte_places(pool: PagePool, num_bytes: int) -> torch.Tensor:
    """The pool's bytes as places of so many, [pages, places of a page, num_bytes] uint8; a view."""
    pages = pool.cache.view(torch.uint8).flatten(1)
    per_page = pages.shape[1] // num_bytes
    return pages.as_strided((pages.shape[0], per_page, num_bytes), (pages.shape[1], num_bytes, 1))


def erase_codes(stored: HeadPages, pool: PagePool) -> None:
    """Leave zeros; call before another request can have the pages.

    Codes may read as NaN, and the engine's attention multiplies what lies behind a sequence's end in its last block
    with zero.
    """
    taken = torch.arange(stored.pages.shape[2]) < stored.counts.unsqueeze(-1)
    pool.cache[stored.pages[taken]] = 0


def stored_pages(plan: PromptPlan, counts: torch.Tensor) -> torch.Tensor:
    """Pages with room for the bytes of so many pages of entries of each layer and head, and those awaited, [L, H]."""
    if plan.layer_owners:
        return torch.tensor(
            [[plan.pages_of_layers(n)[layer] for n in row] for layer, row in enumerate(counts.tolist())]
        )
    if plan.page_entries is None:
        return counts
    return -(-(plan.sink_places + counts * plan.block_size + plan.num_awaited) // plan.page_entries)


class EncodedReads(HeadReads):
    """Reads of such requests, from a copy of each layer that lives while its attention runs.

    The copy has the decoded pages of all sequences, then the blocks that each has after them. It is as large as what
    these requests hold of one layer. What is stored with another layer waits decoded for that layer.
    """

    def __init__(self, rows: Sequence[HeadRows[EncodedPages | DecodedPages]], pool: PagePool) -> None:
        self._held = [r.held for r in rows]
        self._together = defaultdict[tuple[Codec, EntryShape], list[int]](list)
        for number, held in enumerate(self._held):
            if isinstance(held, EncodedPages):
                self._together[held.codec, held.entry].append(number)
        self._decoded: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in rows]  # and not read yet
        counts = torch.cat([held.counts for held in self._held], dim=1)  # [L, S]
        later = torch.tensor([r.num_blocks for r in rows]).repeat_interleave(pool.num_heads)  # [S]
        first = counts.cumsum(1) - counts
        self._num_decoded = counts.sum(dim=1)
        first_later = self._num_decoded.unsqueeze(1) + later.cumsum(0) - later
        place = torch.arange(int((counts + later).max()))
        is_decoded, number = place < counts.unsqueeze(-1), place - counts.unsqueeze(-1)
        tables = torch.where(is_decoded, first.unsqueeze(-1) + place, first_later.unsqueeze(-1) + number)
        tables.masked_fill_(number >= later.unsqueeze(-1), 0)
        size, device = pool.layout.block_size, tables.device
        more = torch.stack([(r.held.host_counts - r.held.num_whole) * size + r.num_tokens for r in rows], dim=1)
        lengths, starts = more.flatten(1).to(torch.int32), query_starts([r.count for r in rows], pool.num_heads)
        on_device = tables.to(torch.int32), lengths.to(device), starts.to(device)
        super().__init__(rows, pool, *on_device, lengths, starts, layers_alike(lengths))

    def cache(self, layer: int) -> torch.Tensor:
        pool, size = self.pool, self.pool.layout.block_size
        later = torch.cat([pool.pages(r.blocks, layer).flatten() for r in self.rows])
        num_decoded = int(self._num_decoded[layer])
        copy = pool.cache.new_empty(num_decoded + len(later), *pool.cache.shape[1:])
        self._decode(layer)
        parts = zip(*(decoded.pop(layer) for decoded in self._decoded), strict=True)
        keys, values = (torch.cat(part).to(copy.dtype).unsqueeze(1) for part in parts)
        pool.layout.write(copy, keys, values, torch.arange(num_decoded * size))
        copy[num_decoded:] = pool.cache[later]
        return copy

    def _decode(self, layer: int) -> None:
        """Decode a layer of all requests; what is decoded with it waits for the layer that reads it."""
        for numbers in self._together.values():
            requests = [held for n in numbers if isinstance(held := self._held[n], EncodedPages)]
            for number, entries in zip(numbers, EncodedPages.decode(requests, layer, self.pool), strict=True):
                self._decoded[number][layer] = entries
        for held, decoded in zip(self._held, self._decoded, strict=True):
            if layer not in decoded:
                assert not isinstance(held, EncodedPages)
                decoded.update(held.decode(layer, self.pool))
