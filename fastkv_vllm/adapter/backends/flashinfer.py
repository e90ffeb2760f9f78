"""FlashInfer. Not run on a GPU yet: what its kernels are planned for and given is checked on ones in plain torch.

Its own kernels read pages by a plan that lies in a wrapper. vLLM keeps a wrapper for each kind of rows and plans once a
step, for all layers; here layers read pages of their own, and late layers rows of their own, so that each build takes
wrappers that no other of the step has. XQA and TensorRT-LLM's kernels take tables and lengths, without a plan.
"""

import copy
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadata,
    FlashInferMetadataBuilder,
)
from vllm.v1.utils import CpuGpuBuffer

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionBackend, CompressionMetadataBuilder
from fastkv_vllm.adapter.pages import RowLayout


class _PlannedBuilder(FlashInferMetadataBuilder):
    """vLLM's builder whose every build has wrappers and page lists of its own until `_taken` is cleared."""

    enable_cuda_graph: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.enable_cuda_graph = False  # of a wrapper: those that may be captured have none
        self._wrappers: dict[str, list[Any]] = defaultdict(list)  # by what they plan for
        self._taken: Counter[str] = Counter()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashInferMetadata:
        num_reqs = common_attn_metadata.num_reqs
        self.paged_kv_indptr = self._numbers(num_reqs + 1)
        self.paged_kv_last_page_len = self._numbers(num_reqs)
        with torch.device("cpu"):  # FlashInfer plans on the host and does not name it everywhere
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def _numbers(self, count: int) -> CpuGpuBuffer:
        return CpuGpuBuffer(count, dtype=torch.int32, device=self.device, pin_memory=False)

    def _compute_flashinfer_kv_metadata(self, num_blocks_np: np.ndarray, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.paged_kv_indices = torch.zeros(int(num_blocks_np.sum()), dtype=torch.int32, device=self.device)
        return super()._compute_flashinfer_kv_metadata(num_blocks_np, *args, **kwargs)

    def _get_prefill_wrapper(self, causal: bool = True) -> Any:
        self._prefill_wrapper = self._next("prefill")
        self._prefill_wrapper = super()._get_prefill_wrapper(causal)
        return self._keep("prefill", self._prefill_wrapper)

    def _get_decode_wrapper(self, *args: Any, **kwargs: Any) -> Any:
        self._decode_wrapper = self._next("decode")
        return self._keep("decode", super()._get_decode_wrapper(*args, **kwargs))

    def _next(self, kind: str) -> Any:
        """A wrapper that the step has not planned yet; None: there is none."""
        made, taken = self._wrappers[kind], self._taken[kind]
        return made[taken] if taken < len(made) else None

    def _keep(self, kind: str, wrapper: Any) -> Any:
        if self._taken[kind] == len(self._wrappers[kind]):
            self._wrappers[kind].append(wrapper)
        self._taken[kind] += 1
        return wrapper


class FlashInferCompressionBuilder(CompressionMetadataBuilder, _PlannedBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block_size = self.page_size

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        """Where decode takes tables and lengths, which stay in place; a plan would have to be made for each graph."""
        without_plan = super().get_cudagraph_support(*args, **kwargs) == AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if without_plan else AttentionCGSupport.NEVER

    def page_layout(self, dtype: torch.dtype) -> RowLayout:
        return RowLayout(self.block_size, self.head_dim, *self.cache_dtypes)

    def for_heads(self) -> "FlashInferCompressionBuilder":
        """A copy with the same scratch memory and wrappers, and masks for as many sequences as there can be."""
        self._get_workspace_buffer()
        builder, num_heads = copy.copy(self), self.num_kv_heads
        builder.num_qo_heads, builder.num_kv_heads = self.num_qo_heads // num_heads, 1
        builder.max_num_reqs, builder._decode_mask_cache = self.max_num_reqs * num_heads, {}
        return builder

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        self._taken.clear()
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def build_alike(self, metadata: Any, sequences: CommonAttentionMetadata) -> Any:
        # A plan is of its pages: that of another layer is of no use.
        return _PlannedBuilder.build(self, 0, sequences)


class FlashInferCompressionImpl(CompressionAttentionImpl, FlashInferImpl): ...


class FlashInferCompressionBackend(CompressionBackend, FlashInferBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashInferCompressionImpl]:
        return FlashInferCompressionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferCompressionBuilder]:
        return FlashInferCompressionBuilder
