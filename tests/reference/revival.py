"""LazyLLM while it decodes: at each cut the token chooses anew, and rows left behind come back a few layers at a time.

Source: LazyLLM, arXiv 2407.14057, section 3. What is left out of a set leaves the cache with it, and is computed again
if it returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.scores import last_query_scores, value_norms
from tests.reference.selection import Drop, select_positions

Cache = tuple[list[Tensor], list[Tensor]]  # keys and values of each head, [N, D]


@dataclass
class Waiting:
    """What a prompt leaves behind.

    drop: its rules.
    held: prompt positions in the cache of each layer, ascending; all heads hold the same.
    streams: after each cut, position -> hidden row, of all rows that have got there.
    num_revived: rows that have come back so far, counted once for each cut.
    """

    drop: Drop
    held: list[list[int]]
    streams: list[dict[int, Tensor]]
    num_revived: int = 0


def choose(
    waiting: Waiting, layer: int, queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> list[int]:
    """Prompt positions that the layers after this one are to hold.

    Args:
        layer: one with a cut.
        queries: of the token, [Hq, 1, D].
        keys, values: of each head, [N, D]: the layer's prompt entries, then all that was generated.
    """
    scores = last_query_scores(queries, torch.stack(list(keys)))
    if waiting.drop.value_norms:
        scores = scores * value_norms(torch.stack(list(values)))
    held = waiting.held[layer]
    votes = scores.sum(dim=0)[: len(held)]
    return select_positions(votes.tolist(), held, dict(waiting.drop.cuts)[layer], waiting.drop)


def exchange(waiting: Waiting, layer: int, chosen: Sequence[int], caches: Sequence[Cache]) -> list[int]:
    """Take what is not chosen out of the layers up to the next cut; the positions that must come back.

    Args:
        layer: one with a cut.
        chosen: what the layers after it are to hold, ascending.
        caches: of each layer; changed in place.
    """
    later = [cut for cut, _ in waiting.drop.cuts if cut > layer]
    last = min([*later, len(caches) - 1])
    missing = [p for p in chosen if p not in set(waiting.held[layer + 1])]
    for index in range(layer + 1, last + 1):
        held = waiting.held[index]
        stay = [i for i, p in enumerate(held) if p in set(chosen)]
        for cache in caches[index]:
            for head, entries in enumerate(cache):
                cache[head] = torch.cat([entries[stay], entries[len(held) :]])
        waiting.held[index] = [held[i] for i in stay]
    waiting.num_revived += len(missing)
    return missing


def put_back(held: list[int], back: Sequence[int], cache: list[Tensor], entries: Tensor) -> None:
    """Insert entries [H, k, D] of positions `back` into each head's cache [N, D], in order of position.

    `held` is the prompt's part of the cache before it.
    """
    order = sorted(range(len(held) + len(back)), key=lambda i: [*held, *back][i])
    for head, old in enumerate(cache):
        prompt = torch.cat([old[: len(held)], entries[head]])
        cache[head] = torch.cat([prompt[order], old[len(held) :]])
