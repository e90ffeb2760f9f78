"""Density: how many entries the voters look at in each layer, and layer budgets in proportion to it."""

import math
from collections.abc import Sequence

import torch

from fastkv_vllm.cache import PromptPlan

DENSITY = "density"  # the budget's name
_NEGLIGIBLE = 0.01  # of the row's maximum
_LEAST, _MOST = 0.01, 1.0  # of the prompt


def density(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Share of the causal entries in the voters' rows that have 1 % of their row's maximum or more: 1 - sparsity.

    Attention need not be normalised for that: p_j >= 0.01 max p is q . k_j >= max q . k + ln 0.01.

    Args:
        queries: roped and scaled queries of the voters, the last W of N tokens, [W, Hq, D], any float dtype.
        keys: roped, [H, N, D], Hq a multiple of H.

    Returns:
        Of each query head, [Hq] float32.

    Source: VL-Cache, arXiv 2410.23317, section 4.1.
    """
    num_voters, num_entries = queries.shape[0], keys.shape[1]
    future = torch.ones(num_voters, num_entries, dtype=torch.bool, device=keys.device)
    future = future.triu(num_entries - num_voters + 1)
    counts = []
    for k, group in zip(keys, queries.transpose(0, 1).chunk(keys.shape[0]), strict=True):
        logits = (group.float() @ k.float().t()).masked_fill_(future, -torch.inf)  # [G, W, N]
        least = logits.amax(dim=-1, keepdim=True) + math.log(_NEGLIGIBLE)
        counts.append((logits >= least).sum(dim=(1, 2)))
    return torch.cat(counts) / (num_voters * num_entries - num_voters * (num_voters - 1) // 2)


def by_density(plan: PromptPlan, densities: Sequence[float]) -> list[float]:
    """Entries of each layer: the mean times its density over the mean density, 1 % of the prompt to all of it.

    Args:
        plan: of the prompt.
        densities: of each layer, or any numbers in proportion, above 0, [L].

    Returns:
        Wished entries, tail excluded, [L]. Where a layer meets a bound they do not add up: sharing pages evens it out.

    Source: VL-Cache, arXiv 2410.23317, section 4.2.
    """
    mean = sum(densities) / len(densities)
    wished = [plan.num_kept * value / mean for value in densities]
    return [min(max(n, _LEAST * plan.num_tokens), _MOST * plan.num_tokens) - plan.num_tail for n in wished]
