"""What a compression method is: a rating of cached entries, and what follows from it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.methods.budgets import UNIFORM


@dataclass(frozen=True)
class Method(ABC):
    """How important is each cached entry of one layer?

    A method only rates. Forcing sinks and window, turning scores into kept entries, moving data and
    freeing blocks is shared code; so is the propagation of rows when `propagates` is set. How layers and heads share
    the budget is the allocator's matter (`budgets.Allocator`).

    Class attributes (declared, never inferred; tables, help and conflict checks are derived from them):
        source: paper and section the arithmetic follows.
        needs: names of the inputs of `score`, out of "queries", "keys", "positions".
        propagates: the method also chooses the rows that go on after a cut.
        default_num_sink: first tokens that always stay, when the configuration does not say.
        layer_budgets, head_budgets: names of the method's budgets, when the configuration does not say.

    Fields:
        window_size: last prompt tokens whose queries vote; they always stay themselves.
        kernel_size: width of the pooling over positions, odd, tokens.
        pooling: "max" or "avg".
    """

    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    propagates: ClassVar[bool] = False
    default_num_sink: ClassVar[int] = 0
    layer_budgets: ClassVar[str] = UNIFORM
    head_budgets: ClassVar[str] = UNIFORM

    window_size: int
    kernel_size: int
    pooling: str

    @abstractmethod
    def score(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Rate the entries of one layer; higher stays.

        Args, the subset named by `needs`, N entries in order of position:
            queries: roped and scaled queries of the window, [W, Hq, D].
            keys: roped keys, [H, N, D].
            positions: positions of the entries in the text, [N], int64.

        Returns:
            Scores [H, N] float32, or [1, N] where all heads agree. The last W columns are the window's own;
            they always stay, their value is ignored.
        """

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Rating [N] of whole rows at a layer with a cut, from that layer's `score` [H, N] (this rank's heads)."""
        raise TypeError(f"{type(self).__name__} does not propagate rows")
