"""How attention reads pages that heads hold unevenly: tables and lengths of one sequence per (request, KV head)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from fastkv_vllm.adapter.ragged import HeadPages, KeptPages, PagePool

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
