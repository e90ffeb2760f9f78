"""What goes while decoding: heads choose anew whenever the text's length is a multiple of `Drop.period`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tests.reference.scores import (
    last_query_attention,
    last_query_scores,
    recent_query_scores,
    value_norms,
    voters_scores,
)
from tests.reference.selection import Drop, window_scores


def add_votes(votes: Sequence[Tensor], queries: Tensor, keys: Sequence[Tensor], drop: Drop) -> list[Tensor]:
    """Votes of each head's entries after one more query.

    Args:
        votes: before it, of each head [n - 1].
        queries: of the new token, [Hq, 1, D].
        keys: of each head, the new token's last, [n, D].
        drop: `decay` is the weight of a query relative to the next one.
    """
    added = []
    for before, group, head in zip(votes, queries.chunk(len(keys)), keys, strict=True):
        attention = last_query_attention(group, head.unsqueeze(0)).sum(dim=0)
        added.append(torch.cat([before * drop.decay, torch.zeros(1)]) + attention)
    return added


def rate(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], votes: Sequence[Tensor], drop: Drop
) -> list[Tensor]:
    """Scores of each head's entries, [n] or [n - window_size]; without votes, how late an entry is.

    Args:
        queries: of the last num_later_voters tokens, [Hq, W, D].
        keys, values: of each head, [n, D].
        votes: of all queries where all vote, of each head [n].
        drop: the method and its numbers.
    """
    if not drop.has_scores:
        scores = [torch.arange(len(head)).float() for head in keys]
    elif drop.method == "tova":
        scores = list(last_query_scores(queries, torch.stack(list(keys))))
    elif drop.decay is not None:
        scores = list(votes)
    elif drop.method == "pyramidinfer":
        own = torch.stack(list(keys))
        scores = list(recent_query_scores(_behind_others(queries, own), own, queries.shape[1]))
    elif drop.method == "vl_cache":
        scores = []
        for group, head in zip(queries.chunk(len(keys)), keys, strict=True):
            own = head.unsqueeze(0)
            scores.append(voters_scores(_behind_others(group, own), own, queries.shape[1])[0])
    else:
        scores = []
        for group, head in zip(queries.chunk(len(keys)), keys, strict=True):
            scores.append(window_scores(_behind_others(group, head.unsqueeze(0)), head.unsqueeze(0), drop)[0])
    if drop.value_norms:
        scores = [
            head * value_norms(own.unsqueeze(0))[0, : len(head)] for head, own in zip(scores, values, strict=True)
        ]
    return [sum(scores)] * len(keys) if drop.one_choice else scores


def by_order(drop: Drop, num_entries: int) -> Drop:
    """The same rules for entries by their number instead of their position."""
    room = num_entries - drop.period - drop.num_sink - 1
    return replace(drop, forced_from=num_entries - min(drop.num_recent, room))


def _behind_others(queries: Tensor, keys: Tensor) -> Tensor:
    """The last queries, [Hq, W, D], behind as many that do not vote as there are keys [H, n, D] before theirs."""
    return torch.cat([torch.zeros(len(queries), keys.shape[1] - queries.shape[1], queries.shape[2]), queries], dim=1)
