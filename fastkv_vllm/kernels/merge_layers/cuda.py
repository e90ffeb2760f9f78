"""Binding of csrc/merge_layers.cu."""

import torch

from fastkv_vllm.kernels import csrc
from fastkv_vllm.kernels.merge_layers.pair import DTYPES, LayerPair

_HEAD_DIMS = (64, 128, 256)
_LOAD_BYTES = 16


def measure_cuda(pair: LayerPair, magnitudes: torch.Tensor, chords: torch.Tensor) -> None:
    """See `measure_reference`."""
    _launch("fastkv_measure_layers", pair, magnitudes, chords)


def merge_cuda(pair: LayerPair, coefficients: torch.Tensor, is_merged: torch.Tensor) -> None:
    """See `merge_reference`."""
    _launch("fastkv_merge_layers", pair, coefficients.contiguous(), is_merged.contiguous())


def restore_cuda(
    pair: LayerPair, shared: torch.Tensor, kept: torch.Tensor, magnitudes: torch.Tensor, places: torch.Tensor
) -> None:
    """See `restore_reference`."""
    tables = (shared.contiguous(), kept.contiguous(), kept.shape[1])
    _launch("fastkv_restore_layers", pair, *tables, magnitudes.contiguous(), places.contiguous())


def _launch(name: str, pair: LayerPair, *arguments: torch.Tensor | int) -> None:
    cache = pair.cache
    head_dim, strides = cache.shape[3], cache.stride()[:3]
    if head_dim not in _HEAD_DIMS:
        raise NotImplementedError(f"impl='cuda' has head_dim 64, 128 and 256; got {head_dim}: use impl='triton'")
    if any(step * cache.element_size() % _LOAD_BYTES for step in strides) or cache.data_ptr() % _LOAD_BYTES:
        raise NotImplementedError(
            f"impl='cuda' loads {_LOAD_BYTES} bytes at once: the cache must begin at a multiple of them and its "
            f"strides be multiples; got strides {strides} of {cache.dtype}: use impl='triton'"
        )
    csrc.launch(
        name,
        DTYPES.index(cache.dtype),
        head_dim,
        cache,
        *strides,
        cache.shape[2],
        pair.lower.contiguous(),
        pair.upper.contiguous(),
        pair.lengths.contiguous(),
        pair.num_sequences,
        pair.lower.shape[1],
        *arguments,
    )
