"""int8, int4, int2: each key and each value by itself, in groups of channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise

CHANNELS = 64  # of a group, or all of a narrower head


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

    def num_bytes(self, head_dim: int) -> int:
        channels = min(CHANNELS, head_dim)
        if head_dim % channels:
            raise ValueError(f"heads must have a multiple of {CHANNELS} channels or fewer; got {head_dim}")
        return 2 * (head_dim // channels) * group_bytes(channels, self.num_bits)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        channels = min(CHANNELS, keys.shape[-1])
        entries = torch.stack([keys, values], dim=1).unflatten(-1, (-1, channels))  # [N, 2, D / channels, channels]
        return quantise(entries, self.num_bits).flatten(1)

    def decode(self, data: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_groups = head_dim // min(CHANNELS, head_dim)
        entries = dequantise(data.view(len(data), 2, num_groups, -1), self.num_bits).flatten(2)
        return entries[:, 0], entries[:, 1]
