"""How a worker rates the entries of a layer: what all methods share around `Method.score`."""

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.kernels.column_sums import age_weights, column_sums
from fastkv_vllm.methods import Method, add_heads


def add_votes(before: torch.Tensor | None, queries: torch.Tensor, keys: torch.Tensor, decay: float) -> torch.Tensor:
    """Attention that entries got from all queries so far, the latest ones among them, [H, N] float32.

    Args:
        before: the same before the latest queries, of the entries before theirs, [H, N - n]; None: there were none.
        queries: the latest, roped and scaled, [n, Hq, D].
        keys: of all entries, the queries' own last, [H, N, D].
        decay: weight of a query relative to the next one, (0, 1].
    """
    num_queries = queries.shape[0]
    num_before = keys.shape[1] - num_queries
    sums = column_sums(queries, keys, start=num_before, weights=age_weights(num_queries, decay, queries.device))
    if num_before:
        assert before is not None and before.shape[1] == num_before, "every query is computed, in order"
        sums[:, :num_before] += decay**num_queries * before
    return sums


def agree(method: Method, scores: torch.Tensor) -> torch.Tensor:
    """Scores [H, N] as they are, or added over the heads of all ranks, [1, N], where all must choose alike.

    Ranks hold some of the heads each. The reduction is in place and the sum over a rank's only head is that head's
    scores: hence the copy.
    """
    if not method.one_choice:
        return scores
    return tensor_model_parallel_all_reduce(add_heads(scores).clone()).unsqueeze(0)


def is_forced(plan: PromptPlan, positions: torch.Tensor) -> torch.Tensor:
    """Which positions of a prompt always stay and always go on, [N] bool."""
    return (positions >= plan.forced_from) | (positions < plan.num_sink)


def rate_rows(method: Method, plan: PromptPlan, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rating of rows at a cut, [N] float32, the same on all ranks; forced ones are at +inf.

    Args:
        method: of the prompt.
        plan: of the prompt.
        scores: of the layer's entries as all ranks agree on them, [H or 1, N].
        positions: of the entries, [N] int64.
    """
    rating = tensor_model_parallel_all_reduce(method.propagation_scores(scores).clone())
    return rating.masked_fill(is_forced(plan, positions), float("inf"))


def value_norms(values: torch.Tensor) -> torch.Tensor:
    """L1 norms of values [H, N, D] -> [H, N] float32."""
    return values.float().abs().sum(dim=-1)
