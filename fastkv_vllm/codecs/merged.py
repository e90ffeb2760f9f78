"""MiniCache: two neighbouring layers' entries stored as one, a shared direction and each layer's magnitudes."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import EntryShape
from fastkv_vllm.kernels.merge_layers import (
    LayerPair,
    distinct_entries,
    measure_layers,
    merge_layers,
    restore_layers,
)
from fastkv_vllm.kernels.select import select

VALUES = "values"
MERGES = (VALUES, "keys_and_values")  # what of two layers may be merged
_RETAINED = -1.0  # in the place of a magnitude: the entry is the lower layer's own


@dataclass(frozen=True)
class PairCodec:
    """One record for each two entries of neighbouring layers at the same place, in the model's dtype.

    A record has the direction of the keys, the direction of the values and four magnitudes: of keys and values, of the
    lower and the upper layer. Entries whose directions are too far apart are retained: the record then has the lower
    layer's own, and the upper layer's lies elsewhere. With `values_only` both layers' keys stand as they are.

    Source: MiniCache, arXiv 2405.14366, sections 3.2 and 3.3; see `kernels.merge_layers` for the arithmetic.

    Fields:
        t: weight of the upper layer's direction, [0, 1].
        gamma: entries in the band of this share of the range below the largest distance are retained, [0, 1]; of so
            large a share of the entries at most, the farthest.
        values_only: keys are not merged.
    """

    source: ClassVar[str] = "arXiv 2405.14366, sections 3.2 and 3.3"

    t: float
    gamma: float
    values_only: bool

    def width(self, head_dim: int) -> int:
        """Elements of a record."""
        return 3 * head_dim + 2 if self.values_only else 2 * head_dim + 4

    def page_entries(self, block_size: int, entry: EntryShape) -> int:
        """Records that fit into a page of `block_size` entries."""
        return block_size * 2 * entry.head_dim // self.width(entry.head_dim)

    def merge(self, lower: torch.Tensor, upper: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records of two layers' entries.

        Args:
            lower, upper: keys and values, [S, 2, N, D] each, sequences of their own.
            most: entries of a sequence that may be retained.

        Returns:
            Records [S, N, width], and which entries are retained, [S, N] bool.
        """
        num_sequences, _, num_entries, _ = lower.shape
        pair = _pair(torch.cat([lower, upper]), num_sequences)
        measures = measure_layers(pair)
        distances = measures.distances.clone()
        if self.values_only:
            distances[..., 0] = 0
        distinct = distinct_entries(distances, pair.lengths, gamma=self.gamma)
        retained = torch.zeros_like(distinct)
        if most:
            farthest = select(distances.amax(dim=2).where(distinct, -1.0), min(most, num_entries))
            retained = retained.scatter(1, farthest, True) & distinct
        merge_layers(pair, measures, retained, t=self.t)
        shared = pair.cache[:num_sequences]
        magnitudes = measures.magnitudes.masked_fill(retained[..., None, None], _RETAINED)
        if self.values_only:
            parts = [lower[:, 0], upper[:, 0], shared[:, 1], magnitudes[:, :, 1]]
        else:
            parts = [shared[:, 0], shared[:, 1], magnitudes.flatten(2)]
        return torch.cat([part.to(lower.dtype) for part in parts], dim=2), retained

    def restore(self, records: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Keys and values of both layers, [2, S, 2, N, D], from records [S, N, width].

        Args:
            own: the upper layer's retained entries in order, keys and values, [S, 2, most, D].
        """
        num_sequences, num_entries, width = records.shape
        head_dim = own.shape[3]
        assert width == self.width(head_dim), "records of another codec"
        places = records.new_zeros(3 * num_sequences, 2, num_entries, head_dim)
        places[2 * num_sequences :, :, : own.shape[2]] = own[:, :, :num_entries]
        magnitudes = records.new_zeros(num_sequences, num_entries, 2, 2, dtype=torch.float32)
        if self.values_only:
            *keys, directions, of_values = records.split([head_dim, head_dim, head_dim, 2], dim=2)
            places[:num_sequences, 1], magnitudes[:, :, 1] = directions, of_values.float()
        else:
            *directions, of_both = records.split([head_dim, head_dim, 4], dim=2)
            places[:num_sequences, 0], places[:num_sequences, 1] = directions
            magnitudes.copy_(of_both.unflatten(2, (2, 2)))
        retained = magnitudes[:, :, 1, 0] < 0
        pair = _pair(places, num_sequences)
        kept = torch.arange(2 * num_sequences, 3 * num_sequences, dtype=torch.int32).unsqueeze(1)
        restore_layers(pair, pair.lower, kept, magnitudes=magnitudes, retained=retained)
        restored = places[: 2 * num_sequences].unflatten(0, (2, num_sequences))
        if self.values_only:
            restored[:, :, 0] = torch.stack(keys)
        return restored


def neighbours(num_layers: int, first_layer: int | None = None) -> tuple[int, ...]:
    """Layer with which each layer is merged, its own number where it is not: pairs from a layer on, [L].

    Args:
        first_layer: lower layer of the first pair; None: half of the layers are before it.
    """
    first = num_layers // 2 if first_layer is None else first_layer
    last = num_layers - (num_layers - first) % 2
    return tuple(layer - (first <= layer < last and (layer - first) % 2) for layer in range(num_layers))


def _pair(cache: torch.Tensor, num_sequences: int) -> LayerPair:
    """Sequences of a page each: the lower layer's come first, then the upper layer's."""
    tables = torch.arange(2 * num_sequences, dtype=torch.int32).view(2, num_sequences, 1)
    lengths = torch.full((num_sequences,), cache.shape[2], dtype=torch.int32)
    return LayerPair(cache, tables[0], tables[1], lengths)
