"""int8, int4, int2: each key and each value by itself, in groups of channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import VectorCodec
from fastkv_vllm.kernels.encoded_attention import Kind, Vectors
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise

CHANNELS = 64  # of a group at most


@dataclass(frozen=True)
class AffineCodec(VectorCodec):
    """Codes of a few bits, with a minimum and a step per token, KV head and group of 64 channels.

    Source: "More Tokens, Lower Precision", arXiv 2412.12706, section 3, with round-to-nearest in place of HQQ; groups
    of 64 as its code has. Groups never cross tokens, so an entry means the same wherever it is moved.

    Fields:
        num_bits: of a code.
    """

    source: ClassVar[str] = "arXiv 2412.12706, section 3"

    num_bits: int

    def vector_bytes(self, size: int, dtype: torch.dtype) -> int:
        return size // self.channels(size) * group_bytes(self.channels(size), self.num_bits)

    def channels(self, size: int) -> int:
        """Channels of a group of vectors of so many: 64, or as many in each of the fewest groups of no more."""
        num_groups = -(-size // CHANNELS)
        if size % num_groups:
            raise ValueError(f"heads must have channels for groups of equally many, {CHANNELS} or fewer; got {size}")
        return size // num_groups

    def vector_form(self, size: int, low: int) -> Vectors:
        return Vectors(Kind.BY_TOKEN, size, low, channels=self.channels(size), levels=2**self.num_bits)

    def encode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        groups = vectors.unflatten(-1, (-1, self.channels(vectors.shape[-1])))  # [N, groups, channels]
        return quantise(groups, self.num_bits).flatten(1)

    def decode_vectors(self, data: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(data.unflatten(1, (size // self.channels(size), -1)), self.num_bits).flatten(1)
