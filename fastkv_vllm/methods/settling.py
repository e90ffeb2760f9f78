"""When the ranks of a prompt's rows have settled: how the layer of a cut is found while it runs."""

from collections import deque

import torch

OBSERVED = 3  # layers whose ranks are compared


class RankWatch:
    """How much the best rows of one prompt move up and down in the ratings of the last `OBSERVED` layers.

    The variance of a row's ranks over these layers, mean over the rows that would go on, is compared with what it was
    at a layer before.

    Args:
        share: ranks have settled where no more than this share of that variance is left.
        measure_layer: index of the layer before, at least OBSERVED - 1.
        num_rows: rated rows that would go on.
    """

    def __init__(self, share: float, measure_layer: int, num_rows: int) -> None:
        self._share = share
        self._measure_layer = measure_layer
        self._num_rows = num_rows
        self._ranks: deque[torch.Tensor] = deque(maxlen=OBSERVED)
        self._measure = 0.0

    def has_settled(self, layer: int, rating: torch.Tensor) -> bool:
        """Look at one more layer; call for each, in order, up to the one that has the cut.

        Args:
            layer: its index.
            rating: of all rows that are not forced, [n] float32; ties rank by position.

        Returns:
            False up to and including the measure layer.
        """
        if layer <= self._measure_layer - OBSERVED:
            return False
        order = rating.sort(descending=True, stable=True).indices
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device)
        self._ranks.append(ranks)
        if layer < self._measure_layer:
            return False
        best = torch.stack(list(self._ranks))[:, order[: self._num_rows]].double()
        variance = float(best.var(dim=0, correction=0).mean())
        if layer == self._measure_layer:
            self._measure = variance
            return False
        return variance <= self._share * self._measure
