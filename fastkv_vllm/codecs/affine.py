"""int8, int4, int2: each key and each value by itself, in groups of channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise

CHANNELS = 64  # of a group at most


@dataclass(frozen=True)
class AffineCodec(Codec):
    """Codes of a few bits, with a minimum and a step per token, KV head and group of 64 channels.

    Source: "More Tokens, Lower Precision", arXiv 2412.12706, section 3, with round-to-nearest in place of HQQ; groups
    of 64 as its code has. Groups never cross tokens, so an entry means the same wherever it is moved.

    Fields:
        num_bits: of a code.
    """

    source: ClassVar[str] = "arXiv 2412.12706, section 3"

    num_bits: int

    def num_bytes(self, entry: EntryShape) -> int:
        return self._num_bytes(entry.key_dim) + self._num_bytes(entry.head_dim)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        parts = (x.unflatten(-1, (-1, _channels(x.shape[-1]))) for x in (keys, values))  # [N, groups, channels]
        return torch.cat([quantise(groups, self.num_bits).flatten(1) for groups in parts], dim=1)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys = self._num_bytes(entry.key_dim)
        keys, values = (
            dequantise(part.unflatten(1, (size // _channels(size), -1)), self.num_bits).flatten(1)
            for part, size in ((data[:, :of_keys], entry.key_dim), (data[:, of_keys:], entry.head_dim))
        )
        return keys, values

    def _num_bytes(self, size: int) -> int:
        """Bytes of a key or a value of so many elements."""
        return size // _channels(size) * group_bytes(_channels(size), self.num_bits)


def _channels(size: int) -> int:
    """Channels of a group: 64, or as many in each of the fewest groups of no more."""
    num_groups = -(-size // CHANNELS)
    if size % num_groups:
        raise ValueError(f"heads must have channels for groups of equally many, {CHANNELS} or fewer; got {size}")
    return size // num_groups
