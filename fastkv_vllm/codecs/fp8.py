"""fp8: eight-bit floating-point numbers without a scale."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import VectorCodec
from fastkv_vllm.kernels.encoded_attention import Kind, Vectors


@dataclass(frozen=True)
class Float8Codec(VectorCodec):
    """Elements rounded to e4m3; those beyond its range, 448, become the largest.

    Source: as vLLM's own `--kv-cache-dtype fp8` with scale 1, but only for what compression has kept.
    """

    source: ClassVar[str] = "OCP 8-bit floating point, e4m3"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def vector_bytes(self, size: int, dtype: torch.dtype) -> int:
        return size

    def vector_form(self, size: int, low: int) -> Vectors:
        return Vectors(Kind.FLOAT8, size, low)

    def encode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self.dtype).max
        return vectors.float().clamp(-largest, largest).to(self.dtype).view(torch.uint8)

    def decode_vectors(self, data: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        return data.contiguous().view(self.dtype).float()
