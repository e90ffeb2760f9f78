"""PyramidKV: early layers keep more entries than late ones, by an arithmetic series."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.methods.budgets import LAYER_BUDGETS, BudgetOptions
from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.snapkv import SnapKV


def pyramid(plan: PromptPlan, num_layers: int, options: BudgetOptions) -> list[float]:
    """Entries of each layer, falling in equal steps around the mean.

    With b the even budget without the window, the last layer has b / beta entries and the first 2 b minus that; a
    first layer that would have more than the prompt has it all, and the last gets what is left.
    """
    even = plan.num_kept - plan.window_size
    least = even / options.pyramid_beta
    most = min(2 * even - least, plan.num_tokens - plan.window_size)
    least = 2 * even - most
    step = (most - least) / (num_layers - 1) if num_layers > 1 else 0.0
    return [most - layer * step + plan.window_size - plan.num_tail for layer in range(num_layers)]


LAYER_BUDGETS["pyramid"] = pyramid


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's vote with budgets that fall from layer to layer.

    Source: arXiv 2406.02069, section 3.2, and the authors' code. Differences: budgets are whole pages that add up to
    the even budget exactly (the code's integer division loses some); no layer has less than one page; per KV head; no
    special case for prompts below twice the budget, where the first layer keeps everything and the series still adds
    up.
    """

    source: ClassVar[str] = "arXiv 2406.02069, section 3.2"
    layer_budgets: ClassVar[str] = "pyramid"
