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


P = TypeVar("P", bound=KeptPages, covariant=True)


@dataclass(frozen=True)
class HeadRows(Generic[P]):
    """Rows of one request with pages of its own per head, in the batch of a step.

    Fields:
        first, count: its rows.
        num_tokens: tokens it has in all after the step.
        num_blocks: blocks of them from the prompt's last, partial one on.
        block_table: its own, [max_blocks] int32.
        held: its kept pages.
    """

    first: int
    count: int
    num_tokens: int
    num_blocks: int
    block_table: torch.Tensor
    held: P

    @cached_property
    def blocks(self) -> torch.Tensor:
        """Blocks from the prompt's last, partial one on, [num_blocks] int32."""
        whole = self.held.num_whole
        return self.block_table[whole : whole + self.num_blocks]


@dataclass
class HeadReads:
    """What attention needs to read such rows as one sequence per (request, KV head).

    Fields:
        rows: the requests' rows in order.
        pool: of the engine.
        tables: page tables, [L, S, width] int32; sequences behind those of all rows are empty.
        seq_lens: entries of each sequence, [L, S] int32.
        query_start: first query of each sequence and their number, [S + 1] int32.
        host_seq_lens, host_query_start: the same on the host: known there without waiting for a GPU.
        like: of each layer the first one with the same lengths.
        metadata: per layer, the engine's metadata of these sequences.
    """

    rows: Sequence[HeadRows[KeptPages]]
    pool: PagePool
    tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    host_seq_lens: torch.Tensor
    host_query_start: torch.Tensor
    like: Sequence[int]
    metadata: list[Any] = field(default_factory=list)

    def cache(self, layer: int) -> torch.Tensor:
        """Pages that the layer's table names, [num_pages, 1, block_size, 2 * D]."""
        return self.pool.cache

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
        num_entries = int(self.host_seq_lens[layer, number * num_heads])
        width = -(-num_entries // layout.block_size)
        pages = self.tables[layer, number * num_heads : (number + 1) * num_heads, :width].flatten().to(torch.int64)
        read = [
            each(self.cache(layer), pages, len(pages) * layout.block_size)
            for each in (layout.read_keys, layout.read_values)
        ]
        keys, values = (each.view(num_heads, -1, layout.head_dim)[:, :num_entries] for each in read)
        return keys, values


class ReadBuffers:
    """Tables and lengths of such sequences, in tensors that stay as long as they are large enough.

    What a request holds is written once and again where it begins a block; from step to step lengths alone go on. What
    is handed out is valid until the next rows are written.

    Args:
        pool: of the engine.
        num_reqs, width: requests, and pages of a sequence, that it has room for at first.
        stays: for good: captured graphs read there.
    """

    def __init__(self, pool: PagePool, num_reqs: int = 1, width: int = 1, stays: bool = False) -> None:
        self._pool = pool
        self._stays = stays
        self._make(num_reqs, width)

    def _make(self, num_reqs: int, width: int) -> None:
        shape = (len(self._pool.first), num_reqs, self._pool.num_heads)
        self._tables = torch.zeros(*shape, width, dtype=torch.int32)
        self._seq_lens = torch.zeros(shape, dtype=torch.int32)
        self._query_start = torch.zeros(num_reqs * self._pool.num_heads + 1, dtype=torch.int32)
        self._host_seq_lens = torch.zeros(shape, dtype=torch.int32, device="cpu")
        self._more = torch.zeros(shape, dtype=torch.int32, device="cpu")  # entries that are held, less the tokens read
        self._written: list[tuple[HeadPages, int]] = []
        self._like: list[int] = []
        self._counts: list[int] = []
        self._host_query_start = torch.zeros(1, dtype=torch.int32, device="cpu")

    def write(self, rows: Sequence[HeadRows[HeadPages]], num_reqs: int) -> HeadReads:
        """What attention reads of these rows, and of requests behind them, up to `num_reqs`, that have none.

        Raises:
            RuntimeError: they need more room than tensors have that stay.
        """
        width = max(r.held.pages.shape[2] + r.num_blocks for r in rows)
        _, most_reqs, _, most_pages = self._tables.shape
        if num_reqs > most_reqs or width > most_pages:
            if self._stays:
                raise RuntimeError(
                    f"decode graphs were captured for {most_reqs} requests of at most {most_pages} pages a head and a "
                    f"step has {num_reqs} of {width}"
                )
            self._make(max(num_reqs, 2 * most_reqs), max(width, 2 * most_pages))
        before, self._written = self._written, [(r.held, r.num_blocks) for r in rows]
        for place, row in enumerate(rows):
            held, num_blocks = before[place] if place < len(before) else (None, 0)
            if held is not row.held or num_blocks != row.num_blocks:
                row.held.write_table(self._pool, row.blocks, self._tables[:, place])
            if held is not row.held:
                size = self._pool.layout.block_size
                self._more[:, place] = (row.held.host_counts - row.held.num_whole) * size
                self._like = []
        tokens = torch.tensor([[r.num_tokens] for r in rows], dtype=torch.int32, device="cpu")
        host_seq_lens, seq_lens = self._host_seq_lens[:, :num_reqs], self._seq_lens[:, :num_reqs]
        torch.add(self._more[:, : len(rows)], tokens, out=host_seq_lens[:, : len(rows)])
        host_seq_lens[:, len(rows) :] = 0
        seq_lens.copy_(host_seq_lens)
        self._like = self._like or layers_alike(self._more[:, : len(rows)].flatten(1))
        counts = [r.count for r in rows] + [0] * (num_reqs - len(rows))
        if counts != self._counts:
            self._counts, self._host_query_start = counts, query_starts(counts, self._pool.num_heads)
            self._query_start[: len(self._host_query_start)].copy_(self._host_query_start)
        return HeadReads(
            rows,
            self._pool,
            self._tables[:, :num_reqs].flatten(1, 2),
            seq_lens.flatten(1),
            self._query_start[: len(self._host_query_start)],
            host_seq_lens.flatten(1),
            self._host_query_start,
            self._like,
        )


def query_starts(counts: Sequence[int], num_heads: int) -> torch.Tensor:
    """First query of each sequence and their number, [requests * H + 1] int32, on the host; `counts`: of requests."""
    of_sequences = torch.tensor(counts, device="cpu").repeat_interleave(num_heads)
    return torch.nn.functional.pad(of_sequences.cumsum(0), (1, 0)).to(torch.int32)


def layers_alike(lengths: torch.Tensor) -> list[int]:
    """Of each layer the first one with the same lengths, [L, S] on the host."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(of_layer), layer) for layer, of_layer in enumerate(lengths.tolist())]


def rows_of(held: Mapping[int, P], view: Any, block_size: int) -> list[HeadRows[P]]:
    """Rows of the requests in `held`, by their number in the batch of `view` (vLLM's CommonAttentionMetadata)."""
    starts, lengths = view.query_start_loc_cpu.tolist(), view.seq_lens_cpu_upper_bound.tolist()
    found = []
    for number, pages in held.items():
        first, num_tokens = starts[number], lengths[number]
        num_blocks = -(-num_tokens // block_size) - pages.num_whole
        table = view.block_table_tensor[number]
        found.append(HeadRows(first, starts[number + 1] - first, num_tokens, num_blocks, table, pages))
    return found
