"""FlashAttention in plain torch, as its documentation has it, strict about what the compiled one takes for granted."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends import flash_attn

from fastkv_vllm.adapter.backends import BACKENDS
from tests.reference.codecs import cut

VERSION = 3  # Hopper's, which takes a schedule made ahead
SPLITS = 32  # at most, where graphs are captured; else the kernel chooses


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Let the CPU engine run on it; the result counts its calls: read by heads or ordinary, prefill or decode."""
    calls: Counter[tuple[str, str]] = Counter()

    def attend(*, q: Tensor, k: Tensor, max_seqlen_q: int, **arguments: object) -> None:
        calls["heads" if k.shape[2] == 1 else "ordinary", "decode" if max_seqlen_q == 1 else "prefill"] += 1
        flash_attn_varlen_func(q=q, k=k, max_seqlen_q=max_seqlen_q, **arguments)

    monkeypatch.setitem(BACKENDS, "CPU_ATTN", BACKENDS["FLASH_ATTN"])
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: VERSION)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **kwargs: True)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)  # else all are rounded
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", attend, raising=False)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", get_scheduler_metadata, raising=False)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", reshape_and_cache_flash, raising=False)
    return calls


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    scheduler_metadata: Tensor | None,
    fa_version: int,
    q_descale: Tensor | None,
    k_descale: Tensor,
    v_descale: Tensor,
    num_splits: int,
    **unused: object,
) -> None:
    """Attention of sequences whose queries lie one after the other and whose keys and values lie in pages.

    Args:
        q, out: [T, Hq, D].
        k, v: [pages, page_size, H, D].
        cu_seqlens_q: first query of each sequence and their number, [S + 1] int32.
        max_seqlen_q, max_seqlen_k: at least the most of a sequence.
        seqused_k: keys of each sequence, the last of which is its last query's own, [S] int32.
        block_table: pages of each sequence, [S, width] int32.
        scheduler_metadata: of `get_scheduler_metadata` for this very call, or None: made in it.
        q_descale, k_descale, v_descale: factors of each sequence and KV head, [S, H] float32; where the cache has eight
            bits and queries have not, they have none.
    """
    assert causal and fa_version == VERSION and num_splits in (0, SPLITS)
    assert unused["window_size"] in (None, [-1, -1]) and not unused["softcap"]
    assert all(unused[name] is None for name in ("alibi_slopes", "dynamic_causal", "s_aux", "mask_mod", "aux_tensors"))
    num_seqs, num_heads, group = len(seqused_k), k.shape[2], q.shape[1] // k.shape[2]
    assert {t.dtype for t in (cu_seqlens_q, seqused_k, block_table)} == {torch.int32}
    assert len(cu_seqlens_q) == num_seqs + 1 and block_table.shape[0] == num_seqs and block_table.stride(1) == 1
    assert k.shape == v.shape and all(t.stride(-1) == 1 for t in (q, k, v, out)) and out.shape == q.shape
    q_descale = torch.ones_like(k_descale) if q_descale is None else q_descale
    assert k_descale.shape == v_descale.shape == q_descale.shape == (num_seqs, num_heads)
    assert k.dtype == v.dtype and q.dtype in (k.dtype, out.dtype)
    counts = cu_seqlens_q.diff()
    assert int(counts.max()) <= max_seqlen_q and int(seqused_k.max()) <= max_seqlen_k and len(q) >= cu_seqlens_q[-1]
    made_for = schedule(num_seqs, max_seqlen_q, max_seqlen_k, q.shape[1], num_heads, q.shape[2], k.shape[1], seqused_k)
    assert scheduler_metadata is None or torch.equal(scheduler_metadata, made_for), "the schedule is of another call"
    pages = [table[: -(-length // k.shape[1])] for table, length in zip(block_table, seqused_k.tolist(), strict=True)]
    keys = [k[of].float() * scale.unsqueeze(1) for of, scale in zip(pages, k_descale, strict=True)]
    values = [v[of].float() * scale.unsqueeze(1) for of, scale in zip(pages, v_descale, strict=True)]
    scales = q_descale.repeat_interleave(group, dim=1).repeat_interleave(counts, dim=0).unsqueeze(2)
    queries = q[: len(scales)].float() * scales
    attend(queries, keys, values, out, counts.tolist(), seqused_k.tolist(), softmax_scale)


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    counts: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> None:
    """Causal attention of sequences whose queries lie one after the other.

    Args:
        q, out: [T, Hq, D].
        keys, values: pages of each sequence, [pages, page_size, H, D].
        counts: queries of each.
        lengths: keys of each, the last of which is its last query's own.
        scale: of the products.
    """
    starts = [0, *accumulate(counts)]
    for start, count, length, of_keys, of_values in zip(starts, counts, lengths, keys, values, strict=False):
        k, v = (of.flatten(0, 1)[:length].float() for of in (of_keys, of_values))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q[start : start + count].float(), k) * scale
        unseen = torch.arange(length) > torch.arange(length - count, length).unsqueeze(1)
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)
        out[start : start + count] = torch.einsum("hqk,khd->qhd", weights, v)


def get_scheduler_metadata(
    *,
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    page_size: int,
    causal: bool,
    num_splits: int,
    **unused: object,
) -> Tensor:
    """A schedule that tells what it was made for."""
    assert causal and num_splits in (0, SPLITS)
    return schedule(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, page_size, cache_seqlens
    )


def schedule(*sizes: int | Tensor) -> Tensor:
    *numbers, lengths = sizes
    return torch.cat([torch.tensor(numbers), lengths]).to(torch.int32)


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Entries [T, H, D] go to their slots of caches [blocks, block_size, H, D]; those without one go nowhere.

    Those of eight bits are cut down as the CPU engine's are; a GPU's kernel rounds to the nearest.
    """
    if kv_cache_dtype == "auto":
        assert k_scale == v_scale == 1
    else:
        assert kv_cache_dtype == "fp8" and key_cache.dtype == value_cache.dtype == torch.uint8
        float8 = torch.float8_e4m3fn
        key, value = (cut(x / scale, float8).view(torch.uint8) for x, scale in ((key, k_scale), (value, v_scale)))
    real, size = slot_mapping >= 0, key_cache.shape[1]
    slots = slot_mapping[real]
    for cache, entries in ((key_cache, key), (value_cache, value)):
        cache[slots // size, slots % size] = entries[: len(slot_mapping)][real]
