"""What a compression method is: a rating of cached entries, and what follows from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
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
        needs: names of the inputs of `score`, out of "queries", "keys", "positions", "column_sums".
        propagates: the method also chooses the rows that go on after a cut.
        one_choice: the KV heads of a layer, on all ranks, keep the same entries: their scores are added.
        reads_again: the rows that go on after the cut are tokens, read again from layer 0 and position 0 on as a prompt
            of their own, and all of these entries stay.
        recent_ones_vote: the queries of all recent tokens vote, not those of the last `window_size`.
        most_voters_after_image: where a prompt has an image, so many of the tokens after the last one vote at most, not
            the last `window_size`; 0: images make no difference.
        revives: each generated token chooses anew at every cut what the layers after it hold of the prompt, and rows
            left behind may come back.
        default_retention_ratio, default_num_sink, default_recent_share, default_value_norms, default_decay,
            default_halting_loss, default_rank_variance, default_evict_while_decoding, default_codec,
            default_channel_ratio, default_residual_window, default_encode_generated, default_merge_layers,
            default_draft_tokens: the fields of CompressionConfig without `default_`, when the configuration does not
            say.
        schedule_artefact: kind of the file that may hold the method's schedule of cuts, see `fastkv_vllm.calibrate`.
        shares_layers: some layers read the entries of others once the prompt has ended, by `layer_owners`.
        streams: heads that keep less than the prompt let go of the rest while it is read, where their budgets are known
            from its length (see `cache.Streaming`); the method rates by position alone.
        layer_budgets, head_budgets: names of the method's budgets, when the configuration does not say.

    Fields:
        window_size: last prompt tokens whose queries vote; they always stay themselves.
        kernel_size: width of the pooling over positions, odd, tokens.
        pooling: "max" or "avg".
    """

    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    propagates: ClassVar[bool] = False
    one_choice: ClassVar[bool] = False
    reads_again: ClassVar[bool] = False
    recent_ones_vote: ClassVar[bool] = False
    most_voters_after_image: ClassVar[int] = 0
    revives: ClassVar[bool] = False
    default_retention_ratio: ClassVar[float] = 0.1
    default_num_sink: ClassVar[int] = 0
    default_recent_share: ClassVar[float] = 0.0
    default_value_norms: ClassVar[bool] = False
    default_decay: ClassVar[float | None] = None
    default_halting_loss: ClassVar[float | None] = None
    default_rank_variance: ClassVar[float | None] = None
    schedule_artefact: ClassVar[str | None] = None
    default_evict_while_decoding: ClassVar[bool] = False
    shares_layers: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    default_codec: ClassVar[str | None] = None
    default_channel_ratio: ClassVar[float] = 1.0
    default_residual_window: ClassVar[int] = 0
    default_encode_generated: ClassVar[bool] = False
    default_merge_layers: ClassVar[str | None] = None
    default_draft_tokens: ClassVar[int] = 0
    layer_budgets: ClassVar[str] = UNIFORM
    head_budgets: ClassVar[str] = UNIFORM

    window_size: int
    kernel_size: int
    pooling: str

    @classmethod
    def votes(cls) -> bool:
        """Whether queries rate the entries."""
        return bool({"queries", "column_sums"} & set(cls.needs))

    @abstractmethod
    def score(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Rate the entries of one layer; higher stays.

        Args, the subset named by `needs`, N entries in order of position:
            queries: roped and scaled queries of those who vote, the last W tokens, [W, Hq, D].
            keys: roped keys, [H, N, D].
            positions: positions of the entries in the text, [N], int64; their order where heads hold different ones.
            column_sums: attention each entry got from all queries up to the last, [H, N] float32, see
                `kernels.column_sums`.

        Returns:
            Scores [H, N] float32, or [1, N] where all heads agree. The last `window_size` columns are the window's
            own; they always stay, their value is ignored.
        """

    def propagation_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Rating [N] of whole rows at a layer with a cut, from that layer's `score` [H, N] (this rank's heads)."""
        raise TypeError(f"{type(self).__name__} does not propagate rows")

    @classmethod
    def schedule(cls, num_layers: int, retention_ratio: float, recent_share: float) -> Sequence[tuple[int, float]]:
        """The method's own cuts, layers ascending, each with the share of a prompt's rows that goes on; none: TSP's.

        Layers keep what the cuts leave them, so the shares make up the retention ratio.

        Args:
            num_layers: of the model.
            retention_ratio: mean over layers of what stays, share of the prompt.
            recent_share: share of what stays that is the prompt's end.

        Raises:
            ValueError: no schedule leaves as little as that.
        """
        return ()


def solve_rising(function: Callable[[float], float], value: float) -> float:
    """The number in [0, 1] for which a rising function has a value, as near as floats are.

    Raises:
        ValueError: the function is above the value from 0 on.
    """
    low, high = 0.0, 1.0
    if function(low) > value:
        raise ValueError(f"it must be at least {function(low):.3f} here; got {value}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= value else (low, middle)
    return low


def add_heads(scores: torch.Tensor) -> torch.Tensor:
    """Sum over heads, [H, N] -> [N], term by term: exact ties stay exact."""
    return reduce(torch.add, scores.unbind(dim=0))
