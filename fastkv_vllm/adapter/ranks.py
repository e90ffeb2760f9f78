"""Pages that KV heads share on several ranks, which hold the heads in order, equally many each.

Every rank comes to the pages of all heads, alike, and holds those of its own.
"""

from collections.abc import Sequence

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from fastkv_vllm.adapter.batch import PrefillRows
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.methods import HEAD_BUDGETS


def rank_of(plan: PromptPlan) -> int:
    """Whose heads are ours of those that share pages; 0 where heads are even, on all ranks alike."""
    return get_tensor_model_parallel_rank() if plan.num_ranks > 1 else 0


def shared_pages(
    prefill: PrefillRows,
    scores: Sequence[torch.Tensor],
    num_heads: int,
    densities: Sequence[float],
    most: Sequence[int] | None,
) -> torch.Tensor:
    """Pages of each layer and head, [L, H], on all ranks alike: H of all ranks where heads share unevenly.

    Args:
        prefill: the prompt, which ends.
        scores: of each layer's entries before the tail, of this rank's heads, [H or 1, n_l].
        num_heads: KV heads of a layer on this rank.
        densities: of each layer, where layers share by them.
        most: pages of each layer by the halting rule or the guard; None: there is neither.
    """
    plan, allocator = prefill.plan, prefill.recipe.allocator
    if plan.num_ranks > 1 and allocator.heads in HEAD_BUDGETS:
        scores = _of_all_ranks(scores, num_heads)
    counts = allocator.pages(plan, scores, num_heads * plan.num_ranks, densities)
    return counts if most is None else counts.minimum(torch.tensor(most).unsqueeze(1))


def mean_recall(layers: Sequence[torch.Tensor], num_pages: int) -> torch.Tensor:
    """Recall by pages, up to so many, mean over layers and the heads of all ranks, [num_pages] float64, alike on all.

    Args:
        layers: of each layer, mean over this rank's heads, [num_pages or more].
    """
    ours = torch.stack([layer[:num_pages] for layer in layers]).mean(dim=0)
    return tensor_model_parallel_all_reduce(ours).double() / get_tensor_model_parallel_world_size()


def _of_all_ranks(scores: Sequence[torch.Tensor], num_heads: int) -> list[torch.Tensor]:
    """Scores of each layer, [H or 1, n_l], -> those of the heads of all ranks in order, [ranks * H, n_l]."""
    ours = torch.cat([layer.expand(num_heads, -1) for layer in scores], dim=1)
    return list(tensor_model_parallel_all_gather(ours, dim=0).split([layer.shape[1] for layer in scores], dim=1))
