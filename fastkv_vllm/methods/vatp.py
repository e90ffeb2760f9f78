"""VATP: attention counts for as much as the value it brings."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.snapkv import SnapKV


@register("vatp")
@dataclass(frozen=True)
class VATP(SnapKV):
    """SnapKV's vote times the L1 norm of the entry's value.

    First tokens draw much attention and have tiny values, so the product would drop them: 20 of them always stay. The
    factor is `value_norms` of the configuration and works with any method that votes.

    Source: arXiv 2406.12335, section 3, and the authors' code (20 sinks). Differences: the vote is SnapKV's (theirs are
    H2O's and that of the last 400 queries); entries really leave the cache (theirs are masked); once, at the end of
    the prompt.
    """

    source: ClassVar[str] = "arXiv 2406.12335, section 3"
    default_value_norms: ClassVar[bool] = True
    default_num_sink: ClassVar[int] = 20
