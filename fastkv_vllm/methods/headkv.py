"""HeadKV: heads that were seen to retrieve keep more."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.methods.budgets import MODEL_BUDGETS, BudgetOptions, ModelBudget
from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.snapkv import SnapKV


def by_importance(plan: PromptPlan, options: BudgetOptions) -> list[list[float]]:
    """Entries of each head: the even budget less its beta-th, plus a share of all those by the head's importance.

    With b the even budget without the window: b - b / beta + importance * (b / beta) * L * H, importances adding up
    to 1.
    """
    even = plan.num_kept - plan.window_size
    shared = even / options.head_beta
    weights = options.head_weights
    total, num_heads = sum(map(sum, weights)), sum(map(len, weights))
    rest = even - shared + plan.window_size - plan.num_tail
    return [[rest + weight / total * shared * num_heads for weight in layer] for layer in weights]


MODEL_BUDGETS["importance"] = ModelBudget("head-importance", "kv_heads", by_importance)


@register("headkv")
@dataclass(frozen=True)
class HeadKV(SnapKV):
    """SnapKV's vote with budgets per layer and KV head by importance, measured once per model.

    Source: arXiv 2410.19258, section 3, and the authors' code (beta 1.5). Differences: importance and budgets are per
    KV head (the mean over its group; theirs are per query head and store a cache for each); budgets are whole pages
    that add up to the even budget exactly, and no head has more than it saw; votes are summed over the window (theirs
    averaged, the same ranking).
    """

    source: ClassVar[str] = "arXiv 2410.19258, section 3"
    head_budgets: ClassVar[str] = "importance"
