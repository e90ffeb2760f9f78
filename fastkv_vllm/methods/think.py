"""ThinK: snapkv's choice of entries, and of them only the channels that matter to the last queries."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.snapkv import SnapKV


@register("think")
@dataclass(frozen=True)
class ThinK(SnapKV):
    """A KV head stores the channels of its keys with the largest part in the last queries' logits.

    part of channel i = |Q[:, i] K[:, i]^T| (Frobenius) = |Q[:, i]| |K[:, i]|, see `codecs.best_channels`. With a
    `value_channel_ratio` below 1 the same of its values, by their part in what attention gives, see
    `codecs.best_value_channels`.

    Source: arXiv 2407.21018, section 3, on top of SnapKV; 0.6 of the channels and a residual window of 32 are its
    scripts'. Values: appendix D, which is in none of its published code. Differences: channels of a KV head, rated by
    all query heads of its group (theirs: of each query head, on a cache expanded to query heads), as many as a multiple
    of 8; the last `window_size` queries rate (theirs: 32), values by their attention to what is stored. Not as in that
    code: channels that are dropped take no room (its flash form writes zeros in their place), and a batch may have
    several requests.
    """

    source: ClassVar[str] = "arXiv 2407.21018, section 3"
    default_codec: ClassVar[str | None] = "exact"
    default_channel_ratio: ClassVar[float] = 0.6
    default_residual_window: ClassVar[int] = 32
