"""fp8: eight-bit floating-point numbers without a scale."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape


@dataclass(frozen=True)
class Float8Codec(Codec):
    """Elements rounded to e4m3; those beyond its range, 448, become the largest.

    Source: as vLLM's own `--kv-cache-dtype fp8` with scale 1, but only for what compression has kept.
    """

    source: ClassVar[str] = "OCP 8-bit floating point, e4m3"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def num_bytes(self, entry: EntryShape) -> int:
        return entry.key_dim + entry.head_dim

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self.dtype).max
        return torch.cat([keys, values], dim=1).float().clamp(-largest, largest).to(self.dtype).view(torch.uint8)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = data.contiguous().view(self.dtype).float().split([entry.key_dim, entry.head_dim], dim=1)
        return keys, values
