"""TOVA: the last query decides, once for all heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.kernels.window_scores import window_scores
from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.registry import register


@register("tova")
@dataclass(frozen=True)
class TOVA(Method):
    """Attention of the last query, added over all heads of a layer; all heads keep the same entries.

    Source: arXiv 2401.06104, section 3. Differences: entries are dropped when the prompt ends and whenever a block is
    full after it (the paper drops one at each step that is over the budget); the last `window_size` tokens always stay,
    where the paper forces none; kept counts are whole pages. `kernel_size` and `pooling` have no part in it.
    """

    source: ClassVar[str] = "arXiv 2401.06104, section 3"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    one_choice: ClassVar[bool] = True
    default_evict_while_decoding: ClassVar[bool] = True

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return window_scores(queries[-1:], keys, kernel_size=1, pooling="max")
