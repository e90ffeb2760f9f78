"""PyramidInfer: fewer rows from layer to layer, and each layer keeps those it hands on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import ClassVar

import torch

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.kernels.column_sums import column_sums
from fastkv_vllm.methods.base import Method, add_heads, solve_rising
from fastkv_vllm.methods.budgets import CUT_BUDGETS, BudgetOptions
from fastkv_vllm.methods.registry import register


def handed_on(plan: PromptPlan, num_layers: int, options: BudgetOptions) -> list[float]:
    """Entries of each layer: the rows it hands on, the last layer all it sees."""
    return [float(rows - plan.num_tail) for rows in plan.rows_after(num_layers)]


CUT_BUDGETS["handed-on"] = handed_on


@register("pyramidinfer")
@dataclass(frozen=True)
class PyramidInfer(Method):
    """The recent tokens vote, later ones a little more, once for all heads; rows are cut after each layer.

    After layer l of L a share rho_l = (1 - delta) (cos(pi l / L) + 1) / 2 + delta of the rows before the recent ones
    goes on, out of those that came in. What is generated competes with what a layer has kept, so that it never holds
    more than its share of the prompt and a block.

    Source: arXiv 2405.12532, section 3, and the authors' code (the last 20 % of the tokens vote with weights from 1 to
    1.2 and stay). Differences: delta follows from `retention_ratio`, the mean over layers, so that methods compare at
    equal memory (the paper sets delta), or the shares are what calibration found (`layer_shares`); the recent tokens
    are a third of what stays, which is the paper's 20 % of the prompt at the default; kept counts are whole pages.
    Generated tokens are thinned whenever a block is full, by a block of recent votes, out of all that the layer holds
    (theirs: whenever 16 have left the recent window, by all of its votes, out of these 16 only, and the cache grows).
    """

    source: ClassVar[str] = "arXiv 2405.12532, section 3"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    propagates: ClassVar[bool] = True
    one_choice: ClassVar[bool] = True
    recent_ones_vote: ClassVar[bool] = True
    default_retention_ratio: ClassVar[float] = 0.6
    default_num_sink: ClassVar[int] = 4
    default_recent_share: ClassVar[float] = 1 / 3
    default_evict_while_decoding: ClassVar[bool] = True
    schedule_artefact: ClassVar[str | None] = "layer-decays"
    layer_budgets: ClassVar[str] = "handed-on"

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        num_voters = queries.shape[0]
        weights = torch.linspace(1.0, 1.2, num_voters, device=queries.device)
        return column_sums(queries, keys, start=keys.shape[1] - num_voters, weights=weights)

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return add_heads(scores)

    @classmethod
    def schedule(cls, num_layers: int, retention_ratio: float, recent_share: float) -> Sequence[tuple[int, float]]:
        recent = recent_share * retention_ratio

        def shares(delta: float) -> list[float]:
            steps = [
                (1 - delta) * (math.cos(math.pi * layer / num_layers) + 1) / 2 + delta
                for layer in range(num_layers - 1)
            ]
            return [recent + (1 - recent) * share for share in accumulate(steps, mul)]

        def mean(delta: float) -> float:
            kept = shares(delta)
            return (sum(kept) + [1.0, *kept][-1]) / num_layers

        return list(enumerate(shares(solve_rising(mean, retention_ratio))))
