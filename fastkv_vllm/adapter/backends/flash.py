"""FlashAttention. Not run on a GPU yet: what its kernel is given is checked on one written in plain torch."""

import copy

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionBackend, CompressionMetadataBuilder
from fastkv_vllm.adapter.pages import RowLayout


class FlashCompressionBuilder(CompressionMetadataBuilder, FlashAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def page_layout(self, dtype: torch.dtype) -> RowLayout:
        return RowLayout(self.block_size, self.headdim, *self.cache_dtypes)

    def for_heads(self) -> "FlashCompressionBuilder":
        """A copy that makes no schedule ahead: vLLM keeps one for graphs to read, and layers differ in length."""
        builder, num_heads = copy.copy(self), self.num_heads_kv
        builder.num_heads_q, builder.num_heads_kv = self.num_heads_q // num_heads, 1
        builder.aot_schedule = False
        builder.max_cudagraph_size = (self.max_cudagraph_size or 0) * num_heads
        return builder


class FlashCompressionImpl(CompressionAttentionImpl, FlashAttentionImpl): ...


class FlashCompressionBackend(CompressionBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashCompressionImpl]:
        return FlashCompressionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashCompressionBuilder]:
        return FlashCompressionBuilder
