"""AdaKV: the KV heads of a layer share its budget by where the layer's highest scores are."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.methods.budgets import HEAD_BUDGETS, BudgetOptions
from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.snapkv import SnapKV


def adaptive(scores: torch.Tensor, even: int, options: BudgetOptions) -> list[float]:
    """Entries of each head: its share of the layer's best, drawn towards the even budget by the floor.

    n_h is the number of head h's entries among the highest H * even of the layer; it gets
    (1 - floor) * n_h + floor * even.

    Args:
        scores: of all heads, [H, n] float32, forced entries at +inf.
        even: entries per head if all had the same.
        options: `head_floor` is the floor.
    """
    num_heads, num_entries = scores.shape
    order = scores.flatten().sort(descending=True, stable=True).indices
    shares = torch.bincount(order[: num_heads * even] // num_entries, minlength=num_heads).tolist()
    return [(1 - options.head_floor) * share + options.head_floor * even for share in shares]


HEAD_BUDGETS["adaptive"] = adaptive


@register("adakv")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's vote with budgets per KV head, by request.

    Source: arXiv 2407.11550, section 4, and the authors' code (floor 0.2, their setting for grouped queries).
    Differences: budgets are whole pages that add up to the layer's exactly; forced entries take part in the count,
    the same number for each head; pooling comes before the sum over the group, as in our snapkv (theirs after); no
    normalisation of scores between heads.
    """

    source: ClassVar[str] = "arXiv 2407.11550, section 4"
    head_budgets: ClassVar[str] = "adaptive"
