"""Pages shared unevenly by the layers and KV heads of a request: where they lie.

All layers' caches lie in one allocation, so that every page of every layer and head has one flat id, and the cache can
be seen as pages of one head. Each (request, KV head) is then a sequence of its own to the engine's attention, with
its own page table and length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.cache import Streaming
from fastkv_vllm.kernels.page_tables import page_tables


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

    def pages(self, blocks: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Ids of the pages of blocks, [B] int64 -> [L, H, B]; of one layer [H, B]."""
        first = self.first[:, None, None] if layer is None else self.first[layer]
        return first + blocks * self.num_heads + torch.arange(self.num_heads)[:, None]


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
    def none(cls, pool: PagePool, num_whole: int) -> "HeadPages":
        """None: a request is read through its own table from block `num_whole` on."""
        counts = torch.zeros(len(pool.first), pool.num_heads, dtype=torch.int64)
        return cls(num_whole, counts, counts.new_zeros(*counts.shape, 0))

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

    def of_layer(self, layer: int) -> torch.Tensor:
        """Pages of a layer, head after head, [sum of counts] int64."""
        return self.pages[layer][torch.arange(self.pages.shape[2]) < self.counts[layer].unsqueeze(1)]

    def table(self, pool: PagePool, appended: torch.Tensor) -> torch.Tensor:
        """Page table with the blocks written since the prompt, [B] ids -> [L, H, most + B] int64."""
        table = self.pages.new_empty(*self.counts.shape, self.pages.shape[2] + len(appended))
        self.write_table(pool, appended, table)
        return table

    def write_table(self, pool: PagePool, appended: torch.Tensor, out: torch.Tensor) -> None:
        """Write it into the first columns of [L, H, width], int32 or int64."""
        page_tables(self.pages, self.counts, appended, first=self.first_pages(pool), out=out)

    def first_pages(self, pool: PagePool) -> torch.Tensor:
        """Id of the first page of the cache that each layer reads, [L] int64."""
        return pool.first


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

    def first_pages(self, pool: PagePool) -> torch.Tensor:
        return pool.first[self.owners]
