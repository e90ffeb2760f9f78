"""StreamingLLM: the first tokens and the most recent ones stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.registry import register


@register("streamingllm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Nobody votes: attention sinks plus recency.

    Source: arXiv 2309.17453, section 3.2. Differences: entries are dropped when the prompt ends and whenever a block is
    full after it (the paper drops one at each step); keys keep the positions they were rotated with (the paper rotates
    again at each step), as all ports to other engines do. The lower bound of every comparison.
    """

    source: ClassVar[str] = "arXiv 2309.17453, section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("positions",)
    default_num_sink: ClassVar[int] = 4
    default_evict_while_decoding: ClassVar[bool] = True

    def score(self, *, positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return positions.to(torch.float32).unsqueeze(0)
