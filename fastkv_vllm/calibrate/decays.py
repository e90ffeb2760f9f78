"""Shares of the rows that PyramidInfer may hand on: how few of them hold what later layers attend to?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.calibrate.tsp_layer import last_probabilities
from fastkv_vllm.methods import PyramidInfer

NUM_SHARES = 32  # shares looked at: 1/32, 2/32 ... 1


@dataclass(frozen=True)
class Votes:
    """Who votes and whose attention counts.

    Fields:
        recent_ratio: share of a prompt, its end, that votes and always goes on, (0, 1).
        num_sink: first tokens that always go on.
        queries: last tokens of the prompt whose attention counts.
    """

    recent_ratio: float = 0.2
    num_sink: int = 4
    queries: int = 8

    def order(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions in the order in which they would stay, forced ones first, [N].

        Args:
            queries: roped and scaled, of all tokens, [Hq, N, D].
            keys: roped, [H, N, D].

        Raises:
            CalibrationError: a prompt is so short that nobody would vote.
        """
        num_tokens = keys.shape[1]
        num_recent = int(num_tokens * self.recent_ratio)
        if num_recent < 1:
            raise CalibrationError(
                f"{self.recent_ratio:g} of a prompt must be a token at least; a prompt has {num_tokens}: leave out "
                "short prompts with --lengths"
            )
        method = PyramidInfer(window_size=num_recent, kernel_size=1, pooling="max")
        scores = method.score(queries=queries[:, -num_recent:].transpose(0, 1), keys=keys)
        rating = method.propagation_scores(scores)
        rating[: self.num_sink] = rating[-num_recent:] = float("inf")
        return rating.sort(descending=True, stable=True).indices

    def settings(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)


def recall_curves(model: CalibrationModel, prompt: Prompt, votes: Votes) -> Tensor:
    """Attention mass that the rows a layer would hand on have in the later layer that it serves worst.

    R[l, i] = min over layers m > l of the mass, mean over query heads and the last tokens, that m's attention puts on
    the first (i + 1) / NUM_SHARES of the rows in l's order.

    Returns:
        [L - 1, NUM_SHARES] float32, rising along each row to 1.
    """
    orders: list[Tensor] = []
    masses: list[Tensor] = []

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        orders.append(votes.order(queries, keys))
        masses.append(last_probabilities(queries, keys, votes.queries).mean(dim=(0, 1)))
        return causal_attention(queries, keys, values)

    model.prefill(prompt.token_ids, attend)
    num_tokens = len(prompt.token_ids)
    counts = torch.tensor([(i + 1) * num_tokens // NUM_SHARES for i in range(NUM_SHARES)])
    curves = []
    for layer, order in enumerate(orders[:-1]):
        later = torch.stack(masses[layer + 1 :])
        covered = torch.nn.functional.pad(later[:, order].cumsum(dim=1), (1, 0))
        curves.append(covered[:, counts].amin(dim=0))
    return torch.stack(curves).cpu()


class RecallCurves:
    """Curves of all prompts, one prompt a step."""

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], votes: Votes) -> None:
        self._model = model
        self._prompts = prompts
        self._votes = votes
        self._curves: list[list[list[float]]] = []

    @property
    def curves(self) -> Tensor:
        """All curves so far, [P, L - 1, NUM_SHARES], float32."""
        return torch.tensor(self._curves)

    def step(self, index: int) -> None:
        self._curves.append(recall_curves(self._model, self._prompts[index], self._votes).tolist())

    def state(self) -> dict[str, Any]:
        return {"curves": self._curves}

    def restore(self, state: dict[str, Any]) -> None:
        self._curves = state["curves"]


def choose_shares(curves: Tensor, min_recall: float, percentile: float) -> list[float]:
    """Smallest share of each layer with that recall, never rising from layer to layer, [L - 1].

    Args:
        curves: one per prompt, [P, L - 1, NUM_SHARES].
        min_recall: attention mass to be covered, (0, 1].
        percentile: 0 counts the worst prompt, 10 lets a tenth of the prompts be worse.
    """
    recall = curves.quantile(percentile / 100, dim=0)
    too_few = (recall < min_recall).sum(dim=1).clamp(max=NUM_SHARES - 1)
    return list(accumulate(((too_few + 1) / NUM_SHARES).tolist(), min))


def mean_share(shares: Sequence[float]) -> float:
    """Share of a prompt that a layer keeps, mean over layers: each keeps what it hands on, the last all it sees."""
    return (sum(shares) + shares[-1]) / (len(shares) + 1)
