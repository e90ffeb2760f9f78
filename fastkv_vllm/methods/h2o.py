"""H2O: the entries that all queries together looked at most, and the most recent ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.registry import register


@register("h2o")
@dataclass(frozen=True)
class H2O(Method):
    """Half of the budget to heavy hitters, half to the most recent entries.

    Every query votes, the prompt's and those that follow, so early entries collect more votes; H2O leaves that so.

    Source: arXiv 2306.14048, section 4. Differences: entries are dropped when the prompt ends and whenever a block is
    full after it (the paper drops one at each step); per KV head, the sums of a group added; kept counts are whole
    pages. Each query votes for the keys before it only, unlike in some ports.
    """

    source: ClassVar[str] = "arXiv 2306.14048, section 4"
    needs: ClassVar[tuple[str, ...]] = ("column_sums",)
    default_recent_share: ClassVar[float] = 0.5
    default_decay: ClassVar[float | None] = 1.0
    default_evict_while_decoding: ClassVar[bool] = True

    def score(self, *, column_sums: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return column_sums
