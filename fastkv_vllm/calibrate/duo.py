"""DuoAttention's gates: which KV heads need the whole context, learnt by gradient descent on the gates alone."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention, grouped_attention
from fastkv_vllm.calibrate.prompts import Prompt


@dataclass(frozen=True)
class DuoSettings:
    """How gates are learnt; defaults are those of the paper and its code (arXiv 2410.10819).

    Fields:
        num_steps: prompts seen, one a step.
        num_sink: first tokens a streaming head sees.
        window_size: most recent tokens a streaming head sees, its own included.
        penalty: weight of the mean gate in the loss; higher gives more streaming heads.
        learning_rate: of AdamW at its highest.
        seed: of the prompts' order.
    """

    num_steps: int = 2000
    num_sink: int = 128
    window_size: int = 256
    penalty: float = 0.05
    learning_rate: float = 0.02
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def learning_rate_at(self, step: int) -> float:
        """Rises over the first fifth of the steps and falls over the last, never below a tenth."""
        fifth = max(self.num_steps // 5, 1)
        rise, fall = (step + 1) / fifth, (self.num_steps - step) / fifth
        return self.learning_rate * min(1.0, max(rise, 0.1), max(fall, 0.1))


class GateTrainer:
    """Gates of all KV heads, one prompt a step.

    A head's output is gate * full attention + (1 - gate) * streaming attention. The loss of a prompt is the squared
    distance of the final hidden rows that predict the answer from the unchanged model's, mean over numbers, plus
    penalty * mean |gate|. Gates begin at 1 and are clamped to [0, 1] after each step.

    Fields:
        gates: [L, H], float32.
    """

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], settings: DuoSettings) -> None:
        self._model = model
        self._prompts = prompts
        self._settings = settings
        self.gates = torch.ones(model.num_layers, model.num_kv_heads, device=model.device, requires_grad=True)
        self._optimizer = torch.optim.AdamW([self.gates], lr=settings.learning_rate, weight_decay=0.0)
        self._distances: list[float] = []

    @property
    def last_distance(self) -> float:
        """Mean over the last tenth of the steps of the distance from the unchanged model's hidden rows."""
        last = self._distances[-max(len(self._distances) // 10, 1) :]
        return sum(last) / len(last)

    def step(self, index: int) -> None:
        prompt = self._prompt_of(index)
        token_ids = (*prompt.token_ids, *prompt.answer_ids)
        rows = slice(len(prompt.token_ids) - 1, len(token_ids) - 1)  # each gives a token of the answer
        with torch.no_grad():
            wanted = self._model.final_hidden(token_ids, rows, _attend_fully)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate_at(index)
        self._optimizer.zero_grad()
        with self._model.recomputing(self._attend):
            got = self._model.final_hidden(token_ids, rows, self._attend)
            distance = (got - wanted).square().mean()
            (distance + self._settings.penalty * self.gates.abs().mean()).backward()
        self._optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)
        self._distances.append(distance.item())

    def state(self) -> dict[str, Any]:
        moments = self._optimizer.state[self.gates]
        kept = {name: tensor.tolist() for name, tensor in moments.items()}
        return {"gates": self.gates.tolist(), "optimizer": kept, "distances": self._distances}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.gates.copy_(torch.tensor(state["gates"]))
        self._optimizer.state[self.gates] = {
            name: torch.tensor(values, device="cpu" if name == "step" else self._model.device)
            for name, values in state["optimizer"].items()
        }
        self._distances = state["distances"]

    def _prompt_of(self, step: int) -> Prompt:
        """Every prompt once in each pass over them, in an order that the seed and the pass decide."""
        turn, place = divmod(step, len(self._prompts))
        order = random.Random(f"{self._settings.seed} {turn}").sample(range(len(self._prompts)), len(self._prompts))
        return self._prompts[order[place]]

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        full = causal_attention(queries, keys, values)
        streaming = streaming_attention(
            queries, keys, values, num_sink=self._settings.num_sink, window_size=self._settings.window_size
        )
        group_size = queries.shape[0] // keys.shape[0]
        gate = self.gates[layer].repeat_interleave(group_size)[:, None, None].to(full.dtype)
        return gate * full + (1 - gate) * streaming


def streaming_attention(queries: Tensor, keys: Tensor, values: Tensor, *, num_sink: int, window_size: int) -> Tensor:
    """Causal attention of each token to the first `num_sink` and to the last `window_size` tokens, its own included.

    Blocks of queries see a slice of the keys, so the cost is linear in the length.

    Args:
        queries: roped and scaled, of the whole prompt, [Hq, N, D].
        keys, values: [H, N, D].

    Returns:
        Output [Hq, N, D].
    """
    num_tokens = queries.shape[1]
    places = torch.arange(num_tokens, device=queries.device)
    outputs = []
    for begin in range(0, num_tokens, max(window_size, 128)):
        block = places[begin : begin + max(window_size, 128)]
        first = max(begin - window_size + 1, 0)
        seen = torch.cat([places[: min(num_sink, first)], places[first : begin + len(block)]])
        age = block[:, None] - seen
        mask = (age >= 0) & ((age < window_size) | (seen < num_sink))
        outputs.append(grouped_attention(queries[:, block], keys[:, seen], values[:, seen], mask=mask))
    return torch.cat(outputs, dim=1)


def _attend_fully(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return causal_attention(queries, keys, values)
