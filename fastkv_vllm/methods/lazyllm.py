"""LazyLLM: rows the current token does not look at are left behind, layer by layer, until one looks at them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.methods.base import add_heads, solve_rising
from fastkv_vllm.methods.budgets import CUT_BUDGETS, BudgetOptions
from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.tova import TOVA


def seen(plan: PromptPlan, num_layers: int, options: BudgetOptions) -> list[float]:
    """Entries of each layer: all it sees."""
    return [float(rows - plan.num_tail) for rows in [plan.num_tokens, *plan.rows_after(num_layers)[:-1]]]


CUT_BUDGETS["seen"] = seen


@register("lazyllm")
@dataclass(frozen=True)
class LazyLLM(TOVA):
    """The current query's vote, once for all heads, at three layers, for the prompt's last token and each after it.

    After a quarter, a half and three quarters of the layers the same share of the rows goes on; the layers up to the
    next cut hold those, as many at all times. A row left behind waits there with its hidden state and resumes from it
    when a later token chooses it.

    Source: arXiv 2407.14057, section 3. Differences: an entry that is not chosen gives its place to one that comes
    back, so it is computed anew if it returns (the paper keeps it and computes each row of a layer once); what is
    generated stays; the window and the tail of the last block always go on; the share follows from `retention_ratio`,
    the mean over layers (the paper tunes layers and percentiles per task and prints neither); kept counts are whole
    pages.
    """

    source: ClassVar[str] = "arXiv 2407.14057, section 3"
    propagates: ClassVar[bool] = True
    revives: ClassVar[bool] = True
    default_retention_ratio: ClassVar[float] = 0.5
    default_evict_while_decoding: ClassVar[bool] = False
    layer_budgets: ClassVar[str] = "seen"

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return add_heads(scores)

    @classmethod
    def schedule(cls, num_layers: int, retention_ratio: float, recent_share: float) -> Sequence[tuple[int, float]]:
        ends = [round(quarter * num_layers / 4) - 1 for quarter in (1, 2, 3)]
        cuts = sorted({end for end in ends if 0 <= end < num_layers - 1})

        def mean(share: float) -> float:
            return sum(share ** sum(end < layer for end in cuts) for layer in range(num_layers)) / num_layers

        share = solve_rising(mean, retention_ratio)
        return [(end, share ** (i + 1)) for i, end in enumerate(cuts)]
