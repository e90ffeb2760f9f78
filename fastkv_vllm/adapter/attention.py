"""The CPU attention backend, reading past null blocks and compacting prompts that end."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

from fastkv_vllm.adapter.batch import Batch, PrefillRows
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.kv_cache import CompressibleSpec


@dataclass
class CompressionMetadata(CPUAttentionMetadata):
    """The engine's metadata and the prompts to compress."""

    prefills: tuple[PrefillRows, ...] = ()
    compressor: Compressor | None = None


class CompressionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata of the step the runner has put into `batch`; without one it is vLLM's builder.

    `view` keeps what the last build read from: vLLM's common metadata past the null blocks.
    """

    batch: Batch | None = None
    compressor: Compressor | None = None
    view: CommonAttentionMetadata | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        if self.batch is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        self.view = self.batch.read_view(common_attn_metadata)
        return self.build_for(self.view, self.batch.prefills)

    def build_for(self, view: CommonAttentionMetadata, prefills: tuple[PrefillRows, ...]) -> CompressionMetadata:
        """Metadata of rows whose reads are already in `view`."""
        metadata = super().build(0, view)
        return CompressionMetadata(**vars(metadata), prefills=prefills, compressor=self.compressor)


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
        output = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        if isinstance(attn_metadata, CompressionMetadata) and attn_metadata.prefills:
            assert attn_metadata.compressor is not None, "set with the prefills"
            attn_metadata.compressor.after_attention(
                attn_metadata.prefills,
                layer=extract_layer_index(layer.layer_name),
                scale=self.scale,
                query=query,
                key=key,
                value=value,
                kv_cache=kv_cache,
                isa=layer.isa,
            )
        return output


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
