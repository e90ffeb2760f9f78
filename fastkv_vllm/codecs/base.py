"""What a codec is: bytes for a group of entries, and the entries back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class EntryShape:
    """An entry of the engine's cache: a key and a value of one KV head.

    Fields:
        head_dim: elements of each (D).
        itemsize: bytes of an element.
    """

    head_dim: int
    itemsize: int

    @property
    def num_bytes(self) -> int:
        return 2 * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Codec(ABC):
    """How entries are stored in fewer bytes than the model's dtype takes.

    Entries of one request, layer and KV head are encoded in order, `group_size` of them together. A page holds whole
    groups, so what it holds can be read without any other page.

    Class attributes:
        source: paper and section the arithmetic follows.
        group_size: entries encoded together.
    """

    source: ClassVar[str]
    group_size: ClassVar[int] = 1

    @abstractmethod
    def num_bytes(self, head_dim: int) -> int:
        """Bytes of a group.

        Raises:
            ValueError: keys of so many elements cannot be encoded.
        """

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Bytes of entries, keys and values [N, D], N a multiple of `group_size` -> [N / group_size, B] uint8."""

    @abstractmethod
    def decode(self, data: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of groups, [g, B] uint8 -> [g * group_size, D] float32 each."""

    def page_entries(self, block_size: int, entry: EntryShape) -> int:
        """Entries that fit into the bytes of a page of `block_size` entries of the model's dtype.

        Raises:
            ValueError: pages hold no whole number of groups, heads have a width that cannot be encoded, or no more
                entries fit than before.
        """
        if block_size % self.group_size:
            raise ValueError(f"--block-size must be a multiple of {self.group_size}; got {block_size}")
        num_entries = block_size * entry.num_bytes // self.num_bytes(entry.head_dim) * self.group_size
        if num_entries <= block_size:
            raise ValueError(
                f"a page of {block_size} entries must have room for more; {num_entries} of head size "
                f"{entry.head_dim} fit where an element has {entry.itemsize} bytes"
            )
        return num_entries
