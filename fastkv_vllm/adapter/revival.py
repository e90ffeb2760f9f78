"""Rows left behind at a cut come back while decoding: what is held of a prompt, and a step that decodes.

Source: LazyLLM, arXiv 2407.14057, section 3. A stage is the layers between two cuts; all of them hold the same entries
of a prompt, as many at all times. At a cut the current token chooses those of the next stage:

| entry of the next stage | chosen                                       | not chosen                              |
|-------------------------|----------------------------------------------|-----------------------------------------|
| it holds it             | stays                                        | its place goes to one that comes back   |
| it does not             | its row, held since it last came as far as   | waits on                                |
|                         | this cut, runs through the stage's layers    |                                         |

Rows that come back run at the end of the batch of the stage's layers and write their entries before attention reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastkv_vllm.adapter.detour import Layer, detour
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.adapter.rating import agree, rate_rows, value_norms
from fastkv_vllm.adapter.reads import HeadReads
from fastkv_vllm.adapter.recipe import Recipe
from fastkv_vllm.adapter.step import WorkerStats
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.kernels.select import select


@dataclass(frozen=True, eq=False)
class RevivablePages(HeadPages):
    """Pages of a prompt whose rows may come back. All heads of a stage's layers hold the same positions.

    Fields:
        plan, recipe: of the prompt.
        streams: residual rows after each cut, by position, of all that have come so far, [cuts, P, hidden].
        stages: positions of the entries of each stage in order of their pages, [num_cuts + 1] of [n] int64.
    """

    plan: PromptPlan
    recipe: Recipe
    streams: torch.Tensor
    stages: Sequence[torch.Tensor]

    @classmethod
    def of(
        cls,
        held: HeadPages,
        plan: PromptPlan,
        recipe: Recipe,
        streams: torch.Tensor,
        went_on: Sequence[torch.Tensor],
    ) -> "RevivablePages":
        """Pages of a prompt that has just ended; `went_on`: positions that went on after each cut, ascending."""
        everything = torch.arange(plan.num_tokens)
        stages = [positions[: len(positions) - plan.num_tail].clone() for positions in (everything, *went_on)]
        return cls(held.num_whole, held.counts, held.pages, plan, recipe, streams, stages)

    def cut_after(self, layer: int) -> int | None:
        """Number of the cut after a layer, if there is one."""
        layers = [cut for cut, _ in self.plan.cuts]
        return layers.index(layer) if layer in layers else None

    def positions(self, layer: int, num_tokens: int) -> torch.Tensor:
        """Positions of a layer's entries in the order in which attention reads them, [N] int64.

        Args:
            layer: its index.
            num_tokens: tokens of the request.
        """
        stage = self.stages[sum(cut < layer for cut, _ in self.plan.cuts)]
        return torch.cat([stage, torch.arange(self.plan.num_tokens - self.plan.num_tail, num_tokens)])

    def exchange(self, cut: int, chosen: torch.Tensor) -> "_Returning":
        """Give the places of entries that are not chosen to those that are and are not there.

        Args:
            cut: its number.
            chosen: positions the stage after it is to hold, tail included, ascending; as many as it holds.
        """
        held = self.stages[cut + 1]
        places = (~torch.isin(held, chosen)).nonzero().flatten()
        chosen = chosen[: len(chosen) - self.plan.num_tail]
        positions = chosen[~torch.isin(chosen, held)]
        held[places] = positions
        return _Returning(self, cut, positions, places)


@dataclass(frozen=True)
class _Returning:
    """Rows of one prompt that come back.

    Fields:
        pages: of the prompt.
        cut: number of the one they left after.
        positions: of the rows, ascending, [k] int64.
        places: which of the stage's entries they become, [k] int64.
    """

    pages: RevivablePages
    cut: int
    positions: torch.Tensor
    places: torch.Tensor


class RevivalStep:
    """One step with such requests decoding a token each.

    Args:
        requests: pages of all of them.
        layers: all decoder layers, in order.
        stats: of the step; rows that come back are counted there.
    """

    def __init__(self, requests: Sequence[RevivablePages], layers: Sequence[nn.Module], stats: WorkerStats) -> None:
        self._requests = requests
        self._layers = layers
        self._stats = stats
        self._returning: list[_Returning] = []  # in the batch of the layer that runs, after all other rows
        self._chosen: list[_Returning] = []  # at cuts after the layer that runs
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None  # hidden and residual of those returning

    def detour(self) -> AbstractContextManager[None]:
        """Within it, rows that come back run along in the layers after their cut; see `detour.detour`."""
        return detour(self._layers, min(pages.plan.cuts[0][0] for pages in self._requests), self._replace)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, pool: PagePool) -> None:
        """Store the entries of returning rows in a layer's pages.

        Args:
            layer: its index.
            key, value: of the whole batch, [T, H, D], roped.
            pool: of the engine.
        """
        size = pool.layout.block_size
        for returning, rows in self._split(key.shape[0]):
            pages = returning.pages.pages[layer][:, returning.places // size]
            slots = pages * size + returning.places % size  # [H, k]
            entries = [each[rows].transpose(0, 1).flatten(0, 1).unsqueeze(1) for each in (key, value)]
            pool.layout.write(pool.cache, entries[0], entries[1], slots.flatten())

    def attend(self, layer: int, query: torch.Tensor, scale: float, reads: HeadReads, output: torch.Tensor) -> None:
        """Attention of returning rows to the prompt's entries up to their own position.

        Args:
            layer: its index.
            query: of the whole batch, [T, Hq, D], roped.
            scale: softmax scale.
            reads: of the requests with pages per head.
            output: [T, Hq, D]; the last rows are written.
        """
        for returning, rows in self._split(query.shape[0]):
            number = next(i for i, row in enumerate(reads.rows) if row.held is returning.pages)
            positions = returning.pages.positions(layer, returning.pages.plan.num_tokens)
            keys, values = (each[:, : len(positions)].unsqueeze(0) for each in reads.entries(layer, number))
            output[rows] = F.scaled_dot_product_attention(
                query[rows].transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=positions <= returning.positions.unsqueeze(1),
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)

    def choose(self, layer: int, query: torch.Tensor, scale: float, reads: HeadReads) -> None:
        """At a cut, let each request's token choose what the layers after it hold of the prompt.

        Args: see `attend`.
        """
        for number, row in enumerate(reads.rows):
            pages = row.held
            cut = pages.cut_after(layer) if isinstance(pages, RevivablePages) else None
            if cut is None:
                continue
            assert isinstance(pages, RevivablePages), "only these have cuts"
            assert row.count == 1, "the scheduler lets it go on a token at a time"
            with self._stats.timed("score_us"):
                chosen = _choose(pages, cut, query[row.first] * scale, row.num_tokens, *reads.entries(layer, number))
                returning = pages.exchange(cut, chosen)
            if len(returning.positions):
                self._chosen.append(returning)
            self._stats.revived_rows += len(returning.positions)

    def _replace(self, index: int, forward: Layer) -> Layer:
        """A layer with a cut, or after one: on the rows that come back, too."""

        def run(positions: torch.Tensor, hidden: torch.Tensor, residual: Any, **kwargs: Any) -> Any:
            count = hidden.shape[0]
            if self._rows is not None:
                positions = torch.cat([positions, *(returning.positions for returning in self._returning)])
                hidden, residual = (torch.cat(pair) for pair in zip((hidden, residual), self._rows, strict=True))
            hidden, residual = forward(positions, hidden, residual, **kwargs)
            self._cut(index, hidden, residual)
            return hidden[:count], residual[:count]

        return run

    def _cut(self, index: int, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """Keep the rows that have come to their prompt's next cut, and fetch those chosen there."""
        going = []
        for returning, rows in self._split(hidden.shape[0]):
            cut = returning.pages.cut_after(index)
            if cut is None:
                going.append((returning, hidden[rows], residual[rows]))
            else:
                returning.pages.streams[cut, returning.positions] = hidden[rows] + residual[rows]
        for returning in self._chosen:
            stream = returning.pages.streams[returning.cut, returning.positions]
            going.append((returning, torch.zeros_like(stream), stream))
        self._chosen = []
        self._returning = [returning for returning, _, _ in going]
        self._rows = (torch.cat([h for _, h, _ in going]), torch.cat([r for _, _, r in going])) if going else None

    def _split(self, num_rows: int) -> Iterator[tuple[_Returning, slice]]:
        """Who comes back in the layer that runs, and its rows in a batch of `num_rows`."""
        first = num_rows - sum(len(returning.positions) for returning in self._returning)
        for returning in self._returning:
            yield returning, slice(first, first + len(returning.positions))
            first += len(returning.positions)


def _choose(
    pages: RevivablePages, cut: int, query: torch.Tensor, num_tokens: int, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Prompt positions that the stage after a cut is to hold, ascending; the same on all ranks.

    Args:
        pages: of the prompt.
        cut: its number.
        query: of the current token, scaled, [Hq, D].
        num_tokens: tokens of the request, the current one among them.
        keys, values: the layer's entries, [H, N, D], in the order of their pages.
    """
    plan, method = pages.plan, pages.recipe.method
    layer, num_rows = plan.cuts[cut]
    positions, order = pages.positions(layer, num_tokens).sort()
    scores = method.score(queries=query.unsqueeze(0), keys=keys[:, order])
    if pages.recipe.config.value_norms:
        scores = scores * value_norms(values[:, order])
    num_prompt = len(positions) - (num_tokens - plan.num_tokens)
    scores, positions = agree(method, scores)[:, :num_prompt], positions[:num_prompt]
    rating = rate_rows(method, plan, scores, positions)
    return positions[select(rating.unsqueeze(0), num_rows)[0]]
