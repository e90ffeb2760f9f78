"""skvq: keys in two bits, values in one and a half, channels that are alike in groups whose extremes are clipped."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from fastkv_vllm.codecs.base import Codec, EntryShape
from fastkv_vllm.kernels.encoded_attention import Form, Kind, Vectors

LEVELS = 4, 3  # values that a number of a key, of a value, can take
_CODES = {4: 4, 3: 5}  # of a byte: 4^4 = 256, 3^5 = 243
_CHANNELS = 64  # of a group at most
_FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ChannelGroups:
    """Which channels of each head's keys and values make up groups, and where their codes begin and end.

    Fields:
        orders: channels, group after group, [heads, 2, D] int64; keys', then values'.
        clips: share of a group's extremes that its codes reach, [heads, 2, groups] float32, (0, 1].
    """

    orders: torch.Tensor
    clips: torch.Tensor

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each channel stands in the order, [heads, 2, D] int64."""
        return self.orders.argsort(dim=2)

    @classmethod
    def of_rank(cls, data: Mapping[str, Any], rank: int, num_ranks: int) -> "ChannelGroups":
        """Those of the heads of one of so many ranks, which hold each layer's in order, equally many or one each.

        Args:
            data: "orders" and "clips" of all layers and heads, [L][H][2][..] each.
        """
        num_heads = len(data["orders"][0])
        first, width = rank * num_heads // num_ranks, max(num_heads // num_ranks, 1)
        orders, clips = (torch.tensor(data[name])[:, first : first + width] for name in ("orders", "clips"))
        return cls(orders.flatten(0, 1), clips.flatten(0, 1))


@dataclass(frozen=True)
class SkvqCodec(Codec):
    """Per token, KV head and group of channels: a minimum and a step of eight bits, and codes of four or three levels.

    minimum = e4m3(clip * min x), step = e4m3((clip * max x - minimum) / (levels - 1)), code = round((x - minimum) /
    step), clamped. Five codes of three levels fill a byte: 1.6 bits a number. Groups have 64 channels or fewer, equally
    many, and a head has two or more: with one there is nothing to group.

    Source: SKVQ, arXiv 2405.06219, section 3. Groups of a head's own channels, of one width (theirs: of all heads',
    ragged): heads then stand for themselves, and lie on any rank.

    Fields:
        groups: of each head of the rank, layer after layer; None: channels in their own order, nothing clipped.
        heads: of each entry that is to be stored or read, [N] int64; set by `of_heads`.
    """

    source: ClassVar[str] = "arXiv 2405.06219, section 3"
    artefact: ClassVar[str | None] = "channel-groups"
    exact_sinks: ClassVar[bool] = True

    groups: ChannelGroups | None = field(default=None, compare=False)
    heads: torch.Tensor | None = field(default=None, compare=False)

    def num_bytes(self, entry: EntryShape) -> int:
        return sum(_num_bytes(*part) for part in zip((entry.key_dim, entry.value_dim), LEVELS, strict=True))

    def of_heads(self, heads: torch.Tensor) -> "SkvqCodec":
        return replace(self, heads=heads)

    def form(self, entry: EntryShape) -> Form:
        parts, low = list[Vectors](), 0
        for size, levels in zip((entry.key_dim, entry.value_dim), LEVELS, strict=True):
            groups = num_groups(size)
            steps, codes = low + groups, low + 2 * groups
            parts.append(Vectors(Kind.CLIPPED, size, low, steps, codes, channels=size // groups, levels=levels))
            low += _num_bytes(size, levels)
        keys, values = parts
        return Form(low, 1, keys, values)

    def orders(self, heads: torch.Tensor) -> torch.Tensor | None:
        return None if self.groups is None else self.groups.orders[heads]

    def as_stored(self) -> "SkvqCodec":
        return SkvqCodec()

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        parts = []
        for part, (x, levels) in enumerate(zip((keys, values), LEVELS, strict=True)):
            clips = None
            if self.groups is not None:
                x, clips = self._pick(x, self.groups.orders[:, part]), self.groups.clips[self.heads, part]
            codes, low, step = quantise_clipped(x.unflatten(1, (num_groups(x.shape[1]), -1)), levels, clips)
            parts += [low.view(torch.uint8), step.view(torch.uint8), _pack(codes.flatten(1), levels)]
        return torch.cat(parts, dim=1)

    def decode(self, data: torch.Tensor, entry: EntryShape) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = entry.key_dim, entry.value_dim
        parts = data.split([_num_bytes(*part) for part in zip(sizes, LEVELS, strict=True)], dim=1)
        decoded = []
        for part, (of_part, size, levels) in enumerate(zip(parts, sizes, LEVELS, strict=True)):
            groups = num_groups(size)
            low, step = of_part[:, : 2 * groups].contiguous().view(_FLOAT8).float().unsqueeze(2).chunk(2, dim=1)
            codes = _unpack(of_part[:, 2 * groups :], levels)[:, :size].unflatten(1, (groups, -1))
            x = codes.float().mul_(step).add_(low).flatten(1)
            if self.groups is not None:
                x = self._pick(x, self.groups.places[:, part])
            decoded.append(x)
        return decoded[0], decoded[1]

    def _pick(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Columns [heads, D] of x [N, D], by the head of each row."""
        assert self.heads is not None, "of_heads comes first"
        return x.gather(1, columns[self.heads])


def num_groups(size: int) -> int:
    """Groups of so many channels.

    Raises:
        ValueError: groups would differ in width.
    """
    count = max(2, -(-size // _CHANNELS))
    if size % count:
        raise ValueError(f"heads must have channels for groups of equally many, {_CHANNELS} or fewer; got {size}")
    return count


def quantise_clipped(
    groups: torch.Tensor, levels: int, clips: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of groups of numbers, with the minimum and the step of each.

    Args:
        groups: [..., G].
        levels: values of a code.
        clips: share of the extremes that codes reach, [...]; None: all.

    Returns:
        Codes [..., G] uint8, minima and steps [...] e4m3; a number reads as code * step + minimum.
    """
    x = groups.float()
    low, high = x.aminmax(dim=-1)
    if clips is not None:
        low, high = low * clips, high * clips
    low = _float8(low)
    step = _float8(((high - low.float()) / (levels - 1)).clamp_(min=0))
    minimum, width = low.float().unsqueeze(-1), step.float().unsqueeze(-1)
    codes = torch.where(width > 0, (x - minimum) / width, 0).round_().clamp_(0, levels - 1)
    return codes.to(torch.uint8), low, step


def _float8(x: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(_FLOAT8).max
    return x.clamp(-largest, largest).to(_FLOAT8)


def _num_bytes(size: int, levels: int) -> int:
    return 2 * num_groups(size) - (-size // _CODES[levels])


def _pack(codes: torch.Tensor, levels: int) -> torch.Tensor:
    """Codes [N, D] -> bytes [N, B], numbers to the base of `levels`, the first code in the last digit."""
    per_byte = _CODES[levels]
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    weights = torch.tensor([levels**i for i in range(per_byte)], dtype=torch.uint8)
    return (padded * weights).sum(dim=2, dtype=torch.uint8)


def _unpack(data: torch.Tensor, levels: int) -> torch.Tensor:
    """Bytes [N, B] -> codes [N, B * codes of a byte] uint8."""
    digits = torch.arange(256).unsqueeze(1) // torch.tensor([levels**i for i in range(_CODES[levels])]) % levels
    return digits.to(torch.uint8)[data.long()].flatten(1)
