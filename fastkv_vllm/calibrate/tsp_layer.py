"""Choice of FastKV's TSP layer: how much of what later layers attend to would a layer let go on?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.kernels.select import select
from fastkv_vllm.methods import FastKV


@dataclass(frozen=True)
class Propagation:
    """How rows are chosen at a TSP layer, as in serving.

    Fields:
        tsp_ratio: share of a prompt's rows that go on, (0, 1].
        window_size, kernel_size, pooling: as in FastKV.
    """

    tsp_ratio: float = 0.2
    window_size: int = 8
    kernel_size: int = 7
    pooling: str = "max"

    def rows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions that would go on from a layer, ascending, [int(N * tsp_ratio)].

        Args:
            queries: roped and scaled, of all or of the last W tokens at least, [Hq, n, D].
            keys: roped, of all tokens, [H, N, D].

        Raises:
            CalibrationError: the prompt is so short that only its window would go on.
        """
        num_tokens = keys.shape[1]
        num_rows = int(num_tokens * self.tsp_ratio)
        if num_rows <= self.window_size:
            raise CalibrationError(
                f"{self.tsp_ratio:g} of a prompt must be more than the window's {self.window_size} tokens; "
                f"a prompt has {num_tokens}: leave out short prompts with --lengths"
            )
        method = FastKV(self.window_size, self.kernel_size, self.pooling)
        scores = method.score(queries=queries[:, -self.window_size :].transpose(0, 1), keys=keys)
        return select(method.propagation_scores(scores)[None], num_rows)[0]

    def settings(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)


def recall_table(model: CalibrationModel, prompt: Prompt, propagation: Propagation, num_queries: int) -> Tensor:
    """Share of the attention mass in layer m that falls on the rows layer l would let go on.

    R[l, m] = mean over query heads and the last `num_queries` tokens of sum_{j in rows(l)} softmax_j(q . k_j)

    Args:
        num_queries: last tokens of the prompt whose attention counts; FastKV's window by default, 1 for the token that
            begins the answer alone.

    Returns:
        [L, L] float32; only the entries m > l are of use.
    """
    chosen: list[Tensor] = []
    mass: list[Tensor] = []

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = torch.zeros(keys.shape[1], device=keys.device)
        rows[propagation.rows(queries, keys)] = 1.0
        chosen.append(rows)
        mass.append(last_probabilities(queries, keys, num_queries).mean(dim=(0, 1)))
        return causal_attention(queries, keys, values)

    model.prefill(prompt.token_ids, attend)
    return (torch.stack(chosen) @ torch.stack(mass).T).cpu()


def last_probabilities(queries: Tensor, keys: Tensor, num_queries: int) -> Tensor:
    """Attention probabilities of the last tokens, [Hq, num_queries, N], float32.

    Args:
        queries: roped and scaled, the last n of N tokens, n >= num_queries, [Hq, n, D].
        keys: roped, [H, N, D].
    """
    num_keys = keys.shape[1]
    last = queries[:, -num_queries:].float().unflatten(0, (keys.shape[0], -1))
    logits = (last @ keys.float().mT[:, None]).flatten(0, 1)
    corner = torch.ones(num_queries, num_queries, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., num_keys - num_queries :].masked_fill_(corner, float("-inf"))
    return logits.softmax(dim=-1)


class RecallTables:
    """A recall table per prompt, one prompt a step."""

    def __init__(
        self, model: CalibrationModel, prompts: Sequence[Prompt], propagation: Propagation, num_queries: int
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._propagation = propagation
        self._num_queries = num_queries
        self._tables: list[list[list[float]]] = []

    @property
    def tables(self) -> Tensor:
        """All tables so far, [P, L, L], float32."""
        return torch.tensor(self._tables)

    def step(self, index: int) -> None:
        table = recall_table(self._model, self._prompts[index], self._propagation, self._num_queries)
        self._tables.append(table.tolist())

    def state(self) -> dict[str, Any]:
        return {"tables": self._tables}

    def restore(self, state: dict[str, Any]) -> None:
        self._tables = state["tables"]


def weakest_recall(tables: Tensor, percentile: float) -> Tensor:
    """Recall of each candidate layer in the later layer that it serves worst, [L - 1].

    Args:
        tables: one per prompt, [P, L, L].
        percentile: 0 counts the worst prompt, 10 lets a tenth of the prompts be worse.
    """
    num_layers = tables.shape[1]
    worst = [tables[:, layer, layer + 1 :].amin(dim=1) for layer in range(num_layers - 1)]
    return torch.stack(worst).quantile(percentile / 100, dim=1)


def choose_layer(recall: Tensor, min_recall: float) -> int:
    """First layer whose recall, [L - 1], is at least `min_recall`.

    Raises:
        CalibrationError: none is.
    """
    passing = (recall >= min_recall).nonzero()
    if not len(passing):
        best = int(recall.argmax())
        raise CalibrationError(
            f"a layer must reach a recall of {min_recall:g} (--min-recall); the best, layer {best}, has "
            f"{recall[best]:.3f}: run again with --resume and a lower --min-recall or a higher --percentile"
        )
    return int(passing[0])
