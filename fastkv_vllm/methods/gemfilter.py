"""GemFilter: the tokens that the last query looks for at one layer are read again, as a short prompt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastkv_vllm.methods.base import Method, add_heads
from fastkv_vllm.methods.registry import register

KERNEL_SIZE = 5


@register("gemfilter")
@dataclass(frozen=True)
class GemFilter(Method):
    """Inner products of the last query with all keys at `tsp_layer`, added over all heads and smoothed; no softmax.

    The best tokens are a prompt of their own: they run again from layer 0 on, at positions 0, 1, .., and the cache is
    theirs. Nothing of the long prompt is kept, and one number says how many rows go on and how many entries stay.

    Source: arXiv 2409.17422, section 3, and the authors' code (sum over heads, average pooling of width 5).
    Differences: kept counts are whole pages; sinks, the last `window_size` tokens and those of the last, partial block
    are among the chosen (theirs: the best only, even the last token may go); the layer is fastkv's default, L / 2 - 1
    (13 of 32, 17 of 36 and 19 of 40 in tests of others). `kernel_size` and `pooling` have no part in it.
    """

    source: ClassVar[str] = "arXiv 2409.17422, section 3"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    propagates: ClassVar[bool] = True
    one_choice: ClassVar[bool] = True
    reads_again: ClassVar[bool] = True

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        num_heads, _, head_dim = keys.shape
        query = queries[-1].float().view(num_heads, -1, head_dim).sum(dim=1)
        products = (keys.float() @ query.unsqueeze(-1)).squeeze(-1)
        return F.avg_pool1d(products, KERNEL_SIZE, stride=1, padding=KERNEL_SIZE // 2)

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return add_heads(scores)
