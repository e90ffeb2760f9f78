"""FlashAttention. Not run on a GPU yet: what its kernel is given is checked on one written in plain torch."""

import copy

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionBackend, CompressionMetadataBuilder
from fastkv_vllm.adapter.pages import RowLayout


class FlashCompressionBuilder(CompressionMetadataBuilder, FlashAttentionMetadataBuilder):
    def page_layout(self, dtype: torch.dtype) -> RowLayout:
        return RowLayout(self.block_size, self.headdim)

    def for_heads(self) -> "FlashCompressionBuilder":
        builder = copy.copy(self)
        builder.num_heads_q, builder.num_heads_kv = self.num_heads_q // self.num_heads_kv, 1
        return builder


class FlashCompressionImpl(CompressionAttentionImpl, FlashAttentionImpl): ...


class FlashCompressionBackend(CompressionBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashCompressionImpl]:
        return FlashCompressionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashCompressionBuilder]:
        return FlashCompressionBuilder
