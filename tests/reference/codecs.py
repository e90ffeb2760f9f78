"""What is left of keys and values that a codec stores: numbers rounded one by one, nothing packed."""

import torch
from torch import Tensor

AFFINE = {"int8": 8, "int4": 4, "int2": 2}
KIVI = {"kivi4": 4, "kivi2": 2}
FLOAT8 = ("fp8",)
EXACT = ("exact",)


def stored(codec: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [n, D] as they come back, in the order in which they are kept.

    int8, int4, int2: arXiv 2412.12706, groups of 64 channels. kivi4, kivi2: arXiv 2402.02750, section 3, keys in groups
    of 32 tokens, values in groups of 32 channels. fp8: e4m3 without a scale.
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
    if codec in EXACT:
        return keys.clone(), values.clone()
    if codec in FLOAT8:
        return tuple(x.clamp(-448, 448).to(torch.float8_e4m3fn).float() for x in (keys, values))
    raise ValueError(f"codec must be one of {', '.join((*AFFINE, *KIVI, *FLOAT8, *EXACT))}; got {codec!r}")


def channel_parts(queries: Tensor, keys: Tensor) -> list[float]:
    """How much each channel adds to the logits of queries [n, D] and keys [N, D]: norm of those it alone makes.

    Source: ThinK, arXiv 2407.21018, section 3.
    """
    return [float(torch.outer(q, k).norm()) for q, k in zip(queries.T, keys.T, strict=True)]


def rounded(rows: Tensor, width: int, num_bits: int) -> Tensor:
    """Rows [n, N] rounded to 2^bits values between the extremes of each group of `width` numbers side by side."""
    groups = []
    for group in rows.split(width, dim=1):
        low = group.min(dim=1, keepdim=True).values.half().float()
        step = ((group.max(dim=1, keepdim=True).values - low) / (2**num_bits - 1)).half().float()
        codes = ((group - low) / step).round().clamp(0, 2**num_bits - 1)
        groups.append(torch.where(step > 0, low + codes * step, low))
    return torch.cat(groups, dim=1)
