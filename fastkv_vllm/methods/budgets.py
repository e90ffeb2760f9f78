"""Budgets: how layers and KV heads share the pages of a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastkv_vllm.cache import PromptPlan, Streaming, share_pages
from fastkv_vllm.methods.density import DENSITY, by_density

UNIFORM = "uniform"


@dataclass(frozen=True)
class BudgetOptions:
    """Numbers that budgets take from the configuration.

    Fields:
        pyramid_beta: how steep the pyramid is, see `pyramidkv`.
        head_floor: share of a head's even budget that it always has, see `adakv`.
        head_beta: a beta-th of the budget is shared by importance, see `headkv`.
        streaming_tokens: entries of a streaming head, see `duoattention`.
        head_weights: what was measured of each layer and KV head, [L][H], for budgets in MODEL_BUDGETS.
    """

    pyramid_beta: int = 20
    head_floor: float = 0.2
    head_beta: float = 1.5
    streaming_tokens: int = 320
    head_weights: Sequence[Sequence[float]] = ()


# (plan, number of layers, options) -> wished entries per layer and KV head, tail excluded, [L].
LayerBudget = Callable[[PromptPlan, int, BudgetOptions], list[float]]
# (scores [H, n] with forced entries at +inf, even budget in entries, options) -> wished entries per head, [H].
HeadBudget = Callable[[torch.Tensor, int, BudgetOptions], list[float]]

LAYER_BUDGETS: dict[str, LayerBudget] = {}
# Those that follow from where a method cuts rows, whole pages; each belongs to the methods with such a schedule of
# their own.
CUT_BUDGETS: dict[str, LayerBudget] = {}
HEAD_BUDGETS: dict[str, HeadBudget] = {}


@dataclass(frozen=True)
class ModelBudget:
    """Budgets of all layers and KV heads by what was measured once of the model.

    Fields:
        artefact: kind of the file that holds the measurement, see `fastkv_vllm.calibrate`.
        key: where in its data the weights are, [L][H].
        wish: (plan, options) -> wished entries of each layer and KV head, tail excluded, [L][H].
    """

    artefact: str
    key: str
    wish: Callable[[PromptPlan, BudgetOptions], list[list[float]]]


MODEL_BUDGETS: dict[str, ModelBudget] = {}


@dataclass(frozen=True)
class Allocator:
    """Layers share the prompt's pages, then the KV heads of a layer share that layer's.

    Fields:
        layers: "uniform", a name in LAYER_BUDGETS or CUT_BUDGETS (known from the prompt's length), or "density" (from
            the attention of the voters in all layers).
        heads: "uniform", a name in HEAD_BUDGETS (from the scores of a layer's heads), or one in MODEL_BUDGETS, which
            shares the pages of all layers at once.
        options: numbers the two take.
    """

    layers: str
    heads: str
    options: BudgetOptions

    @property
    def is_ragged(self) -> bool:
        return (self.layers, self.heads) != (UNIFORM, UNIFORM)

    def pages(
        self, plan: PromptPlan, scores: Sequence[torch.Tensor], num_heads: int, densities: Sequence[float] = ()
    ) -> torch.Tensor:
        """Whole pages of each layer and KV head, tail excluded.

        Args:
            plan: of the prompt; its mean of pages is what all layers and heads have together.
            scores: of each layer's entries before the tail, [H or 1, n_l] float32, forced ones at +inf; n_l is what
                the layer saw, which bounds what it keeps.
            num_heads: KV heads of a layer (H), of all ranks where heads share unevenly.
            densities: of each layer, see `by_density`, where layers share by them.

        Returns:
            [L, H] int64, plan.num_pages * L * H in all; with CUT_BUDGETS what the cuts have left, which may be less.
        """
        num_layers, size = len(scores), plan.block_size
        most = [layer.shape[1] // size for layer in scores]
        if self.heads in MODEL_BUDGETS:
            return torch.tensor(self.model_pages(plan, most)).view(num_layers, num_heads)
        if self.layers in CUT_BUDGETS:
            kept = CUT_BUDGETS[self.layers](plan, num_layers, self.options)
            return torch.tensor([[int(n) // size] * num_heads for n in kept])
        layer_pages = [plan.num_pages] * num_layers
        if self.layers != UNIFORM:
            wished = self._layer_wishes(plan, num_layers, densities)
            wanted = [n / size for n in wished]
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

    def _layer_wishes(self, plan: PromptPlan, num_layers: int, densities: Sequence[float]) -> list[float]:
        """Wished entries of each layer, tail excluded, [L]."""
        if self.layers == DENSITY:
            assert len(densities) == num_layers, "one of each layer"
            return by_density(plan, densities)
        return LAYER_BUDGETS[self.layers](plan, num_layers, self.options)

    def streaming(self, plan: PromptPlan) -> Streaming:
        """How heads let go of entries while a prompt is read whose pages of all heads follow from its length."""
        size = plan.block_size
        num_sink_pages = -(-plan.num_sink // size)
        flat = self.model_pages(plan, [plan.num_whole_blocks] * len(self.options.head_weights))
        pages = [max(n, num_sink_pages + 1) for n in flat]
        width = len(pages) // len(self.options.head_weights)
        rows = (tuple(pages[first : first + width]) for first in range(0, len(pages), width))
        return Streaming(-(-self.options.streaming_tokens // size), num_sink_pages, tuple(rows))

    def model_pages(self, plan: PromptPlan, most: Sequence[int]) -> list[int]:
        """Pages by what was measured of the model, layer after layer, [L * H]; `most` of each layer's heads, [L]."""
        wished = MODEL_BUDGETS[self.heads].wish(plan, self.options)
        wanted = [entries / plan.block_size for layer in wished for entries in layer]
        low = [plan.least_pages] * len(wanted)
        high = [pages for pages, layer in zip(most, wished, strict=True) for _ in layer]
        return share_pages(wanted, plan.num_pages * len(wanted), low=low, high=high)
