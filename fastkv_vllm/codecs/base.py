"""What a codec is: bytes for a group of entries, and the entries back."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.kernels.encoded_attention import Form, Vectors


@dataclass(frozen=True)
class EntryShape:
    """An entry of the engine's cache: a key and a value of one KV head, and what of them is stored.

    Fields:
        head_dim: elements of each (D).
        dtype: of an element.
        channel_ratio: share of a key's elements that a codec stores, (0, 1].
        value_channel_ratio: share of a value's, (0, 1].
    """

    head_dim: int
    dtype: torch.dtype
    channel_ratio: float = 1.0
    value_channel_ratio: float = 1.0

    @property
    def num_bytes(self) -> int:
        """As the engine has it."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def key_dim(self) -> int:
        """Elements of a key that are stored (Dk)."""
        return self._stored(self.channel_ratio)

    @property
    def value_dim(self) -> int:
        """Elements of a value that are stored (Dv)."""
        return self._stored(self.value_channel_ratio)

    def _stored(self, share: float) -> int:
        """Elements of a share, rounded up to a multiple of 8: codes then fill bytes."""
        wished = math.ceil(round(self.head_dim * share, 6))  # 0.55 * 100 is a little more than 55
        return min(-(-wished // 8) * 8, self.head_dim)


@dataclass(frozen=True)
class Codec(ABC):
    """How entries are stored in fewer bytes than the model's dtype takes.

    Entries of one request, layer and KV head are encoded in order, `group_size` of them together. A page holds whole
    groups, so what it holds can be read without any other page.

    Class attributes:
        source: paper and section the arithmetic follows.
        group_size: entries encoded together.
        artefact: kind of the file with what was measured of the model's heads; None: there is none to know.
        exact_sinks: the first entries, those that always stay, are stored as they are, in the first places for codes;
            with a group_size of 1 only.
    """

    source: ClassVar[str]
    group_size: ClassVar[int] = 1
    artefact: ClassVar[str | None] = None
    exact_sinks: ClassVar[bool] = False

    @abstractmethod
    def num_bytes(self, entry: EntryShape) -> int:
        """Bytes of a group.

        Raises:
            ValueError: keys or values of so many elements cannot be encoded.
        """

    def read_bytes(self, entry: EntryShape) -> int:
        """Of these, the first ones that `decode` needs."""
        return self.num_bytes(entry)

    def draft_view(self) -> "Codec | None":
        """A coarser reading of the same bytes, by which tokens can be drafted; None: there is none."""
        return None

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Bytes of entries.

        Args:
            keys: [N, Dk], N a multiple of `group_size`.
            values: [N, Dv].

        Returns:
            [N / group_size, B] uint8.
        """

    @abstractmethod
    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [g * group_size, Dk] and values [g * group_size, Dv] of groups [g, B] uint8, float32 each.

        B is `read_bytes`.
        """

    @abstractmethod
    def form(self, entry: EntryShape) -> Form:
        """Where the bytes of a group lie, for kernels that read them in place."""

    def of_heads(self, heads: torch.Tensor) -> "Codec":
        """The same for entries of these KV heads, [N] int64, counted layer after layer."""
        return self

    def orders(self, heads: torch.Tensor) -> torch.Tensor | None:
        """Channels of these KV heads in the order in which they are stored, [N, 2, D] int64; None: ascending."""
        return None

    def as_stored(self) -> "Codec":
        """The same for entries whose channels are in that order already."""
        return self

    def sink_places(self, num_sink: int, entry: EntryShape) -> int:
        """Places for codes that the first entries of a head take as they are, beyond one for each."""
        if not self.exact_sinks:
            return 0
        return -(-num_sink * entry.num_bytes // self.num_bytes(entry)) - num_sink

    def page_entries(self, block_size: int, entry: EntryShape) -> int:
        """Entries that fit into the bytes of a page of `block_size` entries of the model's dtype.

        Raises:
            ValueError: pages hold no whole number of groups, heads have a width that cannot be encoded, or no more
                entries fit than before.
        """
        if block_size % self.group_size:
            raise ValueError(f"--block-size must be a multiple of {self.group_size}; got {block_size}")
        num_entries = block_size * entry.num_bytes // self.num_bytes(entry) * self.group_size
        if num_entries <= block_size:
            raise ValueError(
                f"a page of {block_size} entries must have room for more; {num_entries} of head size "
                f"{entry.head_dim} fit where an element has {entry.dtype.itemsize} bytes"
            )
        return num_entries


class VectorCodec(Codec):
    """A codec that encodes each key and each value by itself, so that other vectors may stand in their places."""

    @abstractmethod
    def vector_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Bytes of a vector of so many elements, which had this dtype.

        Raises:
            ValueError: so many elements cannot be encoded.
        """

    @abstractmethod
    def encode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Bytes of vectors, [N, size] -> [N, B] uint8."""

    @abstractmethod
    def decode_vectors(self, data: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Vectors of so many elements, which had this dtype, [N, B] uint8 -> [N, size] float32."""

    @abstractmethod
    def vector_form(self, size: int, low: int) -> Vectors:
        """Where the bytes of such a vector lie that begins at byte `low` of a record."""

    def num_bytes(self, entry: EntryShape) -> int:
        return sum(self.vector_bytes(size, entry.dtype) for size in (entry.key_dim, entry.value_dim))

    def form(self, entry: EntryShape) -> Form:
        values = self.vector_form(entry.value_dim, self.vector_bytes(entry.key_dim, entry.dtype))
        return Form(self.num_bytes(entry), 1, self.vector_form(entry.key_dim, 0), values)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.encode_vectors(keys), self.encode_vectors(values)], dim=1)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys = self.vector_bytes(entry.key_dim, entry.dtype)
        keys = self.decode_vectors(data[:, :of_keys], entry.key_dim, entry.dtype)
        return keys, self.decode_vectors(data[:, of_keys:], entry.value_dim, entry.dtype)
