"""vLLM's own attention on the small decoder: builders with a configuration of their own, and layers' attention."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.flash import SPLITS
from tests.small_decoder import BLOCK_SIZE, GROUP, HEAD_DIM, NUM_HEADS, Backend


def configuration(graphs: CUDAGraphMode = CUDAGraphMode.NONE) -> Any:
    """What the builders read of vLLM's configuration."""
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: NUM_HEADS * GROUP,
        get_num_kv_heads=lambda parallel: NUM_HEADS,
        get_head_size=lambda: HEAD_DIM,
        dtype=torch.float32,
        rswa_window=None,
        is_mm_prefix_lm=False,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=SPLITS),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(
            cudagraph_mode=graphs,
            max_cudagraph_capture_size=None if graphs == CUDAGraphMode.NONE else 4,
            cudagraph_capture_sizes=[] if graphs == CUDAGraphMode.NONE else [1, 2, 4],
            static_forward_context={},
            custom_op_log_check=lambda: None,
        ),
    )


def backend_of(cls: Any, graphs: CUDAGraphMode = CUDAGraphMode.NONE) -> Backend:
    """A class of `adapter/backends/` for the decoder."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_DIM, dtype=torch.float32)

    def attention() -> Any:
        with set_current_vllm_config(configuration(), check_compile=False):
            return cls.get_impl_cls()(NUM_HEADS * GROUP, HEAD_DIM, HEAD_DIM**-0.5, NUM_HEADS, None, None, "auto")

    return Backend(lambda device: cls.get_builder_cls()(spec, [], configuration(graphs), device), attention)
