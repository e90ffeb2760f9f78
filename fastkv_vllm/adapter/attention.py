"""Attention that reads where compression has put the entries and compacts prompts that end: what all backends share.

A backend of `backends/` is three classes, each one of these before vLLM's own: writes are vLLM's, and so is every
kernel that reads. Rows that are read head by head go to the same kernel as one sequence per (request, KV head).
"""

import copy
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_layout import KVCacheLayout

from fastkv_vllm.adapter.batch import (
    Batch,
    DecodeRows,
    LayerRows,
    PrefillRows,
    take_requests,
    take_sequences,
)
from fastkv_vllm.adapter.codes import CodeBuffers, CodeReads, alike, read_as_codes
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.device import made_on
from fastkv_vllm.adapter.encoded import EncodedPages, EncodedReads
from fastkv_vllm.adapter.kv_cache import CompressibleSpec
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.pages import PageLayout
from fastkv_vllm.adapter.ragged import HeadPages
from fastkv_vllm.adapter.reads import HeadReads, HeadRows, ReadBuffers, rows_of
from fastkv_vllm.adapter.revival import RevivalStep

_layer_index = cache(extract_layer_index)  # it takes a name apart, in every layer of every step


@dataclass
class CompressionMetadata:
    """vLLM's metadata, the prompts to compress, the rows that vote on, and those that are read head by head.

    Where there are `reads`, of pages as they are and of encoded ones that are decoded, or `codes`, read as they are,
    `plain` is of the other requests, whose rows are `plain_rows`; both are None where there are none. With `revival`
    rows that come back stand at the batch's end.
    """

    plain: Any
    max_query_len: int
    prefills: tuple[PrefillRows, ...] = ()
    decodes: tuple[DecodeRows, ...] = ()
    compressor: Compressor | None = None
    reads: tuple[HeadReads, ...] = ()
    codes: tuple[CodeReads, ...] = ()
    plain_rows: torch.Tensor | None = None
    revival: RevivalStep | None = None


class CompressionMetadataBuilder(AttentionMetadataBuilder):
    """Builds metadata of the step the runner has put into `batch`; without one it is vLLM's builder.

    `view` keeps what the last build read from: vLLM's common metadata past the null blocks. `takes_codes`: attention is
    a softmax of scaled products and nothing else, so that ours may read codes in the place of vLLM's.
    """

    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    block_size: int
    takes_codes: bool = False
    batch: Batch | None = None
    compressor: Compressor | None = None
    view: CommonAttentionMetadata | None = None
    _buffers: ReadBuffers | None = None
    _graph_buffers: ReadBuffers | None = None
    _code_buffers: Mapping[object, CodeBuffers] = MappingProxyType({})

    @abstractmethod
    def page_layout(self, dtype: torch.dtype) -> PageLayout:
        """How this backend lays out a page inside."""

    @property
    def cache_dtypes(self) -> tuple[torch.dtype, str]:
        """The model's dtype, and vLLM's name of the cache's."""
        return self.vllm_config.model_config.dtype, self.vllm_config.cache_config.cache_dtype

    def for_heads(self) -> "CompressionMetadataBuilder":
        """A copy that builds metadata of sequences of one KV head each."""
        return copy.copy(self)

    @cached_property
    def _of_heads(self) -> "CompressionMetadataBuilder":
        return self.for_heads()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if self.batch is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        with made_on(self.device):
            if self.batch.in_graph:
                held = _as_they_are(self.batch.held)
                assert len(held) == len(self.batch.held), "the runner keeps others out of graphs"
                return self._build_in_graph(common_attn_metadata, held)
            self.view = self.batch.read_view(common_attn_metadata)
            return self.build_for(self.view, self.batch.prefills, self.batch.decodes, self.batch.held)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> CompressionMetadata:
        """A graph has one form, so it reads every request head by head, whatever is held of it.

        vLLM captures the largest batch first: graphs of smaller ones read a part of the same tensors.
        """
        with made_on(self.device):
            assert self.compressor is not None, "set up with the cache"
            pool, table = self.compressor.pool, common_attn_metadata.block_table_tensor
            self._graph_buffers = self._graph_buffers or ReadBuffers(pool, table.shape[0], table.shape[1], stays=True)
            held = dict.fromkeys(range(common_attn_metadata.num_reqs), HeadPages.none(pool, 0))
            return self._build_in_graph(common_attn_metadata, held)

    def _build_in_graph(self, common: CommonAttentionMetadata, held: Mapping[int, HeadPages]) -> CompressionMetadata:
        """Metadata in tensors that stay, of requests that decode a token each and of padding behind them."""
        assert self._graph_buffers is not None, "made when graphs are captured"
        reads = self._graph_buffers.write(rows_of(held, common, self.block_size), common.num_reqs)
        # The longest there can be: a number is the graph's for good.
        reads.metadata = self._of_sequences(reads, common, common.max_seq_len)
        return CompressionMetadata(None, common.max_query_len, reads=(reads,))

    def build_for(
        self,
        view: CommonAttentionMetadata,
        prefills: tuple[PrefillRows, ...],
        decodes: tuple[DecodeRows, ...],
        held: Mapping[int, Held],
    ) -> CompressionMetadata:
        """Metadata of rows whose reads are already in `view`, but for the requests in `held`.

        Args:
            view: of the requests; only those not in `held` are read through its tables.
            prefills: requests with an unfinished prompt.
            decodes: compressed requests whose entries are rated.
            held: number of a request in `view` -> its pages.
        """
        metadata = CompressionMetadata(None, view.max_query_len, prefills, decodes, self.compressor)
        if not held:
            return replace(metadata, plain=super().build(0, view))
        starts = view.query_start_loc_cpu.tolist()
        others = [i for i in range(view.num_reqs) if i not in held]
        if others:
            metadata.plain = super().build(0, take_requests(view, others, [starts[i + 1] - starts[i] for i in others]))
            metadata.plain_rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in others])
        metadata.reads, metadata.codes = self._head_reads(view, held)
        metadata.revival = None if self.batch is None else self.batch.revival
        return metadata

    def _head_reads(
        self, view: CommonAttentionMetadata, held: Mapping[int, Held]
    ) -> tuple[tuple[HeadReads, ...], tuple[CodeReads, ...]]:
        assert self.compressor is not None, "set up with the cache"
        pool, reads = self.compressor.pool, []
        if as_they_are := _as_they_are(held):
            self._buffers = self._buffers or ReadBuffers(pool)
            reads.append(self._buffers.write(rows_of(as_they_are, view, self.block_size), len(as_they_are)))
        encoded = {number: pages for number, pages in held.items() if not isinstance(pages, HeadPages)}
        copied: list[HeadRows[EncodedPages | MergedPages]] = []
        codes: dict[object, list[HeadRows[EncodedPages | MergedPages]]] = defaultdict(list)
        for rows in rows_of(encoded, view, self.block_size):
            if self.takes_codes and read_as_codes(rows, pool):
                codes[alike(rows.held)].append(rows)
            else:
                copied.append(rows)
        if copied:
            reads.append(EncodedReads(copied, pool))
        for part in reads:
            part.metadata = self._of_sequences(part, view)
        self._code_buffers = {kind: self._code_buffers.get(kind) or CodeBuffers(pool) for kind in codes}
        return tuple(reads), tuple(self._code_buffers[kind].write(of_kind) for kind, of_kind in codes.items())

    def _of_sequences(
        self, reads: HeadReads, view: CommonAttentionMetadata, max_seq_len: int | None = None
    ) -> list[Any]:
        """vLLM's metadata of the sequences of each layer, the longest of which has `max_seq_len` entries if given."""
        sequences, metadata = take_sequences(view, reads), []
        sequences.max_seq_len = max_seq_len or sequences.max_seq_len
        for layer, (table, lengths) in enumerate(zip(reads.tables, reads.seq_lens, strict=True)):
            sequences.block_table_tensor, sequences.seq_lens = table, lengths
            sequences.seq_lens_cpu_upper_bound = reads.host_seq_lens[layer]
            if reads.like[layer] == layer:
                metadata.append(super(CompressionMetadataBuilder, self._of_heads).build(0, sequences))
            else:
                metadata.append(self._of_heads.build_alike(metadata[reads.like[layer]], sequences))
        return metadata

    def build_alike(self, metadata: Any, sequences: CommonAttentionMetadata) -> Any:
        """vLLM's metadata of sequences as long as those of `metadata`, in other pages."""
        metadata = copy.copy(metadata)
        metadata.block_table, metadata.seq_lens = sequences.block_table_tensor, sequences.seq_lens
        return metadata


def _as_they_are(held: Mapping[int, Held]) -> dict[int, HeadPages]:
    """Those whose pages attention reads where they lie."""
    return {number: pages for number, pages in held.items() if isinstance(pages, HeadPages)}


class CompressionAttentionImpl(AttentionImpl):
    """Attention as ever, then the compaction of the prompts that end."""

    num_kv_heads: int
    num_queries_per_kv: int

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = (output_scale, output_block_scale)
        if not isinstance(attn_metadata, CompressionMetadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        with made_on(query.device):
            if attn_metadata.reads or attn_metadata.codes:
                self._forward_heads(layer, query, key, value, kv_cache, attn_metadata, output)
            else:
                super().forward(layer, query, key, value, kv_cache, attn_metadata.plain, output, *scales)
            if attn_metadata.prefills or attn_metadata.decodes:
                assert attn_metadata.compressor is not None, "set with the prefills"
                layer_index, layout = _layer_index(layer.layer_name), attn_metadata.compressor.layout
                scale = self.scale if layout.float8 is None else self.scale * layer._k_scale_float
                if query.dtype != key.dtype:  # cut down to eight bits as well
                    query, scale = query.to(key.dtype), scale * layer._q_scale_float
                rows = LayerRows(layer_index, scale, query, key, value, kv_cache, layout)
                attn_metadata.compressor.after_attention(attn_metadata.prefills, attn_metadata.decodes, rows)
        return output

    @cached_property
    def _of_heads(self) -> "CompressionAttentionImpl":
        """The same attention, of sequences of one KV head each."""
        impl = copy.copy(self)
        impl.num_heads, impl.num_kv_heads = self.num_queries_per_kv, 1
        return impl

    def _forward_heads(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CompressionMetadata,
        output: torch.Tensor,
    ) -> None:
        """A call each: requests with pages per head as one sequence per KV head, all others the ordinary way.

        Rows that come back write their entries before, and are answered after.
        """
        index, revival = _layer_index(layer.layer_name), metadata.revival
        if revival is not None:
            revival.write(index, key, value, metadata.reads[0].pool)
        self._read_heads(layer, query, key, value, kv_cache, metadata, output)
        for codes in metadata.codes:
            codes.attend(index, query, self.scale, output.view(query.shape))
        if revival is not None:
            revival.attend(index, query, self.scale, metadata.reads[0], output.view(query.shape))
            revival.choose(index, query, self.scale, metadata.reads[0])

    def _read_heads(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CompressionMetadata,
        output: torch.Tensor,
    ) -> None:
        if metadata.plain is not None:
            rows = metadata.plain_rows
            part = torch.empty_like(output[rows])
            super().forward(layer, query[rows], key, value, kv_cache, metadata.plain, part)
            output[rows] = part
        of_heads = super(CompressionAttentionImpl, self._of_heads).forward
        layer_index, shape = _layer_index(layer.layer_name), (self.num_queries_per_kv, self.head_size)
        if metadata.plain is None and metadata.max_query_len == 1 and len(metadata.reads) == 1 and not metadata.codes:
            (reads,) = metadata.reads  # queries stand sequence by sequence
            of_sequences = reads.cache(layer_index), reads.metadata[layer_index]
            of_heads(layer, query.reshape(-1, *shape), key, value, *of_sequences, output.view(-1, *shape))
            return
        for reads in metadata.reads:
            rows, heads = reads.queries
            ours = query.view(query.shape[0], self.num_kv_heads, *shape)[rows, heads]
            part = torch.empty_like(ours, dtype=output.dtype)
            of_heads(layer, ours, key, value, reads.cache(layer_index), reads.metadata[layer_index], part)
            output.view(output.shape[0], self.num_kv_heads, *shape)[rows, heads] = part

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        count = slot_mapping.shape[0]  # rows that come back have no slots: they go to places that `revival` knows
        super().do_kv_cache_update(layer, key[:count], value[:count], kv_cache, slot_mapping)


class CompressionBackend(AttentionBackend):
    """Registered over one of vLLM's backends while a compressing worker loads its model."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a page is one run of memory, and each KV head of a block has its own

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"compression needs layers of full attention and a layer has {type(spec).__name__}; serve this model "
                "without --kv-compression"
            )
        return replace_as(spec, CompressibleSpec)
