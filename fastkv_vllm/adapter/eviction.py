"""What a worker does with a compressed request that goes on: rate its entries, choose anew when a block is full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastkv_vllm.adapter.batch import DecodeRows, PrefillRows
from fastkv_vllm.adapter.moving import EntryMove, slots_of
from fastkv_vllm.adapter.ragged import HeadPages, PagePool
from fastkv_vllm.adapter.rating import add_votes, agree, value_norms
from fastkv_vllm.adapter.recipe import Recipe
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.kernels.select import select


@dataclass
class _Heads:
    """KV heads of a layer that hold equally many pages.

    Fields:
        heads: their numbers, [Hg] int64.
        pages: ids of the pages they hold, in order, [Hg, K] int64.
        sums: attention each entry got from all queries so far, [Hg, n] float32; None where not all vote.
    """

    heads: torch.Tensor
    pages: torch.Tensor
    sums: torch.Tensor | None


@dataclass
class _Decoding:
    """One request, from its prompt's end on.

    Fields:
        plan: of its prompt.
        recipe: how entries are chosen.
        layers: of each layer, its heads by the number of pages they hold.
        windows: of each layer, the queries of those who will vote next, at most the plan's later voters, [<= W, Hq, D];
            empty where no window votes.
    """

    plan: PromptPlan
    recipe: Recipe
    layers: list[list[_Heads]] = field(default_factory=list)
    windows: list[torch.Tensor] = field(default_factory=list)


class Evictor:
    """Chooses entries of compressed requests, layer by layer, right after the layer's attention.

    When the block after the kept pages is full, each KV head chooses out of its pages and that block as many entries as
    the pages hold. They are moved together into the pages, in order, and the block is free.

    Args:
        pool: of the engine.

    Fields:
        requests: what is held of each request, until it is gone or preempted.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._block_size = pool.layout.block_size
        self.requests: dict[str, _Decoding] = {}

    def begin(
        self,
        prefill: PrefillRows,
        held: HeadPages,
        kept: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor],
        windows: Sequence[torch.Tensor],
    ) -> None:
        """Take over a prompt that has been compressed.

        Args:
            prefill: the prompt.
            held: its pages.
            kept: of each layer, the columns that stay before the tail, head after head.
            sums: of each layer, attention each column got, tail included, [H, n]; empty where not all queries vote.
            windows: of each layer, queries of the prompt's last tokens that may vote next, [W, Hq, D]; empty where they
                do not.
        """
        state = _Decoding(prefill.plan, prefill.recipe, windows=list(windows))
        for layer, columns in enumerate(kept):
            counts = held.counts[layer]
            by_head = columns.split((counts * self._block_size).tolist())
            groups = []
            for count in counts.unique().tolist():
                heads = (counts == count).nonzero()[:, 0]
                votes = None
                if sums:
                    stay = torch.stack([by_head[head] for head in heads.tolist()])
                    tail = sums[layer][heads, sums[layer].shape[1] - prefill.plan.num_tail :]
                    votes = torch.cat([sums[layer][heads].gather(1, stay), tail], dim=1)
                groups.append(_Heads(heads, held.pages[layer, heads, :count], votes))
            state.layers.append(groups)
        self.requests[prefill.request_id] = state

    def forget(self, compressed: frozenset[str]) -> None:
        """Drop what is held for requests other than those with compressed pages."""
        self.requests = {rid: state for rid, state in self.requests.items() if rid in compressed}

    def concerns(self, rows: DecodeRows) -> bool:
        """Whether anything is to be done with rows: all vote, or the window that will vote, or entries are chosen."""
        state = self.requests[rows.request_id]
        window_from = self._block_size - state.plan.num_later_voters if state.windows else self._block_size
        return rows.evicts or rows.num_filled > window_from or state.recipe.config.all_queries_vote

    def rate(self, rows: DecodeRows, layer: int, scale: float, query: torch.Tensor) -> list[torch.Tensor]:
        """Let the rows vote, and rate the entries where they are chosen.

        Args:
            rows: of one request.
            layer: index of the layer.
            scale: softmax scale.
            query: rows of this step, roped, [T, Hq, D]; their keys and values are in the cache.

        Returns:
            Scores of each of the layer's groups of heads, [Hg or 1, n], forced entries at +inf; empty where nothing is
            chosen.
        """
        state = self.requests[rows.request_id]
        query = query[rows.rows]
        if state.windows:
            window = torch.cat([state.windows[layer], query])
            state.windows[layer] = window[-state.plan.num_later_voters :]
        if state.recipe.config.all_queries_vote:
            decay = state.recipe.config.decay
            assert decay is not None, "filled in by CompressionConfig"
            for group in state.layers[layer]:
                voters = self._of_group(query, group) * scale
                group.sums = add_votes(group.sums, voters, self._read_keys(group, rows, layer), decay)
        if not rows.evicts:
            return []
        return [self._score(state, group, rows, layer, scale) for group in state.layers[layer]]

    def choose(self, rows: DecodeRows, layer: int, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Columns that stay of each of the layer's groups of heads, ascending, [Hg, entries its pages hold].

        The sums of the votes are those of these columns from here on.
        """
        chosen = []
        for group, rated in zip(self.requests[rows.request_id].layers[layer], scores, strict=True):
            stay = select(rated, group.pages.shape[1] * self._block_size).expand(len(group.heads), -1)
            if group.sums is not None:
                group.sums = group.sums.gather(1, stay)
            chosen.append(stay)
        return chosen

    def collect(self, rows: DecodeRows, layer: int, stay: Sequence[torch.Tensor]) -> list[EntryMove]:
        """The entries that stay and change their place."""
        moves = []
        for group, columns in zip(self.requests[rows.request_id].layers[layer], stay, strict=True):
            sources = slots_of(self._table(group, rows, layer), columns, self._block_size)
            sources = sources.masked_fill(columns == torch.arange(columns.shape[1]), -1)
            counts = torch.full((len(group.heads),), group.pages.shape[1])
            moves.append(EntryMove(sources.view(-1, self._block_size), group.pages.flatten(), counts))
        return moves

    def _score(self, state: _Decoding, group: _Heads, rows: DecodeRows, layer: int, scale: float) -> torch.Tensor:
        """Scores of a group's entries, [Hg or 1, n], forced ones at +inf."""
        plan, method, num_entries = state.plan, state.recipe.method, self._num_entries(group, rows)
        order = torch.arange(num_entries)
        inputs = {"positions": order}
        if "keys" in method.needs:
            inputs["keys"] = self._read_keys(group, rows, layer)
        if state.windows:
            inputs["queries"] = self._of_group(state.windows[layer], group) * scale
        if group.sums is not None:
            inputs["column_sums"] = group.sums
        scores = method.score(**{name: inputs[name] for name in method.needs})
        if state.recipe.config.value_norms:
            scores = scores * value_norms(self._read(self._pool.layout.read_values, group, rows, layer))
        num_recent = min(plan.num_recent, group.pages.shape[1] * self._block_size - plan.num_sink - 1)
        forced = (order < plan.num_sink) | (order >= num_entries - num_recent)
        return agree(method, scores).masked_fill(forced, float("inf"))

    def _num_entries(self, group: _Heads, rows: DecodeRows) -> int:
        return group.pages.shape[1] * self._block_size + rows.num_filled

    def _table(self, group: _Heads, rows: DecodeRows, layer: int) -> torch.Tensor:
        """Pages of a group's entries, the block that fills up last, [Hg, K + 1]."""
        filling = self._pool.first[layer] + rows.block * self._pool.num_heads + group.heads
        return torch.cat([group.pages, filling.unsqueeze(1)], dim=1)

    def _read_keys(self, group: _Heads, rows: DecodeRows, layer: int) -> torch.Tensor:
        """Keys of a group's entries in order, [Hg, n, D]."""
        return self._read(self._pool.layout.read_keys, group, rows, layer)

    def _read(self, read: Callable[..., torch.Tensor], group: _Heads, rows: DecodeRows, layer: int) -> torch.Tensor:
        table = self._table(group, rows, layer)
        entries = read(self._pool.cache, table.flatten(), table.numel() * self._block_size)
        return entries.view(len(table), -1, entries.shape[-1])[:, : self._num_entries(group, rows)]

    def _of_group(self, query: torch.Tensor, group: _Heads) -> torch.Tensor:
        """Queries of a group's heads: [n, Hq, D] -> [n, Hg * G, D]."""
        return query.unflatten(1, (self._pool.num_heads, -1))[:, group.heads].flatten(1, 2)
