"""The CPU engine's attention."""

import copy

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionBackend, CompressionMetadataBuilder
from fastkv_vllm.adapter.pages import ProbedLayout


class CPUCompressionBuilder(CompressionMetadataBuilder, CPUAttentionMetadataBuilder):
    def page_layout(self, dtype: torch.dtype) -> ProbedLayout:
        return ProbedLayout.probe(
            block_size=self.block_size,
            head_dim=self.head_dim,
            dtype=self.dtype,
            isa=self.isa,
            cache_dtype=self.kv_cache_dtype,
        )

    def for_heads(self) -> "CPUCompressionBuilder":
        builder = copy.copy(self)
        builder.num_heads, builder.num_kv_heads = self.num_heads // self.num_kv_heads, 1
        return builder


class CPUCompressionImpl(CompressionAttentionImpl, CPUAttentionBackendImpl): ...


class CPUCompressionBackend(CompressionBackend, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUCompressionImpl]:
        return CPUCompressionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUCompressionBuilder]:
        return CPUCompressionBuilder
