"""FlashInfer's kernels in plain torch, as its documentation has them, strict about what the compiled ones are given.

It is not installed where there is no GPU, and vLLM's backend imports it: names that are called are written here.
"""

import sys
from collections import Counter
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.adapter.backends import BACKENDS
from tests.flash import attend, reshape_and_cache_flash

VLLM_BACKEND = "vllm.v1.attention.backends.flashinfer"
OURS = "fastkv_vllm.adapter.backends.flashinfer"


def install(monkeypatch: pytest.MonkeyPatch, *, hopper: bool = False) -> Counter[tuple[str, str]]:
    """Let the CPU engine run on it; the result counts its calls: read by heads or ordinary, prefill, decode or XQA.

    Args:
        monkeypatch: takes all of it back.
        hopper: decode by XQA, which reads tables; else by a plan, as on an A100.
    """
    calls: Counter[tuple[str, str]] = Counter()
    backend = _vllm_backend(monkeypatch, calls)
    monkeypatch.setitem(BACKENDS, "CPU_ATTN", BACKENDS["FLASHINFER"])
    builder = backend.FlashInferMetadataBuilder
    monkeypatch.setattr(builder, "_get_workspace_buffer", lambda self: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(backend, "can_use_trtllm_attention", lambda *args, **kwargs: hopper)  # asked of decode only
    monkeypatch.setattr(backend, "use_trtllm_attention", lambda *args, **kwargs: False)
    kernel = backend.FlashInferDecodeKernel.XQA
    monkeypatch.setattr(builder, "_get_flashinfer_trtllm_api_decode_kernel", staticmethod(lambda: kernel))
    monkeypatch.setattr(backend, "_is_xqa_head_dim_supported", lambda head_dim: True)  # the tests' are smaller
    monkeypatch.setattr(backend, "_get_trtllm_workspace_buffer", lambda: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(backend, "_copy_page_indices_kernel", {(n,): copy_page_indices for n in range(1, 10_000)})

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        Wrapper.num_steps += 1
        return build_of_step(self, *args, **kwargs)

    ours = sys.modules[OURS].FlashInferCompressionBuilder
    build_of_step = ours.build
    monkeypatch.setattr(ours, "build", build)

    def xqa(**arguments: Any) -> None:
        calls["heads" if arguments["kv_cache"][0].shape[1] == 1 else "ordinary", "xqa"] += 1
        xqa_batch_decode(**arguments)

    monkeypatch.setattr(backend, "flashinfer_xqa_batch_decode_with_kv_cache", xqa)
    monkeypatch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", reshape_and_cache_flash, raising=False)
    return calls


def _vllm_backend(monkeypatch: pytest.MonkeyPatch, calls: Counter[tuple[str, str]]) -> ModuleType:
    """vLLM's module and ours over it, imported with these kernels and gone with them."""

    class Prefill(Wrapper):
        def run(self, q: Tensor, kv_cache: tuple[Tensor, Tensor], **arguments: Any) -> None:
            calls["heads" if kv_cache[0].shape[1] == 1 else "ordinary", "prefill"] += 1
            super().run(q, kv_cache, **arguments)

    class Decode(Wrapper):
        def plan(self, *, indptr: Tensor, indices: Tensor, last_page_len: Tensor, head_dim: int, **others: Any) -> None:
            assert others.pop("pos_encoding_mode") == "NONE" and others.pop("block_tables") is None
            assert others.pop("non_blocking") and others.pop("data_type") is None
            assert others.pop("rope_scale") is None and others.pop("rope_theta") is None
            super().plan(
                qo_indptr=torch.arange(len(indptr), dtype=torch.int32),
                paged_kv_indptr=indptr,
                paged_kv_indices=indices,
                paged_kv_last_page_len=last_page_len,
                head_dim_qk=head_dim,
                causal=True,
                **others,
            )

        def run(self, q: Tensor, kv_cache: tuple[Tensor, Tensor], *, sinks: None, **arguments: Any) -> None:
            calls["heads" if kv_cache[0].shape[1] == 1 else "ordinary", "decode"] += 1
            super().run(q, kv_cache, **arguments)

    class Unused: ...

    names: dict[str, dict[str, Any]] = {
        "flashinfer": {
            "BatchAttentionWithAttentionSinkWrapper": Unused,
            "BatchDecodeWithPagedKVCacheWrapper": Decode,
            "BatchPrefillWithPagedKVCacheWrapper": Prefill,
            "BatchPrefillWithRaggedKVCacheWrapper": Unused,
            "get_seq_lens": get_seq_lens,
            "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": None,
        },
        "flashinfer.decode": {"fast_decode_plan": None, "trtllm_batch_decode_with_kv_cache": None},
        "flashinfer.prefill": {"trtllm_batch_context_with_kv_cache": None},
        "flashinfer.utils": {"FP4Tensor": Unused},
    }
    with pytest.MonkeyPatch.context() as while_imported:
        for name, attributes in names.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            while_imported.setitem(sys.modules, name, module)
        for name in (VLLM_BACKEND, OURS):
            sys.modules.pop(name, None)
            monkeypatch.setitem(sys.modules, name, import_module(name))
    return sys.modules[VLLM_BACKEND]


class Wrapper:
    """A plan of attention over pages, [pages, H, page_size, D], and the calls it is used in."""

    is_cuda_graph_enabled = False
    num_steps = 0

    def __init__(self, workspace: Tensor, layout: str, **unused: object) -> None:
        assert layout == "HND"
        self.step = -1  # of the plan

    def plan(
        self,
        *,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        o_data_type: torch.dtype,
        seq_lens: Tensor,
        fixed_split_size: int,
        disable_split_kv: bool,
    ) -> None:
        """What the calls after it are given; page lists are kept, not copied, as FlashInfer keeps them."""
        assert self.step < Wrapper.num_steps, "rows of this step may still want the plan before"
        assert causal and window_left == -1 and not logits_soft_cap and fixed_split_size == -1 and not disable_split_kv
        numbers = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {each.dtype for each in numbers} == {torch.int32}
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert int(paged_kv_indptr[-1]) <= len(paged_kv_indices)
        assert torch.equal(seq_lens, get_seq_lens(paged_kv_indptr, paged_kv_last_page_len, page_size))
        self.step = Wrapper.num_steps
        self._window_left, self._logits_soft_cap, self._sm_scale, self._causal = window_left, 0.0, sm_scale, causal
        self._shape = (num_kv_heads, page_size, head_dim_qk)
        self._num_qo_heads, self._dtypes = num_qo_heads, (q_data_type, kv_data_type, o_data_type)
        self._counts, self._lengths = qo_indptr.diff().tolist(), seq_lens.tolist()
        self._indptr, self._indices = paged_kv_indptr.tolist(), paged_kv_indices

    def run(
        self,
        q: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        *,
        q_scale: float,
        k_scale: float,
        v_scale: float,
        out: Tensor,
        kv_cache_sf: None,
    ) -> None:
        assert q.shape == out.shape == (sum(self._counts), self._num_qo_heads, self._shape[2])
        assert kv_cache[0].shape[1:] == kv_cache[1].shape[1:] == self._shape
        assert (q.dtype, kv_cache[0].dtype, out.dtype) == self._dtypes
        assert all(each.stride(-1) == 1 for each in (q, *kv_cache, out))
        pages = [self._indices[first:end] for first, end in pairwise(self._indptr)]  # the first need not be 0
        keys, values = (
            [cache[of].float().transpose(1, 2) * scale for of in pages]
            for cache, scale in zip(kv_cache, (k_scale, v_scale), strict=True)
        )
        attend(q * q_scale, keys, values, out, self._counts, self._lengths, self._sm_scale)


def get_seq_lens(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Entries of sequences that hold so many pages, the last one in part; none where there is no page."""
    return ((indptr.diff() - 1).clamp(min=0) * page_size + last_page_len).to(torch.int32)


def copy_page_indices(indices: Tensor, table: Tensor, stride: int, indptr: Tensor, BLOCK_SIZE: int) -> None:
    """Tables' rows, each as far as it goes, one after the other; in the place of vLLM's own kernel."""
    starts = indptr.tolist()
    assert table.stride(0) == stride and len(indices) == starts[-1]
    for row, (start, end) in enumerate(pairwise(starts)):
        indices[start:end] = table[row, : end - start]


def xqa_batch_decode(
    *,
    query: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    window_left: int,
    out: Tensor,
    kv_layout: str,
    q_len_per_req: int,
    q_cu_seq_lens: Tensor | None,
    mask: Tensor | None,
    **unused: object,
) -> None:
    """Attention of sequences over pages of their tables: as many queries each, or what `q_cu_seq_lens` says."""
    assert unused["kv_cache_sf"] is None and unused["sinks"] is None
    assert kv_layout == "HND" and window_left == -1 and bmm2_scale == 1
    assert block_tables.dtype == seq_lens.dtype == torch.int32 and int(seq_lens.max()) <= max_seq_len
    num_seqs = len(seq_lens)
    counts = [q_len_per_req] * num_seqs if q_cu_seq_lens is None else q_cu_seq_lens.diff().tolist()
    assert len(block_tables) == len(counts) == num_seqs and max(counts) == q_len_per_req
    assert query.shape == out.shape and len(query) == sum(counts)
    if q_len_per_req == 1:
        assert mask is None
    else:  # bits of the rows before each: of every sequence, or row by row
        assert mask is not None and len(mask) == (num_seqs if q_cu_seq_lens is None else len(query))
    pages = [t[: -(-n // kv_cache[0].shape[2])] for t, n in zip(block_tables, seq_lens.tolist(), strict=True)]
    keys, values = ([cache[of].transpose(1, 2) for of in pages] for cache in kv_cache)
    attend(query, keys, values, out, counts, seq_lens.tolist(), bmm1_scale)
