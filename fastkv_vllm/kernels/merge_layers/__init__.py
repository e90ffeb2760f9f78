"""Two adjacent layers' caches merged into one: a shared direction and two magnitudes per key and value.

`measure_layers` says how far apart the layers' entries are, `distinct_entries` which ones are too far apart to be
merged, `merge_layers` merges the others, `restore_layers` gives both layers back.

Source: MiniCache (arXiv 2405.14366), method section. Keys and values are merged independently, but an entry is kept as
a whole: where its keys or its values are distinct, neither is merged.
"""

import math

import torch

from fastkv_vllm.kernels.implementations import WITH_CUDA, choose
from fastkv_vllm.kernels.merge_layers.pair import LayerPair, Measures, check, check_table
from fastkv_vllm.kernels.merge_layers.reference import measure_reference, merge_reference, restore_reference

__all__ = ["LayerPair", "Measures", "distinct_entries", "measure_layers", "merge_layers", "restore_layers"]

_LEAST_SINE = 1e-6  # of the angle; below, the slerp's weights are those of a straight line


def measure_layers(pair: LayerPair, *, impl: str | None = None) -> Measures:
    """Magnitudes of both layers' keys and values, and the angular distances between the layers.

    With u and v the unit vectors: distance = 2 * atan2(|u - v|, |u + v|) / pi, which is arccos(u . v) / pi but as exact
    near 0 and 1 as elsewhere. Sums run in float32: squared magnitudes must fit.

    Args:
        pair: n = width * block_size.
        impl: "reference", "triton" or "cuda"; None takes that of the device.

    Raises:
        ValueError: the implementation does not run there.
        NotImplementedError: impl="cuda" for a head_dim or strides it does not have.
    """
    form = choose(impl, pair.cache.device, among=WITH_CUDA)
    shape = (pair.num_sequences, pair.num_entries, 2, 2)
    magnitudes = torch.empty(shape, dtype=torch.float32, device=pair.cache.device)
    chords = torch.empty_like(magnitudes)
    if form == "reference":
        measure_reference(pair, magnitudes, chords)
    elif form == "triton":
        from fastkv_vllm.kernels.merge_layers.triton import measure_triton

        measure_triton(pair, magnitudes, chords)
    else:
        from fastkv_vllm.kernels.merge_layers.cuda import measure_cuda

        measure_cuda(pair, magnitudes, chords)
    angles = 2 * torch.atan2(chords[..., 0], chords[..., 1])
    distances = (angles / math.pi).clamp(max=1.0)
    return Measures(magnitudes, distances.where((magnitudes > 0).all(dim=-1), 0.0))


def distinct_entries(distances: torch.Tensor, lengths: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Entries whose layers are too far apart to be merged.

    d_i > d_max + (d_min - d_max) * gamma, extremes over the sequence, for keys or for values.

    0 keeps none, and entries that are all equally far apart are all merged.

    Args:
        distances: of `measure_layers`, [S, n, 2] float32.
        lengths: entries of each sequence, [S] int32.
        gamma: width of the band below the largest distance, as a share of the range, [0, 1]; 0.05 in the paper.

    Returns:
        [S, n] bool, false beyond a sequence.

    Raises:
        ValueError: shapes, dtypes or gamma do not fit.

    Source: MiniCache, retention of unmergeable tokens. The rule is passed on as d_i < d_min + (d_max - d_min) * gamma,
    which suits a similarity; this is its mirror image for a distance.
    """
    num_sequences, num_entries = distances.shape[:2]
    check("distances", distances, (num_sequences, num_entries, 2), torch.float32, distances.device)
    check("lengths", lengths, (num_sequences,), torch.int32, distances.device)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1]; got {gamma}")
    if num_entries == 0:
        return distances.new_zeros(num_sequences, 0, dtype=torch.bool)
    held = (torch.arange(num_entries, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(2)
    highest = distances.where(held, 0.0).amax(dim=1, keepdim=True)
    lowest = distances.where(held, 1.0).amin(dim=1, keepdim=True)
    threshold = torch.lerp(highest, lowest, gamma)  # exact at either end
    return ((distances > threshold) & held).any(dim=2)


def merge_layers(
    pair: LayerPair, measures: Measures, retained: torch.Tensor, *, t: float = 0.6, impl: str | None = None
) -> None:
    """Write the direction that both layers share into the lower layer's pages, by spherical interpolation.

    e = sin((1 - t) A) / sin A * u + sin(t A) / sin A * v, A the angle between the unit vectors u of the lower and v of
    the upper layer, then divided by its length.

    Retained entries keep the lower layer's own key and value there; the upper layer's must be kept elsewhere, in
    order (`compact` does that), before its pages are given back: they are not written.

    Nearly parallel: the weights are 1 - t and t. Nearly opposite (sin A below 1e-6): v if t >= 0.5, else u. One vector
    zero: the other's direction. Both zero: zero.

    Args:
        pair: its cache is changed in place.
        measures: of `measure_layers`, before anything is merged.
        retained: entries that are not merged, [S, n] bool.
        t: weight of the upper layer, [0, 1].
        impl: "reference", "triton" or "cuda"; None takes that of the device.

    Raises:
        ValueError: shapes, dtypes or t do not fit, or the implementation does not run there.
        NotImplementedError: impl="cuda" for a head_dim or strides it does not have.

    Source: MiniCache, merging; SLERP with the deeper layer's weight t.
    """
    form = choose(impl, pair.cache.device, among=WITH_CUDA)
    _check_entries(pair, measures.magnitudes, retained)
    check("distances", measures.distances, (*retained.shape, 2), torch.float32, pair.cache.device)
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1]; got {t}")
    coefficients = _coefficients(measures, t)
    is_merged = pair.is_held & ~retained
    if form == "reference":
        merge_reference(pair, coefficients, is_merged)
    elif form == "triton":
        from fastkv_vllm.kernels.merge_layers.triton import merge_triton

        merge_triton(pair, coefficients, is_merged)
    else:
        from fastkv_vllm.kernels.merge_layers.cuda import merge_cuda

        merge_cuda(pair, coefficients, is_merged)


def restore_layers(
    pair: LayerPair,
    shared: torch.Tensor,
    kept: torch.Tensor,
    *,
    magnitudes: torch.Tensor,
    retained: torch.Tensor,
    impl: str | None = None,
) -> None:
    """Write both layers' keys and values again: x = magnitude * e / |e|, retained entries as they were.

    Args:
        pair: where to write, and the lengths; its cache is changed in place and holds what is read too.
        shared: page table of the merged pages, [S, width] int32; may be that of `pair.lower`, no other page of it may
            be written.
        kept: page table of the upper layer's retained entries in order, [S, width of its own] int32; none of its pages
            may be written.
        magnitudes: of `measure_layers`.
        retained: as for `merge_layers`.
        impl: "reference", "triton" or "cuda"; None takes that of the device.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation does not run there.
        NotImplementedError: impl="cuda" for a head_dim or strides it does not have.

    Source: MiniCache, restoration.
    """
    form = choose(impl, pair.cache.device, among=WITH_CUDA)
    _check_entries(pair, magnitudes, retained)
    check("shared", shared, tuple(pair.lower.shape), torch.int32, pair.cache.device)
    check_table("kept", kept, pair.num_sequences, pair.cache.device)
    retained = retained & pair.is_held
    places = (retained.cumsum(dim=1) - 1).where(retained, -1).to(torch.int32)
    if form == "reference":
        restore_reference(pair, shared, kept, magnitudes, places)
    elif form == "triton":
        from fastkv_vllm.kernels.merge_layers.triton import restore_triton

        restore_triton(pair, shared, kept, magnitudes, places)
    else:
        from fastkv_vllm.kernels.merge_layers.cuda import restore_cuda

        restore_cuda(pair, shared, kept, magnitudes, places)


def _check_entries(pair: LayerPair, magnitudes: torch.Tensor, retained: torch.Tensor) -> None:
    shape = (pair.num_sequences, pair.num_entries)
    check("magnitudes", magnitudes, (*shape, 2, 2), torch.float32, pair.cache.device)
    check("retained", retained, shape, torch.bool, pair.cache.device)


def _coefficients(measures: Measures, t: float) -> torch.Tensor:
    """Weights of the two vectors as they are, not of unit length, [S, n, 2, 2]; 0 for a zero vector."""
    angles = measures.distances * math.pi
    sines = angles.sin()
    is_straight = sines < _LEAST_SINE
    lower, upper = (((1 - t) * angles).sin() / sines, (t * angles).sin() / sines)
    is_near = angles < math.pi / 2
    nearer = float(t >= 0.5)
    lower = lower.where(~is_straight, torch.where(is_near, 1 - t, 1 - nearer))
    upper = upper.where(~is_straight, torch.where(is_near, t, nearer))
    magnitudes = measures.magnitudes
    return (torch.stack([lower, upper], dim=-1) / magnitudes).where(magnitudes > 0, 0.0)
