"""MiniCache: two neighbouring layers' entries stored as one, a shared direction and each layer's magnitudes."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import EntryShape, VectorCodec
from fastkv_vllm.kernels.encoded_attention import Form
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
    """One record for each two entries of neighbouring layers at the same place.

    A record has the direction of the keys, the direction of the values and four magnitudes: of keys and values, of the
    lower and the upper layer. Entries whose directions are too far apart are retained: the record then has the lower
    layer's own, and the upper layer's lies elsewhere. With `values_only` both layers' keys stand as they are.

    Directions, keys and what is retained are stored by another codec; magnitudes always in the model's dtype.

    Source: MiniCache, arXiv 2405.14366, sections 3.2 and 3.3; see `kernels.merge_layers` for the arithmetic.

    Fields:
        t: weight of the upper layer's direction, [0, 1].
        gamma: entries in the band of this share of the range below the largest distance are retained, [0, 1]; of so
            large a share of the entries at most, the farthest.
        values_only: keys are not merged.
        vectors: how vectors are stored, and entries that are not merged.
    """

    source: ClassVar[str] = "arXiv 2405.14366, sections 3.2 and 3.3"

    t: float
    gamma: float
    values_only: bool
    vectors: VectorCodec

    def num_bytes(self, entry: EntryShape) -> int:
        """Bytes of a record."""
        num_vectors, num_magnitudes = (3, 2) if self.values_only else (2, 4)
        of_vector = self.vectors.vector_bytes(entry.head_dim, entry.dtype)
        return num_vectors * of_vector + num_magnitudes * entry.dtype.itemsize

    def page_entries(self, block_size: int, entry: EntryShape) -> int:
        """Records that fit into a page of `block_size` entries."""
        return block_size * entry.num_bytes // self.num_bytes(entry)

    def form(self, entry: EntryShape, *, upper: bool) -> Form:
        """Where the bytes of the upper or the lower layer lie in a record."""
        of_vector = self.vectors.vector_bytes(entry.head_dim, entry.dtype)
        key, value = (int(upper), 2) if self.values_only else (0, 1)
        magnitude = (value + 1) * of_vector + int(upper) * entry.dtype.itemsize
        keys, values = (self.vectors.vector_form(entry.head_dim, each * of_vector) for each in (key, value))
        if not self.values_only:
            keys, magnitude = keys._replace(magnitude=magnitude), magnitude + 2 * entry.dtype.itemsize
        return Form(self.num_bytes(entry), 1, keys, values._replace(magnitude=magnitude), skips_retained=upper)

    def decode(self, records: torch.Tensor, entry: EntryShape, *, upper: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the upper or the lower layer, [N, D] float32 each, from records [N, B].

        Where the upper layer's are retained they are elsewhere; zeros stand in their places.
        """
        restored = self.restore(records.unsqueeze(0), torch.zeros(1, 2, 0, entry.head_dim), entry)
        keys, values = restored[int(upper), 0]
        return keys, values

    def merge(self, lower: torch.Tensor, upper: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records of two layers' entries.

        Args:
            lower, upper: keys and values, [S, 2, N, D] each, sequences of their own.
            most: entries of a sequence that may be retained.

        Returns:
            Records [S, N, B] uint8, and which entries are retained, [S, N] bool.
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
            vectors, numbers = [lower[:, 0], upper[:, 0], shared[:, 1]], magnitudes[:, :, 1]
        else:
            vectors, numbers = [shared[:, 0], shared[:, 1]], magnitudes.flatten(2)
        parts = [self.vectors.encode_vectors(each.flatten(0, 1)) for each in vectors]
        parts.append(numbers.flatten(0, 1).to(lower.dtype).view(torch.uint8))
        return torch.cat(parts, dim=1).unflatten(0, (num_sequences, num_entries)), retained

    def restore(self, records: torch.Tensor, own: torch.Tensor, entry: EntryShape) -> torch.Tensor:
        """Keys and values of both layers, [2, S, 2, N, D] float32, from records [S, N, B].

        Args:
            own: the upper layer's retained entries in order, keys and values, [S, 2, most, D] float32.
            entry: what an entry is.
        """
        num_sequences, num_entries, _ = records.shape
        *vectors, numbers = self._split(records.flatten(0, 1), entry)
        parts = [
            self.vectors.decode_vectors(each, entry.head_dim, entry.dtype).unflatten(0, (num_sequences, num_entries))
            for each in vectors
        ]
        places = own.new_zeros(3 * num_sequences, 2, num_entries, entry.head_dim)
        places[2 * num_sequences :, :, : own.shape[2]] = own[:, :, :num_entries]
        places[:num_sequences, 1] = parts[-1]
        magnitudes = own.new_zeros(num_sequences, num_entries, 2, 2)
        of_halves = numbers.contiguous().view(entry.dtype).float().view(num_sequences, num_entries, -1, 2)
        magnitudes[:, :, 2 - of_halves.shape[2] :] = of_halves
        if not self.values_only:
            places[:num_sequences, 0] = parts[0]
        retained = magnitudes[:, :, 1, 0] < 0
        pair = _pair(places, num_sequences)
        kept = torch.arange(2 * num_sequences, 3 * num_sequences, dtype=torch.int32).unsqueeze(1)
        restore_layers(pair, pair.lower, kept, magnitudes=magnitudes, retained=retained)
        restored = places[: 2 * num_sequences].unflatten(0, (2, num_sequences))
        if self.values_only:
            restored[:, :, 0] = torch.stack(parts[:2])
        return restored

    def _split(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, ...]:
        """Bytes of each vector, and those of the magnitudes."""
        of_vector = self.vectors.vector_bytes(entry.head_dim, entry.dtype)
        num_vectors = 3 if self.values_only else 2
        return data.split([of_vector] * num_vectors + [self.num_bytes(entry) - num_vectors * of_vector], dim=1)


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
