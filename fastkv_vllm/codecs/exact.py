"""exact: numbers as they are, of the channels that are stored."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import VectorCodec
from fastkv_vllm.kernels.encoded_attention import Kind, Vectors


@dataclass(frozen=True)
class ExactCodec(VectorCodec):
    """Elements in the cache's own dtype: an entry is smaller where not all channels are stored.

    Source: arXiv 2407.21018, section 3, which stores the channels it keeps like that.
    """

    source: ClassVar[str] = "arXiv 2407.21018, section 3"

    def vector_bytes(self, size: int, dtype: torch.dtype) -> int:
        return size * dtype.itemsize

    def vector_form(self, size: int, low: int) -> Vectors:
        return Vectors(Kind.ELEMENTS, size, low)

    def encode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.contiguous().view(torch.uint8)

    def decode_vectors(self, data: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        return data.contiguous().view(dtype).float()
