"""kivi4, kivi2: keys by channel, values by token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape
from fastkv_vllm.kernels.encoded_attention import Form, Kind, Vectors
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise


@dataclass(frozen=True)
class KiviCodec(Codec):
    """Keys: 32 tokens of a channel share minimum and step. Values: 32 channels of a token do.

    A few channels of the keys are large in all tokens, so that a group across channels wastes its codes on them.

    Source: arXiv 2402.02750, section 3. The 32 tokens are neighbours among those that stay, all of one request.

    Fields:
        num_bits: of a code.
    """

    source: ClassVar[str] = "arXiv 2402.02750, section 3"
    group_size: ClassVar[int] = 32
    channels: ClassVar[int] = 32

    num_bits: int

    def num_bytes(self, entry: EntryShape) -> int:
        if entry.value_dim % self.channels:
            raise ValueError(
                f"heads must store their values in a multiple of {self.channels} channels; got {entry.value_dim}"
            )
        of_keys = entry.key_dim * group_bytes(self.group_size, self.num_bits)
        groups = self.group_size * entry.value_dim // self.channels
        return of_keys + groups * group_bytes(self.channels, self.num_bits)

    def form(self, entry: EntryShape) -> Form:
        levels = 2**self.num_bits
        low = entry.key_dim * group_bytes(self.group_size, self.num_bits)
        of_token = entry.value_dim // self.channels * group_bytes(self.channels, self.num_bits)
        values = Vectors(
            Kind.BY_TOKEN, entry.value_dim, low, token_bytes=of_token, channels=self.channels, levels=levels
        )
        keys = Vectors(Kind.BY_CHANNEL, entry.key_dim, levels=levels)
        return Form(self.num_bytes(entry), self.group_size, keys, values)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        by_channel = keys.unflatten(0, (-1, self.group_size)).transpose(1, 2)  # [g, D, 32]
        by_token = values.view(-1, self.group_size, values.shape[1] // self.channels, self.channels)
        parts = [quantise(groups, self.num_bits).flatten(1) for groups in (by_channel, by_token)]
        return torch.cat(parts, dim=1)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys = entry.key_dim * group_bytes(self.group_size, self.num_bits)
        by_channel = data[:, :of_keys].unflatten(1, (entry.key_dim, -1))
        by_token = data[:, of_keys:].unflatten(1, (self.group_size, entry.value_dim // self.channels, -1))
        keys = dequantise(by_channel, self.num_bits).transpose(1, 2).flatten(0, 1)
        return keys, dequantise(by_token, self.num_bits).flatten(2).flatten(0, 1)
