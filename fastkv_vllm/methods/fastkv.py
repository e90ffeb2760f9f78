"""FastKV: SnapKV's vote for the cache, and the same vote once more for the rows late layers see."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.kernels.window_scores import window_scores
from fastkv_vllm.methods.base import Method, add_heads
from fastkv_vllm.methods.registry import register


@register("fastkv")
@dataclass(frozen=True)
class FastKV(Method):
    """Window scorer + uniform budget + cuts of the rows (token-selective propagation, TSP).

    Layers up to and including the TSP layer see the whole prompt. There the scores of all KV heads are added and
    the best rows go on, with their true positions; later layers rate and keep out of what they saw. The paper has one
    such layer; with more, each chooses out of the rows the one before it let through.

    Source: arXiv 2502.01068 v3, sections 3-4, and the authors' code of November 2025 (pool before the group sum,
    max pooling). Differences: kept counts are whole pages, late layers see at least what they keep, and prompts
    under `min_tokens` are left alone (the authors' code fails on very short prompts).
    """

    source: ClassVar[str] = "arXiv 2502.01068 v3, sections 3-4"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    propagates: ClassVar[bool] = True

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return window_scores(queries, keys, kernel_size=self.kernel_size, pooling=self.pooling)

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return add_heads(scores)
