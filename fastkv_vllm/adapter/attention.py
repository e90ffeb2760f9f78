"""The CPU attention backend: reads where compression has put the entries, compacts prompts that end."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

from fastkv_vllm.adapter.batch import Batch, DecodeRows, LayerRows, PrefillRows, take_requests
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.encoded import EncodedReads
from fastkv_vllm.adapter.kv_cache import CompressibleSpec
from fastkv_vllm.adapter.merged import Held
from fastkv_vllm.adapter.ragged import HeadPages, HeadReads, TableCache, rows_of
from fastkv_vllm.adapter.revival import RevivalStep

_layer_index = cache(extract_layer_index)  # it takes a name apart, in every layer of every step


@dataclass
class CompressionMetadata(CPUAttentionMetadata):
    """The engine's metadata, the prompts to compress, the rows that vote on, and those that are read head by head.

    Where there are `reads`, of pages as they are and of encoded ones, the metadata's own tables are not used: `plain`
    has those of the other requests, whose rows are `plain_rows`; both are None where there are none. With `revival`
    rows that come back stand at the batch's end.
    """

    prefills: tuple[PrefillRows, ...] = ()
    decodes: tuple[DecodeRows, ...] = ()
    compressor: Compressor | None = None
    reads: tuple[HeadReads, ...] = ()
    plain: CPUAttentionMetadata | None = None
    plain_rows: torch.Tensor | None = None
    revival: RevivalStep | None = None


class CompressionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata of the step the runner has put into `batch`; without one it is vLLM's builder.

    `view` keeps what the last build read from: vLLM's common metadata past the null blocks.
    """

    batch: Batch | None = None
    compressor: Compressor | None = None
    view: CommonAttentionMetadata | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables = TableCache()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        if self.batch is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        self.view = self.batch.read_view(common_attn_metadata)
        return self.build_for(self.view, self.batch.prefills, self.batch.decodes, self.batch.held)

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
        if not held:
            plain = super().build(0, view)
            return CompressionMetadata(**vars(plain), prefills=prefills, decodes=decodes, compressor=self.compressor)
        starts = view.query_start_loc.tolist()
        others = [i for i in range(view.num_reqs) if i not in held]
        plain, plain_rows = None, None
        if others:
            plain = super().build(0, take_requests(view, others, [starts[i + 1] - starts[i] for i in others]))
            plain_rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in others])
        return CompressionMetadata(
            num_actual_tokens=view.num_actual_tokens,
            max_query_len=view.max_query_len,
            query_start_loc=view.query_start_loc,
            max_seq_len=view.max_seq_len,
            seq_lens=view.seq_lens,
            block_table=view.block_table_tensor,
            slot_mapping=view.slot_mapping,
            scheduler_metadata=None,
            prefills=prefills,
            decodes=decodes,
            compressor=self.compressor,
            reads=self._head_reads(view, held),
            plain=plain,
            plain_rows=plain_rows,
            revival=None if self.batch is None else self.batch.revival,
        )

    def _head_reads(self, view: CommonAttentionMetadata, held: Mapping[int, Held]) -> tuple[HeadReads, ...]:
        assert self.compressor is not None, "set up with the cache"
        pool, reads = self.compressor.pool, []
        if as_they_are := {number: pages for number, pages in held.items() if isinstance(pages, HeadPages)}:
            rows = rows_of(as_they_are, view, self.block_size)
            reads.append(HeadReads(rows, pool, self._tables.tables(rows, pool)))
        if encoded := {number: pages for number, pages in held.items() if not isinstance(pages, HeadPages)}:
            reads.append(EncodedReads(rows_of(encoded, view, self.block_size), pool))
        for part in reads:
            part.metadata = self._schedules(part, view)
        return tuple(reads)

    def _schedules(self, reads: HeadReads, view: CommonAttentionMetadata) -> list[CPUAttentionMetadata]:
        """The engine's metadata of the sequences of each layer."""
        metadata = []
        schedules: dict[tuple[int, ...], torch.Tensor] = {}
        for table, lengths, key in zip(reads.tables, reads.seq_lens, map(tuple, reads.seq_lens.tolist()), strict=True):
            if key not in schedules:  # layers of equal lengths share one
                schedules[key] = ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(key),
                    num_heads=self.num_heads // self.num_kv_heads,
                    num_kv_heads=1,
                    head_dim=self.head_dim,
                    seq_lens=lengths,
                    dtype=self.dtype,
                    query_start_loc=reads.query_start,
                    causal=True,
                    sliding_window_size=self.window_size,
                    isa=self.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=self.kv_cache_dtype,
                )
            metadata.append(
                CPUAttentionMetadata(
                    num_actual_tokens=int(reads.query_start[-1]),
                    max_query_len=max(row.count for row in reads.rows),
                    query_start_loc=reads.query_start,
                    max_seq_len=max(key),
                    seq_lens=lengths,
                    block_table=table,
                    slot_mapping=view.slot_mapping,
                    scheduler_metadata=schedules[key],
                )
            )
        return metadata


class CompressionAttentionImpl(CPUAttentionBackendImpl):
    """Attention as ever, then the compaction of the prompts that end."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, CompressionMetadata) and attn_metadata.reads:
            self._forward_heads(layer, query, key, value, kv_cache, attn_metadata, output)
        else:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if isinstance(attn_metadata, CompressionMetadata) and (attn_metadata.prefills or attn_metadata.decodes):
            assert attn_metadata.compressor is not None, "set with the prefills"
            layer_index, layout = _layer_index(layer.layer_name), attn_metadata.compressor.layout
            rows = LayerRows(layer_index, self.scale, query, key, value, kv_cache, layout)
            attn_metadata.compressor.after_attention(attn_metadata.prefills, attn_metadata.decodes, rows)
        return output

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
        index, revival, reads = _layer_index(layer.layer_name), metadata.revival, metadata.reads[0]
        if revival is not None:
            revival.write(index, key, value, reads.pool)
        self._read_heads(layer, query, key, value, kv_cache, metadata, output)
        if revival is not None:
            revival.attend(index, query, self.scale, reads, output.view(query.shape))
            revival.choose(index, query, self.scale, reads)

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
        layer_index, shape = _layer_index(layer.layer_name), (self.num_queries_per_kv, self.head_size)
        if metadata.plain is None and metadata.max_query_len == 1 and len(metadata.reads) == 1:
            (reads,) = metadata.reads  # queries stand sequence by sequence
            num_tokens, schedule = metadata.num_actual_tokens, reads.metadata[layer_index]
            ours, part = query[:num_tokens].reshape(-1, *shape), output[:num_tokens].view(-1, *shape)
            super().forward(layer, ours, key, value, reads.cache(layer_index), schedule, part)
            return
        for reads in metadata.reads:
            rows, heads = reads.queries
            ours = query.view(query.shape[0], self.num_kv_heads, *shape)[rows, heads]
            part = torch.empty_like(ours)
            super().forward(layer, ours, key, value, reads.cache(layer_index), reads.metadata[layer_index], part)
            output.view(output.shape[0], self.num_kv_heads, *shape)[rows, heads] = part

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        count = slot_mapping.shape[0]  # rows that come back have no slots: they go to places that `revival` knows
        super().do_kv_cache_update(layer, key[:count], value[:count], kv_cache, slot_mapping)


class CompressionBackend(CPUAttentionBackend):
    """Registered over CPU_ATTN while a compressing worker loads its model."""

    @staticmethod
    def get_impl_cls() -> type[CompressionAttentionImpl]:
        return CompressionAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressionMetadataBuilder]:
        return CompressionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"compression needs layers of full attention and a layer has {type(spec).__name__}; serve this model "
                "without --kv-compression"
            )
        return replace_as(spec, CompressibleSpec)
