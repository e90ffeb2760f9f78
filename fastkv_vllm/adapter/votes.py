"""What a method rates a prompt's entries by in one layer: keys, and queries that vote, those of earlier chunks too."""

from collections.abc import Sequence

import torch

from fastkv_vllm.adapter.batch import LayerRows, PrefillRows
from fastkv_vllm.adapter.rating import add_votes


class Votes:
    """Queries that vote and the attention of those that have voted, while prompts are read.

    What is held is keyed by position, so that a prompt computed again after preemption overwrites it.

    Fields:
        windows: (request, layer) -> queries of the voters by position, [W, Hq, D].
        sums: (request, layer) -> attention each entry got from all queries so far, [H, n] float32.
    """

    def __init__(self) -> None:
        self.windows: dict[tuple[str, int], torch.Tensor] = {}
        self.sums: dict[tuple[str, int], torch.Tensor] = {}

    def forget(self, partial: frozenset[str]) -> None:
        """Drop what is held for requests other than those whose prompt goes on."""
        self.windows = {key: q for key, q in self.windows.items() if key[0] in partial}
        self.sums = {key: sums for key, sums in self.sums.items() if key[0] in partial}

    def inputs(self, prefill: PrefillRows, rows: LayerRows) -> dict[str, torch.Tensor]:
        """What the recipe needs of the layer, or nothing where the prompt goes on: what it will need is kept.

        Beside the inputs of `Method.score` these are `voters`, queries not scaled, where channels are dropped.
        """
        needs, ends = prefill.recipe.needs, prefill.destination is not None
        inputs = {}
        if "queries" in needs and not ends:
            self._keep_window(prefill, rows)
        if "column_sums" in needs or (ends and "keys" in needs):
            inputs["keys"] = rows.keys(prefill)
        if "column_sums" in needs:
            inputs["column_sums"] = self._add_up(prefill, rows, inputs["keys"])
        if not ends:
            return {}
        inputs["positions"] = prefill.seen
        if "queries" in needs:
            window = self._window(prefill, rows)
            if prefill.plan.evicts and "queries" in prefill.recipe.method.needs:
                # A copy: a view would keep all rows of the step.
                self.windows[prefill.request_id, rows.layer] = window[-prefill.plan.num_later_voters :].clone()
            if prefill.recipe.config.drops_channels:
                inputs["voters"] = window
            inputs["queries"] = window * rows.scale
        return inputs

    def of_layers(
        self, request_id: str, num_layers: int, needs: Sequence[str]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Sums and windows of each layer of a prompt that has ended; none of what its method does not need."""
        layers = [(request_id, layer) for layer in range(num_layers)]
        sums = [self.sums[layer] for layer in layers] if "column_sums" in needs else []
        windows = [self.windows[layer] for layer in layers] if "queries" in needs else []
        return sums, windows

    def _keep_window(self, prefill: PrefillRows, rows: LayerRows) -> None:
        """Remember the queries of those voters that are in a chunk before the last."""
        plan = prefill.plan
        window_start, end = plan.num_tokens - plan.num_voters, prefill.start + prefill.count
        first = max(prefill.start, window_start)
        if first < end:
            of_layer = (prefill.request_id, rows.layer)
            if of_layer not in self.windows:
                self.windows[of_layer] = rows.query.new_zeros(plan.num_voters, *rows.query.shape[1:])
            voters = rows.query[prefill.rows][first - prefill.start :]
            self.windows[of_layer][first - window_start : end - window_start] = voters

    def _window(self, prefill: PrefillRows, rows: LayerRows) -> torch.Tensor:
        """Queries of the prompt's voters, [W, Hq, D]."""
        num_voters = prefill.plan.num_voters
        latest = rows.query[prefill.rows][-num_voters:]
        missing = num_voters - latest.shape[0]
        if missing == 0:
            return latest
        return torch.cat([self.windows[prefill.request_id, rows.layer][:missing], latest])

    def _add_up(self, prefill: PrefillRows, rows: LayerRows, keys: torch.Tensor) -> torch.Tensor:
        """Attention that the entries so far got from all queries so far, this step's among them, [H, n] float32."""
        decay, of_layer = prefill.recipe.config.decay, (prefill.request_id, rows.layer)
        assert decay is not None, "filled in by CompressionConfig"
        before = self.sums.get(of_layer) if prefill.start else None
        self.sums[of_layer] = add_votes(before, rows.query[prefill.rows] * rows.scale, keys, decay)
        return self.sums[of_layer]
