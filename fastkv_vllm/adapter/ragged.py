"""Pages shared unevenly by the layers and KV heads of a request: where they lie, and how attention reads them.

All layers' caches lie in one allocation, so that every page of every layer and head has one flat id, and the cache can
be seen as pages of one head. Each (request, KV head) is then a sequence of its own to the engine's attention, with
its own page table and length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.cache import Streaming


@dataclass(frozen=True)
class PagePool:
    """Every page of every layer as one cache of one head.

    Fields:
        cache: all pages, [num_pages, 1, block_size, 2 * D]; a view of the engine's cache.
        first: id of each layer's first page, [L] int64.
        num_heads: KV heads of a layer on this rank.
        layout: how a page is laid out inside.
    """

    cache: torch.Tensor
    first: torch.Tensor
    num_heads: int
    layout: PageLayout

    @classmethod
    def of(cls, kv_caches: Sequence[torch.Tensor], layout: PageLayout) -> "PagePool":
        """Pool of the layers' caches, [num_blocks, H, block_size, 2 * D] each.

        Raises:
            RuntimeError: the caches do not lie in one allocation, head-major and unpadded.
        """
        base = kv_caches[0]
        _, num_heads, block_size, width = base.shape
        page = block_size * width
        storage = base.untyped_storage()
        for layer, cache in enumerate(kv_caches):
            same = cache.untyped_storage().data_ptr() == storage.data_ptr() and cache.shape == base.shape
            if not same or not cache.is_contiguous() or cache.storage_offset() % page:
                raise RuntimeError(
                    f"budgets per layer or head need all layers' caches in one allocation, head-major and unpadded; "
                    f"layer {layer} is not: shape {list(cache.shape)}, strides {cache.stride()}"
                )
        num_pages = storage.nbytes() // (page * base.element_size())
        flat = base.as_strided((num_pages, 1, block_size, width), (page, page, width, 1), 0)
        first = torch.tensor([cache.storage_offset() // page for cache in kv_caches], device=base.device)
        return cls(flat, first, num_heads, layout)

    def pages(self, blocks: torch.Tensor) -> torch.Tensor:
        """Ids of the pages of blocks, [B] int64 -> [L, H, B]."""
        heads = torch.arange(self.num_heads)
        return self.first[:, None, None] + blocks * self.num_heads + heads[:, None]


def blocks_for(counts: torch.Tensor) -> int:
    """Blocks that have room for so many pages of each layer and head, [L, H] int64."""
    return -(-int(counts.sum()) // counts.numel())


class KeptPages(Protocol):
    """Where the kept entries of one compressed prompt lie, as far as the batch must know.

    Fields:
        num_whole: whole blocks of the prompt; entries after them lie in the blocks of the request's own table.
        counts: pages that attention sees of each layer and head, [L, H] int64.
        host_counts: the same on the host.
    """

    @property
    def num_whole(self) -> int: ...

    @property
    def counts(self) -> torch.Tensor: ...

    @property
    def host_counts(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class HeadPages:
    """Where the kept entries of one compressed prompt lie, or those of its part up to a stop.

    Fields:
        num_whole: whole blocks of the prompt (part); entries after them lie in the blocks of the request's own table.
        counts: pages of each layer and head, [L, H] int64.
        pages: their ids, [L, H, most] int64, padded with 0.
    """

    num_whole: int
    counts: torch.Tensor
    pages: torch.Tensor

    @cached_property
    def host_counts(self) -> torch.Tensor:
        return self.counts.cpu()

    @classmethod
    def share(cls, num_whole: int, counts: torch.Tensor, pool: PagePool, destination: Sequence[int]) -> "HeadPages":
        """Give each layer and head its own pages of the destination blocks, then what others leave.

        Even counts get exactly their own. Layers and heads that want more take free pages in order of layer, head and
        block. Blocks that are not needed stay empty, the first ones.

        Args:
            num_whole: whole blocks of the prompt.
            counts: pages of each layer and head of this rank, at most len(destination) * L * H in all.
            pool: of the engine.
            destination: ids of the blocks that hold the kept pages.
        """
        own = pool.pages(torch.tensor(destination[-blocks_for(counts) :]))  # [L, H, R]
        most = max(int(counts.max()), own.shape[2])
        wanted = torch.arange(most) < counts.unsqueeze(-1)
        pages = torch.nn.functional.pad(own, (0, most - own.shape[2]))
        spare = own[~wanted[..., : own.shape[2]]]
        taken = wanted.clone()
        taken[..., : own.shape[2]] = False
        pages[taken] = spare[: int(taken.sum())]
        return cls(num_whole, counts, pages * wanted)

    @classmethod
    def whole(cls, pool: PagePool, blocks: torch.Tensor) -> "HeadPages":
        """All pages of a request's first blocks, [B] ids."""
        counts = torch.full((len(pool.first), pool.num_heads), len(blocks))
        return cls(len(blocks), counts, pool.pages(blocks))

    def with_blocks(self, pool: PagePool, appended: torch.Tensor) -> "HeadPages":
        """These pages and those of whole blocks read since, [B] ids."""
        return HeadPages(self.num_whole + len(appended), self.counts + len(appended), self.table(pool, appended))

    def let_go(
        self, streaming: Streaming, pool: PagePool, destination: Sequence[int]
    ) -> tuple["HeadPages", torch.Tensor, torch.Tensor]:
        """What heads hold after a stop: their first and most recent pages, those in other blocks moved.

        Args:
            streaming: how many they hold.
            pool: of the engine.
            destination: ids of the blocks that hold them then.

        Returns:
            The pages, and of those that move the ids before and after, [n] int64 each.
        """
        counts = torch.tensor(streaming.counts(self.num_whole))
        order = torch.arange(int(counts.max()))
        wanted = order < counts.unsqueeze(-1)
        gone = (self.counts - counts).unsqueeze(-1)
        source = torch.where(order < streaming.num_sink_pages, order, order + gone)
        pages = self.pages.gather(2, source.clamp(max=self.pages.shape[2] - 1)) * wanted
        theirs = pool.pages(torch.tensor(destination)).flatten()
        moving = wanted & ~torch.isin(pages, theirs)
        old = pages[moving]
        pages[moving] = theirs[~torch.isin(theirs, pages[wanted])][: len(old)]
        return HeadPages(self.num_whole, counts, pages), old, pages[moving]

    def by_block(self, num_sink_pages: int) -> torch.Tensor:
        """Page of each of the prompt's blocks, [L, H, num_whole] int64; -1 where a head has let go of it."""
        order = torch.arange(self.pages.shape[2])
        gone = (self.num_whole - self.counts).unsqueeze(-1)
        blocks = torch.where(order < num_sink_pages, order, order + gone)
        held = order < self.counts.unsqueeze(-1)
        found = torch.full((*self.counts.shape, self.num_whole + 1), -1)  # the last one takes the padding
        return found.scatter(2, torch.where(held, blocks, self.num_whole), self.pages)[..., : self.num_whole]

    def slots(self, layer: int, block_size: int) -> torch.Tensor:
        """Slots of a layer's pages in order of head, page and offset, [sum of counts * block_size]."""
        held = torch.arange(self.pages.shape[2]) < self.counts[layer].unsqueeze(1)
        return (self.pages[layer][held].unsqueeze(1) * block_size + torch.arange(block_size)).flatten()

    def table(self, pool: PagePool, appended: torch.Tensor) -> torch.Tensor:
        """Page table with the blocks written since the prompt, [B] ids -> [L, H, most + B] int64."""
        later = pool.pages(appended)
        table = torch.nn.functional.pad(self.pages, (0, len(appended)))
        index = self.counts.unsqueeze(-1) + torch.arange(len(appended))
        return table.scatter(2, index, later)


@dataclass(frozen=True)
class SharedPages(HeadPages):
    """Pages of layers some of which read those of others: each layer has the counts and pages of its owner.

    Fields:
        owned: the same where layers that read others' have none.
        owners: layer whose pages each layer reads, [L] int64.
    """

    owned: HeadPages
    owners: torch.Tensor

    @classmethod
    def of(cls, owned: HeadPages, owners: Sequence[int]) -> "SharedPages":
        layers = torch.tensor(owners)
        return cls(owned.num_whole, owned.counts[layers], owned.pages[layers], owned, layers)

    def table(self, pool: PagePool, appended: torch.Tensor) -> torch.Tensor:
        return self.owned.table(pool, appended)[self.owners]


P = TypeVar("P", bound=KeptPages, covariant=True)


@dataclass(frozen=True)
class HeadRows(Generic[P]):
    """Rows of one request with pages of its own per head, in the batch of a step.

    Fields:
        first, count: its rows.
        num_tokens: tokens it has in all after the step.
        blocks: its block table from the prompt's last, partial block on, [B] int64.
        held: its kept pages.
    """

    first: int
    count: int
    num_tokens: int
    blocks: torch.Tensor
    held: P


@dataclass
class HeadReads:
    """What attention needs to read such rows as one sequence per (request, KV head).

    Fields:
        rows: the requests' rows in order.
        pool: of the engine.
        tables: page tables, [L, requests * H, width] int32.
        metadata: per layer, the engine's metadata of these sequences.
    """

    rows: Sequence[HeadRows[KeptPages]]
    pool: PagePool
    tables: torch.Tensor
    metadata: list[Any] = field(default_factory=list)

    def cache(self, layer: int) -> torch.Tensor:
        """Pages that the layer's table names, [num_pages, 1, block_size, 2 * D]."""
        return self.pool.cache

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """Entries of each sequence, [L, requests * H] int32, on the host: known there without waiting for a GPU."""
        size = self.pool.layout.block_size
        counts = torch.stack([r.held.host_counts for r in self.rows], dim=1)  # [L, requests, H]
        since = torch.tensor([r.num_tokens - r.held.num_whole * size for r in self.rows], device="cpu")
        return (counts * size + since.unsqueeze(1)).flatten(1).to(torch.int32)

    @cached_property
    def query_start(self) -> torch.Tensor:
        """First query of each sequence and their number, [requests * H + 1] int32, on the host."""
        counts = torch.tensor([r.count for r in self.rows], device="cpu").repeat_interleave(self.pool.num_heads)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and KV head of each query, sequence by sequence, [sum of counts * H] int64 each."""
        rows, heads = [], []
        for r in self.rows:
            rows.append(torch.arange(r.first, r.first + r.count).repeat(self.pool.num_heads))
            heads.append(torch.arange(self.pool.num_heads).repeat_interleave(r.count))
        return torch.cat(rows), torch.cat(heads)

    def entries(self, layer: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a request in a layer where its heads hold as many each, [H, N, D], in order of its pages.

        Args:
            layer: its index.
            number: of the request in `rows`.
        """
        layout, num_heads = self.pool.layout, self.pool.num_heads
        num_entries = int(self.seq_lens[layer, number * num_heads])
        width = -(-num_entries // layout.block_size)
        pages = self.tables[layer, number * num_heads : (number + 1) * num_heads, :width].flatten().to(torch.int64)
        read = [
            each(self.cache(layer), pages, len(pages) * layout.block_size)
            for each in (layout.read_keys, layout.read_values)
        ]
        keys, values = (each.view(num_heads, -1, layout.head_dim)[:, :num_entries] for each in read)
        return keys, values


class TableCache:
    """Tables of the last step, used again until a request starts a new block."""

    def __init__(self) -> None:
        self._rows: Sequence[HeadRows[HeadPages]] = ()
        self._tables = torch.empty(0)

    def tables(self, rows: Sequence[HeadRows[HeadPages]], pool: PagePool) -> torch.Tensor:
        """Page tables of all sequences, [L, requests * H, width] int32."""
        if [(id(r.held), len(r.blocks)) for r in rows] != [(id(r.held), len(r.blocks)) for r in self._rows]:
            parts = [r.held.table(pool, r.blocks) for r in rows]
            width = max(part.shape[2] for part in parts)
            padded = [torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts]
            self._rows, self._tables = rows, torch.cat(padded, dim=1).to(torch.int32)
        return self._tables


def rows_of(held: Mapping[int, P], view: Any, block_size: int) -> list[HeadRows[P]]:
    """Rows of the requests in `held`, by their number in the batch of `view` (vLLM's CommonAttentionMetadata)."""
    starts, lengths = view.query_start_loc_cpu.tolist(), view.seq_lens_cpu_upper_bound.tolist()
    found = []
    for number, pages in held.items():
        last = -(-lengths[number] // block_size)
        blocks = view.block_table_tensor[number, pages.num_whole : last].to(torch.int64)
        count = starts[number + 1] - starts[number]
        found.append(HeadRows(starts[number], count, lengths[number], blocks, pages))
    return found
