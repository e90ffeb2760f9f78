"""Decode rows whose kept entries attention reads from their codes, where they lie: nothing is decoded into a copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch

from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.merged import Held
from fastkv_vllm.adapter.pages import RowLayout
from fastkv_vllm.adapter.ragged import HeadRows, PagePool
from fastkv_vllm.codecs import AffineCodec
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention, takes


def read_as_codes(rows: HeadRows[Held], pool: PagePool) -> TypeGuard[HeadRows[EncodedPages]]:
    """Whether `CodeReads` has them: one query, all channels, int8, int4 or int2, and pages of rows."""
    held = rows.held
    return (
        rows.count == 1
        and isinstance(held, EncodedPages)
        and isinstance(held.codec, AffineCodec)
        and not held.drops_channels
        and isinstance(pool.layout, RowLayout)
        and takes(pool.layout.head_dim, held.codec.channels(pool.layout.head_dim), pool.cache.dtype)
    )


@dataclass(frozen=True)
class CodeReads:
    """Such rows of one codec; each (request, KV head) is a sequence.

    Fields:
        rows: in order.
        pool: of the engine.
    """

    rows: Sequence[HeadRows[EncodedPages]]
    pool: PagePool

    def attend(self, layer: int, query: torch.Tensor, scale: float, output: torch.Tensor) -> None:
        """Write attention of these rows in a layer; query and output [T, Hq, D] are the whole batch's."""
        codec = self.rows[0].held.codec
        assert isinstance(codec, AffineCodec), "see `read_as_codes`"
        num_heads, head_dim = self.pool.num_heads, self.pool.layout.head_dim
        queries = query[self._numbers].view(len(self.rows) * num_heads, -1, head_dim)
        found = encoded_attention(
            queries,
            self._encoded(layer),
            self._later(layer),
            num_bits=codec.num_bits,
            quant_group_size=codec.channels(head_dim),
            scale=scale,
        )
        output[self._numbers] = found.view(len(self.rows), -1, head_dim)

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """Of the rows in the batch, [R] int64."""
        return torch.tensor([r.first for r in self.rows])

    def _encoded(self, layer: int) -> PagedEntries:
        tables, lengths = self._stored
        return PagedEntries(self.pool.cache.view(torch.uint8).flatten(1), tables[layer], lengths[layer])

    @cached_property
    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and numbers of the encoded entries, [L, S, width] and [L, S] int32."""
        counts = torch.cat([r.held.counts for r in self.rows], dim=1) * self.pool.layout.block_size
        return _side_by_side([r.held.stored.pages for r in self.rows]), counts.to(torch.int32)

    def _later(self, layer: int) -> PagedEntries:
        tables, lengths = self._written_since
        return PagedEntries(self.pool.cache.flatten(1), tables[layer], lengths)

    @cached_property
    def _written_since(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and number of the entries after them, [L, S, width] and [S] int32."""
        size = self.pool.layout.block_size
        lengths = [r.num_tokens - r.held.num_whole * size for r in self.rows for _ in range(self.pool.num_heads)]
        tables = _side_by_side([self.pool.pages(r.blocks) for r in self.rows])
        return tables, torch.tensor(lengths, dtype=torch.int32)


def _side_by_side(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tables [L, H, width] of requests as one, [L, S, most] int32."""
    most = max(table.shape[2] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, most - table.shape[2])) for table in tables]
    return torch.cat(padded, dim=1).to(torch.int32)
