"""What goes while a prompt is read: heads that keep less than all of it let go every `Drop.stream_period` tokens."""

import torch
from torch import Tensor

from tests.reference.selection import Drop


def seen(drop: Drop, num_kept: int, num_tokens: int) -> tuple[Tensor, list[int]]:
    """Entries that each query of a prompt sees in a head, [n, n] bool, and those the head has when all are read.

    It lets go of whole blocks: the first ones stay, which hold the sinks, and the most recent ones, at least one.

    Args:
        drop: block_size, num_sink and stream_period.
        num_kept: entries of the head that stay when the prompt ends, tail included.
        num_tokens: tokens of the prompt (n).
    """
    size = drop.block_size
    first = (drop.num_sink + size - 1) // size * size
    most = max(num_kept - num_tokens % size, first + size)
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    holds: list[int] = []
    for query in range(num_tokens):
        if query % drop.stream_period == 0 and len(holds) > most:
            holds = holds[:first] + holds[first - most :]
        holds.append(query)
        visible[query, holds] = True
    return visible, holds
