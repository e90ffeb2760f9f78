"""Torch definition of the merge of two layers: specification, CPU path and oracle."""

import torch

from fastkv_vllm.kernels.merge_layers.pair import LayerPair


def measure_reference(pair: LayerPair, magnitudes: torch.Tensor, chords: torch.Tensor) -> None:
    """Write magnitudes [S, n, 2, 2] and |u - v|, |u + v| of the unit vectors, [S, n, 2, 2]; 0 beyond a sequence."""
    held = pair.is_held[..., None, None]
    lower, upper = (_read(pair, table).float().where(held, 0.0) for table in (pair.lower, pair.upper))  # [S, n, 2, D]
    magnitudes.copy_(torch.stack([lower.norm(dim=-1), upper.norm(dim=-1)], dim=-1))
    u, v = _unit(lower), _unit(upper)
    chords.copy_(torch.stack([(u - v).norm(dim=-1), (u + v).norm(dim=-1)], dim=-1))


def merge_reference(pair: LayerPair, coefficients: torch.Tensor, is_merged: torch.Tensor) -> None:
    """Write the direction of c_lower * lower + c_upper * upper, coefficients [S, n, 2, 2], into lower's pages."""
    lower, upper = _read(pair, pair.lower).float(), _read(pair, pair.upper).float()
    sums = coefficients[..., :1] * lower + coefficients[..., 1:] * upper
    _write(pair, pair.lower, _unit(sums), is_merged)


def restore_reference(
    pair: LayerPair, shared: torch.Tensor, kept: torch.Tensor, magnitudes: torch.Tensor, places: torch.Tensor
) -> None:
    """Write both layers; places [S, n] int32 is an entry's place among those kept, -1: merged."""
    held, is_kept = pair.is_held, (places >= 0)[..., None, None]
    stored = _read(pair, shared).float()
    restored = _unit(stored).unsqueeze(3) * magnitudes.unsqueeze(4)  # [S, n, 2, 2, D]
    size = pair.cache.shape[2]
    rows = torch.arange(pair.num_sequences, device=places.device).unsqueeze(1)
    pages = kept[rows, places.clamp(min=0).long() // size] if kept.shape[1] else torch.zeros_like(places)
    pages = pages.where(held & (places >= 0), 0).long()
    own = pair.cache[pages, :, places.clamp(min=0).long() % size].float()
    _write(pair, pair.lower, torch.where(is_kept, stored, restored[..., 0, :]), held)
    _write(pair, pair.upper, torch.where(is_kept, own, restored[..., 1, :]), held)


def _slots(pair: LayerPair, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset of each entry, [S, n] int64; page 0 beyond a sequence."""
    size = pair.cache.shape[2]
    pages = table.long().repeat_interleave(size, dim=1)
    offsets = torch.arange(pair.num_entries, device=table.device) % size
    return pages.where(pair.is_held, 0), offsets.expand_as(pages)


def _read(pair: LayerPair, table: torch.Tensor) -> torch.Tensor:
    """Keys and values of all entries, [S, n, 2, D]."""
    pages, offsets = _slots(pair, table)
    return pair.cache[pages, :, offsets]


def _write(pair: LayerPair, table: torch.Tensor, vectors: torch.Tensor, mask: torch.Tensor) -> None:
    pages, offsets = _slots(pair, table)
    pair.cache[pages[mask], :, offsets[mask]] = vectors[mask].to(pair.cache.dtype)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1; zero stays zero."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms.where(norms > 0, 1.0)
