"""What is left of keys and values that a codec stores: numbers rounded one by one, nothing packed."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Groups = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]  # of keys and values: channels in order, clips

AFFINE = {"int8": 8, "int4": 4, "int2": 2}
KIVI = {"kivi4": 4, "kivi2": 2}
TWICE = {"int4x2": True, "int4x2-draft": False}  # whether the lower four bits are read, too
FLOAT8 = ("fp8",)
EXACT = ("exact",)
CLIPPED = {"skvq": (4, 3)}  # levels of keys, of values


def stored(codec: str, keys: Tensor, values: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values [n, D] as they come back, in the order in which they are kept.

    int8, int4, int2: arXiv 2412.12706, groups of 64 channels. kivi4, kivi2: arXiv 2402.02750, section 3, keys in groups
    of 32 tokens, values in groups of 32 channels. fp8: e4m3 without a scale. skvq: arXiv 2405.06219, section 3.
    int4x2: arXiv 2502.10424, section 4, in groups of 16 tokens and 32 channels; int4x2-draft: its upper four bits.

    groups: with skvq, what was measured of the head; None: channels in their own order, not clipped.
    """
    if codec in AFFINE:
        parts = []
        for entries in (keys, values):
            size = entries.shape[1]
            width = max(n for n in range(1, 65) if size % n == 0 and size // n == -(-size // 64))
            parts.append(rounded(entries, width, AFFINE[codec]))
        return tuple(parts)
    if codec in KIVI:
        by_channel = rounded(keys.T, 32, KIVI[codec]).T
        return by_channel, rounded(values, 32, KIVI[codec])
    if codec in TWICE:
        return rounded_twice(keys.T, 16, TWICE[codec]).T, rounded_twice(values, 32, TWICE[codec])
    if codec in EXACT:
        return keys.clone(), values.clone()
    if codec in FLOAT8:
        return tuple(map(e4m3, (keys, values)))
    if codec in CLIPPED:
        orders, clips = groups or ([range(x.shape[1]) for x in (keys, values)], [[1.0] * 9] * 2)
        return tuple(map(clipped, (keys, values), CLIPPED[codec], orders, clips))
    raise ValueError(
        f"codec must be one of {', '.join((*AFFINE, *KIVI, *TWICE, *FLOAT8, *EXACT, *CLIPPED))}; got {codec!r}"
    )


@cache
def groups_of_heads(file: str, layer: int) -> list[Groups]:
    """What a file of `fastkv-vllm calibrate channels` says about a layer's heads."""
    data = json.loads(Path(file).read_text())["data"]
    return list(zip(data["orders"][layer], data["clips"][layer], strict=True))


def clipped(rows: Tensor, levels: int, order: Sequence[int], clips: Sequence[float]) -> Tensor:
    """Rows [n, D] rounded to so many values between the clipped extremes of each group of channels, e4m3 both."""
    count = max(2, -(-len(order) // 64))
    width = len(order) // count
    out = rows.clone()
    for number in range(count):
        own = list(order[number * width : (number + 1) * width])
        group, clip = rows[:, own], torch.tensor(clips[number])
        low = e4m3(clip * group.min(dim=1, keepdim=True).values)
        step = e4m3((clip * group.max(dim=1, keepdim=True).values - low) / (levels - 1))
        codes = ((group - low) / step).round().clamp(0, levels - 1)
        out[:, own] = torch.where(step > 0, low + codes * step, low)
    return out


def e4m3(x: Tensor) -> Tensor:
    """Numbers rounded to eight bits, those beyond the range to its end."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def cut(x: Tensor, float8: torch.dtype) -> Tensor:
    """Numbers as vLLM's CPU cache of eight bits has them: the nearest that is no larger in size."""
    largest = torch.finfo(float8).max
    rounded = x.float().clamp(-largest, largest).to(float8)
    is_larger = rounded.float().abs() > x.float().abs()
    return (rounded.view(torch.uint8) - is_larger.to(torch.uint8)).view(float8)


def channel_parts(queries: Tensor, keys: Tensor) -> list[float]:
    """How much each channel adds to the logits of queries [n, D] and keys [N, D]: norm of those it alone makes.

    Source: ThinK, arXiv 2407.21018, section 3.
    """
    return [float(torch.outer(q, k).norm()) for q, k in zip(queries.T, keys.T, strict=True)]


def value_channel_parts(queries: Tensor, keys: Tensor, values: Tensor) -> list[float]:
    """How much each channel of the values [N, D] adds to what attention gives to queries [n, D]: norm of that alone.

    Source: ThinK, arXiv 2407.21018, appendix D.
    """
    outputs = []
    for query in queries:
        logits = (keys * query).sum(dim=1) / math.sqrt(len(query))
        outputs.append((logits.softmax(dim=0).unsqueeze(1) * values).sum(dim=0))
    return [float(channel.norm()) for channel in torch.stack(outputs).T]


def rounded(rows: Tensor, width: int, num_bits: int) -> Tensor:
    """Rows [n, N] rounded to 2^bits values between the extremes of each group of `width` numbers side by side."""
    groups = []
    for group in rows.split(width, dim=1):
        low = group.min(dim=1, keepdim=True).values.half().float()
        step = ((group.max(dim=1, keepdim=True).values - low) / (2**num_bits - 1)).half().float()
        codes = ((group - low) / step).round().clamp(0, 2**num_bits - 1)
        groups.append(torch.where(step > 0, low + codes * step, low))
    return torch.cat(groups, dim=1)


def rounded_twice(rows: Tensor, width: int, whole: bool) -> Tensor:
    """Rows rounded to 16 values between the extremes of each `width` numbers; whole: what that loses, to 16 more."""
    groups = []
    for group in rows.split(width, dim=1):
        low = group.min(dim=1, keepdim=True).values.half().float()
        step = ((group.max(dim=1, keepdim=True).values - low) / 15).half().float()
        upper = ((group - low) / step).round().clamp(0, 15)
        lower = ((group - (low + upper * step)) / (step / 16)).round().clamp(-8, 7)
        number = low + (16 * upper + lower) * (step / 16) if whole else low + upper * step
        groups.append(torch.where(step > 0, number, low))
    return torch.cat(groups, dim=1)
