"""exact: numbers as they are, of the key's channels that are stored."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape


@dataclass(frozen=True)
class ExactCodec(Codec):
    """Elements in the cache's own dtype: an entry is smaller where not all channels of its key are stored.

    Source: arXiv 2407.21018, section 3, which stores the channels it keeps like that.
    """

    source: ClassVar[str] = "arXiv 2407.21018, section 3"

    def num_bytes(self, entry: EntryShape) -> int:
        return (entry.key_dim + entry.head_dim) * entry.dtype.itemsize

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys, values], dim=1).view(torch.uint8)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = data.contiguous().view(entry.dtype).float().split([entry.key_dim, entry.head_dim], dim=1)
        return keys, values
