"""The guard: how much of the attention the kept entries have got, and as many pages as keep enough of it."""

import torch

from fastkv_vllm.kernels.column_sums import column_sums


def attention_mass(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Share of the voters' attention that each entry of a layer gets: softmax weights, neither pooled nor weighted.

    m[h, j] = mean over the voters i and the query heads of h of p[i, j], p[i] the causal softmax of q_i . k over all
    entries that the layer sees; those of a head add up to 1.

    Args:
        queries: roped and scaled queries of the voters, the last W of N tokens, [W, Hq, D], any float dtype.
        keys: roped, [H, N, D], Hq a multiple of H.

    Returns:
        [H, N] float32.
    """
    num_voters, num_query_heads, _ = queries.shape
    weights = torch.ones(num_voters, device=queries.device)
    sums = column_sums(queries, keys, start=keys.shape[1] - num_voters, weights=weights)
    return sums * (keys.shape[0] / (num_voters * num_query_heads))


def recall_by_pages(scores: torch.Tensor, mass: torch.Tensor, block_size: int) -> torch.Tensor:
    """Attention recall of a layer by how many pages stay: the mass of the entries that stay, mean over KV heads.

    Args:
        scores: of the entries before the tail, [H or 1, n] float32, forced ones at +inf; the best stay.
        mass: `attention_mass`, [H, N]; its last N - n columns are the tail's, which always stays.
        block_size: entries of a page.

    Returns:
        [n // block_size] float32, of 1, 2, .. pages for each head; never falls.
    """
    num_rated = scores.shape[1]
    order = scores.sort(descending=True, stable=True).indices.expand(len(mass), -1)
    kept = mass[:, :num_rated].double().gather(1, order).cumsum(dim=1)[:, block_size - 1 :: block_size]
    return (kept + mass[:, num_rated:].double().sum(dim=1, keepdim=True)).mean(dim=0).float()


def guarded_pages(recall: torch.Tensor, floor: float, least: int) -> int:
    """Fewest pages, `least` or more, whose recall reaches the floor; all of them where even those do not.

    Args:
        recall: `recall_by_pages`, mean over all layers and KV heads, up to the ceiling's pages.
        floor: least recall.
        least: pages that the budget asks for.
    """
    too_few = int((recall < floor).sum())
    return max(min(too_few + 1, len(recall)), least)
