"""SnapKV: the last queries of the prompt vote for the entries that stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.kernels.window_scores import window_scores
from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.registry import register


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Window attention, pooled over positions, decides per KV head.

    The softmax runs over all keys (the window's own included) in float32 with a causal corner, is summed over
    the window's queries, cut before the window, pooled per query head and then added over the group.

    Source: arXiv 2404.14469, section 4. Differences: entries are chosen per KV head, not per query head (the
    cache holds KV heads; the paper's code stores a copy per query head and loses GQA's saving), and kept counts
    are whole pages. The defaults are FastKV's (window 8, kernel 7, max), so that the two differ in TSP only; the
    paper's tables used window 32, kernel 7, max.
    """

    source: ClassVar[str] = "arXiv 2404.14469, section 4"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return window_scores(queries, keys, kernel_size=self.kernel_size, pooling=self.pooling)
