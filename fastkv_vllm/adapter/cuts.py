"""Which rows of a prompt go on after a cut, and where: what of that is held until the layers after it run."""

import torch

from fastkv_vllm.adapter.batch import PrefillRows
from fastkv_vllm.adapter.rating import is_forced, rate_rows
from fastkv_vllm.kernels.select import select
from fastkv_vllm.methods import RankWatch


class Cuts:
    """Chooses rows; who makes the cut takes them away.

    Fields:
        stash: request -> residual rows by position, after its first cut, or after each where rows may come back, [1 or
            cuts, P, hidden].
        selected: request -> rows chosen at the cut after the layer that runs, ascending positions.
        went_on: request -> rows chosen at each cut in this step, where rows may come back.
    """

    def __init__(self) -> None:
        self.stash: dict[str, torch.Tensor] = {}
        self.selected: dict[str, torch.Tensor] = {}
        self.went_on: dict[str, list[torch.Tensor]] = {}
        self._watches: dict[str, RankWatch] = {}  # of prompts that end in this step, where the cut's layer is found

    def end_step(self) -> None:
        """Drop what is held within a step only."""
        self.selected.clear()
        self.went_on.clear()
        self._watches.clear()

    def forget(self, partial: frozenset[str]) -> None:
        """Drop the rows of requests other than those whose prompt goes on."""
        self.stash = {rid: rows for rid, rows in self.stash.items() if rid in partial}

    def choose(self, prefill: PrefillRows, layer: int, scores: torch.Tensor) -> None:
        """The rows that go on, where this layer has a cut, alike on all ranks.

        Args:
            prefill: the prompt, which ends.
            layer: index of the layer.
            scores: of its entries as all ranks agree on them, [H or 1, n].
        """
        plan, positions = prefill.plan, prefill.seen
        cuts = dict(plan.cuts)
        has_none = layer not in cuts if plan.cut_from is None else len(positions) < plan.num_tokens
        if has_none:
            return
        rating, free = rate_rows(prefill.recipe.method, plan, scores, positions), ~is_forced(plan, positions)
        num_rows = cuts[layer] if plan.cut_from is None else self._decide(prefill, layer, rating[free])
        if num_rows == len(positions):
            self.selected[prefill.request_id] = positions
        elif num_rows is not None:
            chosen = self.selected[prefill.request_id] = positions[select(rating.unsqueeze(0), num_rows)[0]]
            if plan.revives:
                self.went_on.setdefault(prefill.request_id, []).append(chosen)

    def _decide(self, prefill: PrefillRows, layer: int, rating: torch.Tensor) -> int | None:
        """Rows that go on after a layer that may have the cut; None: those that it ran on.

        Rows in the stash wait for the first such layer only: if it is not the cut, all go on.

        Args:
            rating: of the rows that are not forced, alike on all ranks.
        """
        plan, config = prefill.plan, prefill.recipe.config
        ((last, num_rows),) = plan.cuts
        if prefill.request_id not in self._watches:
            assert config.rank_variance is not None and config.min_tsp_layer is not None, "the plan has cut_from"
            num_best = num_rows - (plan.num_tokens - len(rating))
            self._watches[prefill.request_id] = RankWatch(config.rank_variance, config.min_tsp_layer, num_best)
        if self._watches[prefill.request_id].has_settled(layer, rating) or layer == last:
            return num_rows
        return plan.num_tokens if layer == plan.cut_from and prefill.start else None
