"""The entries of two layers, and what is measured of them."""

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerPair:
    """Entries of two adjacent layers in one paged cache, one sequence per (request, KV head).

    Entry i of sequence s lies in page table[s, i // block_size] at offset i % block_size, in both layers.

    Fields:
        cache: pages of all layers and KV heads, [num_pages, 2, block_size, D], keys and values apart; float32, float16
            or bfloat16, any strides but that of the last dimension, 1.
        lower, upper: page tables of the shallower and the deeper layer, [S, width] int32; what lies beyond a sequence's
            last page is not looked at.
        lengths: entries of each sequence, [S] int32, each at most width * block_size.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """

    cache: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        cache = self.cache
        if cache.dim() != 4 or cache.shape[1] != 2 or cache.stride(3) != 1 or cache.dtype not in DTYPES:
            raise ValueError(
                "cache must be [num_pages, 2, block_size, D], float32, float16 or bfloat16, with elements of a key or "
                f"value side by side; got {list(cache.shape)} {cache.dtype}, strides {cache.stride()}"
            )
        check_table("lower", self.lower, len(self.lengths), cache.device)
        check_table("upper", self.upper, len(self.lengths), cache.device)
        if self.lower.shape != self.upper.shape:
            raise ValueError(
                f"lower and upper must be of one shape; got {list(self.lower.shape)}, {list(self.upper.shape)}"
            )
        check("lengths", self.lengths, (len(self.lengths),), torch.int32, cache.device)

    @property
    def num_sequences(self) -> int:
        return self.lower.shape[0]

    @property
    def num_entries(self) -> int:
        """Entries that the page tables have room for, n."""
        return self.lower.shape[1] * self.cache.shape[2]

    @property
    def is_held(self) -> torch.Tensor:
        """Which entries a sequence has, [S, n] bool."""
        return torch.arange(self.num_entries, device=self.cache.device) < self.lengths.unsqueeze(1)


@dataclass(frozen=True)
class Measures:
    """What is measured of a pair's keys and values.

    Fields:
        magnitudes: Euclidean lengths, [S, n, 2, 2] float32: entry, key or value, lower or upper; 0 beyond a sequence.
        distances: angle between the two layers' vectors / pi, [S, n, 2] float32, in [0, 1]; 0 where a vector is zero
            (the other layer's direction then serves both) and beyond a sequence.
    """

    magnitudes: torch.Tensor
    distances: torch.Tensor


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {device}; got {list(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )


def check_table(name: str, table: torch.Tensor, num_sequences: int, device: torch.device) -> None:
    check(name, table, (num_sequences, table.shape[-1]), torch.int32, device)
