"""vLLM's Triton attention. Not run on a GPU yet: its kernels are checked in Triton's interpreter."""

import copy

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionBackend, CompressionMetadataBuilder
from fastkv_vllm.adapter.pages import RowLayout


class TritonCompressionBuilder(CompressionMetadataBuilder, TritonAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def page_layout(self, dtype: torch.dtype) -> RowLayout:
        return RowLayout(self.block_size, self.headdim, *self.cache_dtypes)

    def for_heads(self) -> "TritonCompressionBuilder":
        """A copy with the same scratch memory seen as that of as many programs: more sequences of fewer heads."""
        builder, num_heads = copy.copy(self), self.num_heads_kv
        builder.num_heads_q, builder.num_heads_kv = self.num_heads_q // num_heads, 1
        builder.seq_threshold_3D = self.seq_threshold_3D * num_heads
        builder.max_seqs_64_segments = self.max_seqs_64_segments * num_heads
        for name in ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"):
            setattr(builder, name, getattr(self, name).unflatten(1, (num_heads, -1)).flatten(0, 1))
        return builder


class TritonCompressionImpl(CompressionAttentionImpl, TritonAttentionImpl): ...


class TritonCompressionBackend(CompressionBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonCompressionImpl]:
        return TritonCompressionImpl

    @staticmethod
    def get_builder_cls() -> type[TritonCompressionBuilder]:
        return TritonCompressionBuilder
