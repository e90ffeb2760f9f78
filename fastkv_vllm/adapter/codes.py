"""Decode rows whose kept entries attention reads from their codes, where they lie: nothing is decoded into a copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeGuard

import torch

from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.pages import RowLayout
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.adapter.reads import HeadReads, HeadRows, ReadBuffers
from fastkv_vllm.codecs import Codec, EntryShape, ExactCodec
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention, takes

InCodes = EncodedPages | MergedPages


def read_as_codes(rows: HeadRows[Held], pool: PagePool) -> TypeGuard[HeadRows[InCodes]]:
    """Whether `CodeReads` has them: one query, and pages of rows whose vectors are not too wide."""
    held, layout = rows.held, pool.layout
    if rows.count != 1 or not isinstance(held, EncodedPages | MergedPages) or not isinstance(layout, RowLayout):
        return False
    codec = held.codec if isinstance(held, EncodedPages) else held.codec.vectors
    whole = EntryShape(layout.head_dim, pool.cache.dtype)
    return all(takes(form, whole.dtype) for form in (codec.form(held.entry), ExactCodec().form(whole)))


def alike(held: InCodes) -> object:
    """The same for requests whose entries are stored in the same way, layer by layer."""
    if isinstance(held, MergedPages):
        return held.codec, held.entry, tuple(held.upper.items())
    return held.codec, held.entry, held.num_exact


@dataclass(frozen=True)
class CodeReads:
    """Such rows of requests that are alike; each (request, KV head) is a sequence.

    Fields:
        stored: what they hold in codes.
        later: reads of what they have written since.
    """

    stored: "StoredCodes"
    later: HeadReads

    def attend(self, layer: int, query: torch.Tensor, scale: float, output: torch.Tensor) -> None:
        """Write attention of these rows in a layer; query and output [T, Hq, D] are the whole batch's."""
        num_reqs, num_heads, head_dim = len(self.later.rows), self.later.pool.num_heads, query.shape[2]
        queries = query[self._numbers].view(num_reqs * num_heads, -1, head_dim)
        later = self.stored.as_they_are(self.later.tables[layer], self.later.seq_lens[layer])
        found = encoded_attention(queries, [*self.stored.parts[layer], later], scale=scale)
        output[self._numbers] = found.view(num_reqs, -1, head_dim)

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """Of the rows in the batch, [R] int64."""
        return torch.tensor([r.first for r in self.later.rows])


class CodeBuffers:
    """What reads of requests that are alike need from step to step: made anew where others decode, or hold others."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._later = ReadBuffers(pool)
        self._stored = StoredCodes((), pool)
        self._none: dict[int, HeadPages] = {}  # by id of what each holds: of its own pages none is read as it is

    def write(self, rows: Sequence[HeadRows[InCodes]]) -> CodeReads:
        """Reads of these rows; valid until the next ones are written."""
        before = self._stored.held
        if len(before) != len(rows) or any(old is not r.held for old, r in zip(before, rows, strict=True)):
            held = [r.held for r in rows]
            self._none = {id(h): self._none.get(id(h)) or HeadPages.none(self._pool, h.num_whole) for h in held}
            self._stored = StoredCodes(held, self._pool)
        later = [
            HeadRows(r.first, r.count, r.num_tokens, r.num_blocks, r.block_table, self._none[id(r.held)]) for r in rows
        ]
        return CodeReads(self._stored, self._later.write(later, len(later)))


@dataclass(frozen=True)
class StoredCodes:
    """What requests that are alike hold in codes, each (request, KV head) a sequence.

    Fields:
        held: of each request.
        pool: of the engine.
    """

    held: Sequence[InCodes]
    pool: PagePool

    @cached_property
    def parts(self) -> list[list[PagedEntries]]:
        """Of each layer, each way of storing one."""
        first, layers = self.held[0], range(len(self.pool.first))
        if isinstance(first, EncodedPages):
            return [self._encoded(first, layer) for layer in layers]
        return [self._merged(first, layer) for layer in layers]

    def as_they_are(self, tables: torch.Tensor, lengths: torch.Tensor) -> PagedEntries:
        """Entries in the model's dtype, in pages [S, width] int32 of which each sequence has so many, [S] int32."""
        codec, entry = ExactCodec(), EntryShape(self.pool.layout.head_dim, self.pool.cache.dtype)
        return PagedEntries(self._pages, tables, lengths, codec.form(entry), partial(_decode, codec, entry))

    @cached_property
    def _pages(self) -> torch.Tensor:
        """Bytes of the pool, [num_pages, bytes]."""
        return self.pool.cache.view(torch.uint8).flatten(1)

    def _encoded(self, held: EncodedPages, layer: int) -> list[PagedEntries]:
        """Entries as their codec has them, and sinks as they are."""
        tables, counts = self._tables[layer], self._counts[layer]
        key_channels, value_channels = self._channels[layer]
        codec, shift = held.codec.as_stored(), held.shift
        encoded = PagedEntries(
            self._pages,
            tables,
            counts + shift,
            codec.form(held.entry),
            partial(_decode, codec, held.entry),
            held.num_exact + shift,
            key_channels,
            value_channels,
        )
        return [encoded, self.as_they_are(tables, counts.clamp(max=held.num_exact))] if held.num_exact else [encoded]

    def _merged(self, held: MergedPages, layer: int) -> list[PagedEntries]:
        """Records of two layers, and of the upper one its retained entries."""
        codec, entry, vectors = held.codec, held.entry, held.codec.vectors
        lower = next((below for below, above in held.upper.items() if layer in (below, above)), None)
        form, decode = vectors.form(entry), partial(_decode, vectors, entry)
        if lower is None:
            return [PagedEntries(self._pages, self._tables[layer], self._counts[layer], form, decode)]
        upper = layer != lower
        of_layer = codec.form(entry, upper=upper), partial(codec.decode, entry=entry, upper=upper)
        records = PagedEntries(self._pages, self._tables[lower], self._counts[lower], *of_layer)
        if not upper:
            return [records]
        return [records, PagedEntries(self._pages, self._tables[layer], self._num_own[layer], form, decode)]

    @cached_property
    def _tables(self) -> torch.Tensor:
        """Pages of what is stored, [L, S, width] int32."""
        return _side_by_side([h.stored.pages for h in self.held])

    @cached_property
    def _counts(self) -> torch.Tensor:
        """Entries that attention sees of it, [L, S] int32."""
        counts = torch.cat([h.counts for h in self.held], dim=1) * self.pool.layout.block_size
        return counts.to(torch.int32)

    @cached_property
    def _num_own(self) -> torch.Tensor:
        """Retained entries of upper layers, [L, S] int32."""
        return torch.cat([h.num_own for h in self.held if isinstance(h, MergedPages)], dim=1)

    @cached_property
    def _channels(self) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Those of each layer's stored keys and values, [S, Dk] and [S, Dv]; None: all in order."""
        channels: list[list[torch.Tensor | None]] = []
        for part in range(2):
            of_rows = []
            for held in self.held:
                assert isinstance(held, EncodedPages), "rows are alike"
                num_layers, num_heads = held.counts.shape
                order = held.codec.orders(torch.arange(num_layers * num_heads))
                order = None if order is None else order[:, part].unflatten(0, (num_layers, num_heads))
                chosen = (held.key_channels, held.value_channels)[part]
                of_rows.append(order if chosen is None else chosen if order is None else chosen.gather(2, order))
            given = [each for each in of_rows if each is not None]
            channels.append(list(torch.cat(given, dim=1)) if given else [None] * len(self._counts))
        return list(zip(*channels, strict=True))


def _decode(codec: Codec, entry: EntryShape, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codec.decode(records[:, : codec.read_bytes(entry)], entry)


def _side_by_side(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tables [L, H, width] of requests as one, [L, S, most] int32."""
    most = max(table.shape[2] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, most - table.shape[2])) for table in tables]
    return torch.cat(padded, dim=1).to(torch.int32)
