"""int4x2: eight bits of which four can be read alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape
from fastkv_vllm.kernels.encoded_attention import Form, Kind, Vectors

TOKENS = 16  # of a channel of the keys that make a group
CHANNELS = 32  # of a token's value that do


@dataclass(frozen=True)
class HierarchicalCodec(Codec):
    """Four bits as KIVI has them, and four more that say where in its step a number lies, in sixteenths.

    Keys: 16 tokens of a channel share minimum and step. Values: 32 channels of a token do. Of each 16 entries minima
    and steps come first, float16, then the upper halves of all numbers, then the lower ones: a reader of four bits
    reads little more than half of the bytes. One copy serves both readers.

    Source: QuantSpec, arXiv 2502.10424, section 4 (its groups have 128 numbers; here they must fill pages).

    Fields:
        is_draft: only the upper halves are read.
    """

    source: ClassVar[str] = "arXiv 2502.10424, section 4"
    group_size: ClassVar[int] = TOKENS

    is_draft: bool = False

    def num_bytes(self, entry: EntryShape) -> int:
        return sum(self._sizes(entry, halves=2))

    def read_bytes(self, entry: EntryShape) -> int:
        return sum(self._sizes(entry, halves=1 if self.is_draft else 2))

    def draft_view(self) -> "HierarchicalCodec":
        return replace(self, is_draft=True)

    def form(self, entry: EntryShape) -> Form:
        header, of_keys, of_values, *_ = self._sizes(entry, halves=2)
        low, num_values = 4 * entry.key_dim, TOKENS * entry.value_dim // CHANNELS
        keys = Vectors(Kind.HALVES_BY_CHANNEL, entry.key_dim, 0, 2 * entry.key_dim, header)
        values = Vectors(
            Kind.HALVES_BY_TOKEN, entry.value_dim, low, low + 2 * num_values, header + of_keys, channels=CHANNELS
        )
        if not self.is_draft:
            keys, values = (part._replace(more=part.codes + of_keys + of_values) for part in (keys, values))
        return Form(self.num_bytes(entry), TOKENS, keys, values)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        by_token = values.float().reshape(-1, TOKENS, values.shape[1] // CHANNELS, CHANNELS)
        *of_keys, key_codes = _quantise(keys.float().unflatten(0, (-1, TOKENS)), dim=1)
        *of_values, value_codes = _quantise(by_token, dim=3)
        header = torch.cat([numbers.flatten(1) for numbers in (*of_keys, *of_values)], dim=1)
        codes = key_codes, value_codes.flatten(2)
        halves = [_pack(part >> 4) for part in codes] + [_pack(part & 15) for part in codes]
        return torch.cat([header.view(torch.uint8), *halves], dim=1)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        header, *halves = data.split(self._sizes(entry, halves=1 if self.is_draft else 2), dim=1)
        num_values = TOKENS * entry.value_dim // CHANNELS
        numbers = header.contiguous().view(torch.float16).float()
        *of_keys, low, step = numbers.split([entry.key_dim] * 2 + [num_values] * 2, dim=1)
        keys = self._numbers(halves[::2], *(number.unsqueeze(1) for number in of_keys))
        by_token = -1, TOKENS, entry.value_dim // CHANNELS
        values = self._numbers(halves[1::2], low.view(*by_token, 1), step.view(*by_token, 1))
        return keys.flatten(0, 1), values.reshape(-1, entry.value_dim)

    def _numbers(self, halves: Sequence[torch.Tensor], low: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """low + code * step of the upper halves, or of both low + (16 upper + lower) * step / 16; float32.

        Args:
            halves: of the codes of all numbers, [g, bytes] each; those of a draft are the upper ones alone.
            low, step: of their groups, [g, 16 or 1, groups, ..].
        """
        codes = _unpack(halves[0])
        if not self.is_draft:
            codes, step = codes.mul_(16).add_(_unpack(halves[1])), step / 16
        groups = codes.view(len(codes), TOKENS, *low.shape[2:-1], -1).float()
        return (groups if self.is_draft else groups.sub_(8)).mul_(step).add_(low)

    @staticmethod
    def _sizes(entry: EntryShape, halves: int) -> list[int]:
        """Bytes of 16 entries: minima and steps, then so many times half a byte for each number of keys and values."""
        if entry.value_dim % CHANNELS:
            raise ValueError(
                f"heads must store their values in a multiple of {CHANNELS} channels; got {entry.value_dim}"
            )
        num_groups = entry.key_dim + TOKENS * entry.value_dim // CHANNELS
        return [4 * num_groups, *[TOKENS // 2 * entry.key_dim, TOKENS // 2 * entry.value_dim] * halves]


def _quantise(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimum and step of groups along a dimension, float16, and codes of eight bits: 16 upper + lower + 8.

    minimum = min x, step = (max x - minimum) / 15, upper = clamp(round((x - minimum) / step), 0, 15), lower =
    clamp(round((x - minimum - upper * step) / (step / 16)), -8, 7), halves to even; 0 where step is 0.
    """
    low = x.amin(dim=dim, keepdim=True).half()
    step = ((x.amax(dim=dim, keepdim=True) - low) / 15).half()
    upper = torch.where(step > 0, (x - low) / step, 0).round_().clamp_(0, 15)
    left = x - (low + upper * step)
    lower = torch.where(step > 0, left / (step.float() / 16), 0).round_().clamp_(-8, 7)
    return low, step, upper.mul_(16).add_(lower).add_(8).to(torch.uint8)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits [g, 16, size] -> [g, 8 * size], those of the first eight entries in bytes' lower halves."""
    first, second = codes.chunk(2, dim=1)
    return (first | second << 4).flatten(1)


def _unpack(data: torch.Tensor) -> torch.Tensor:
    """Those of the first eight entries, then those of the second, [g, 2, 8 * size]."""
    return torch.stack([data & 15, data >> 4], dim=1)
