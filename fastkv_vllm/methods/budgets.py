"""Budgets: how layers and KV heads share the pages of a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastkv_vllm.cache import PromptPlan, share_pages

UNIFORM = "uniform"


@dataclass(frozen=True)
class BudgetOptions:
    """Numbers that budgets take from the configuration.

    Fields:
        pyramid_beta: how steep the pyramid is, see `pyramidkv`.
        head_floor: share of a head's even budget that it always has, see `adakv`.
    """

    pyramid_beta: int = 20
    head_floor: float = 0.2


# (plan, number of layers, options) -> wished entries per layer and KV head, tail excluded, [L].
LayerBudget = Callable[[PromptPlan, int, BudgetOptions], list[float]]
# (scores [H, n] with forced entries at +inf, even budget in entries, options) -> wished entries per head, [H].
HeadBudget = Callable[[torch.Tensor, int, BudgetOptions], list[float]]

LAYER_BUDGETS: dict[str, LayerBudget] = {}
HEAD_BUDGETS: dict[str, HeadBudget] = {}


@dataclass(frozen=True)
class Allocator:
    """Layers share the prompt's pages, then the KV heads of a layer share that layer's.

    Fields:
        layers: "uniform" or a name in LAYER_BUDGETS; known from the prompt's length.
        heads: "uniform" or a name in HEAD_BUDGETS; from the scores of a layer's heads.
        options: numbers the two take.
    """

    layers: str
    heads: str
    options: BudgetOptions

    @property
    def is_ragged(self) -> bool:
        return (self.layers, self.heads) != (UNIFORM, UNIFORM)

    @property
    def needs_all_heads(self) -> bool:
        """Whether the scores of all KV heads of a layer must be at hand, whichever rank holds them."""
        return self.heads != UNIFORM

    def pages(self, plan: PromptPlan, scores: Sequence[torch.Tensor], num_heads: int) -> torch.Tensor:
        """Whole pages of each layer and KV head, tail excluded.

        Args:
            plan: of the prompt; its mean of pages is what all layers and heads have together.
            scores: of each layer's entries before the tail, [H or 1, n_l] float32, forced ones at +inf; n_l is what
                the layer saw, which bounds what it keeps.
            num_heads: KV heads of a layer (H).

        Returns:
            [L, H] int64, plan.num_pages * L * H in all.
        """
        num_layers, size = len(scores), plan.block_size
        most = [layer.shape[1] // size for layer in scores]
        layer_pages = [plan.num_pages] * num_layers
        if self.layers != UNIFORM:
            wanted = [n / size for n in LAYER_BUDGETS[self.layers](plan, num_layers, self.options)]
            low = [plan.least_pages] * num_layers
            layer_pages = share_pages(wanted, sum(layer_pages), low=low, high=most)
        pages = []
        for layer, even, high in zip(scores, layer_pages, most, strict=True):
            if self.heads == UNIFORM:
                pages.append([even] * num_heads)
                continue
            rated = layer.expand(num_heads, -1)
            wanted = [n / size for n in HEAD_BUDGETS[self.heads](rated, even * size, self.options)]
            low = [plan.least_pages] * num_heads
            pages.append(share_pages(wanted, even * num_heads, low=low, high=[high] * num_heads))
        return torch.tensor(pages)
