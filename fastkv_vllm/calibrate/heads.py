"""Importance of attention heads for retrieval: credit for looking at the needle while its answer is written."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt, PromptReader
from fastkv_vllm.calibrate.tsp_layer import last_probabilities

CRITERIA = ("r", "r2")


def credit(probabilities: Tensor, token: int, prompt: Prompt, criterion: str) -> Tensor:
    """What each head earns for one decoded token, with len = tokens of the needle.

    r:  1 / len if the position the head attends to most lies in the needle and holds the decoded token.
    r2: the probabilities of those of the head's len highest positions that lie in the needle, over len.

    Args:
        probabilities: attention of the row that gave the token, [..., N], all layers and heads.
        token: the decoded one.

    Returns:
        [...], float64.

    Source: r: Retrieval Head, arXiv 2404.15574; r2: HeadKV, arXiv 2410.19258, and its code.
    """
    needle = prompt.needle
    is_needle = torch.zeros(probabilities.shape[-1], dtype=torch.bool, device=probabilities.device)
    is_needle[needle.start : needle.stop] = True
    if criterion == "r":
        copied = [i for i in needle if prompt.token_ids[i] == token]
        top = probabilities.argmax(dim=-1)
        return torch.isin(top, torch.tensor(copied, device=top.device)).double() / len(needle)
    top = probabilities.topk(len(needle), dim=-1)
    return (top.values.double() * is_needle[top.indices]).sum(dim=-1) / len(needle)


class HeadCredit:
    """Credit of all heads summed over prompts that were answered right, one prompt a step."""

    def __init__(
        self, model: CalibrationModel, reader: PromptReader, prompts: Sequence[Prompt], criterion: str
    ) -> None:
        self._model = model
        self._reader = reader
        self._prompts = prompts
        self._criterion = criterion
        self._sum = torch.zeros(model.num_layers, model.num_query_heads, dtype=torch.float64)
        self.num_right = 0

    def step(self, index: int) -> None:
        prompt = self._prompts[index]
        earned = torch.zeros_like(self._sum)
        rows: list[Tensor] = []

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            rows.append(last_probabilities(queries, keys, 1)[:, 0])
            return causal_attention(queries, keys, values)

        def on_token(token: int) -> None:
            earned.add_(credit(torch.stack(rows), token, prompt, self._criterion).cpu())
            rows.clear()

        generated = self._model.decode(prompt.token_ids, prompt.max_new_tokens, attend, on_token)
        if self._reader.is_right(prompt, generated):
            self._sum += earned
            self.num_right += 1

    def state(self) -> dict[str, Any]:
        return {"sum": self._sum.tolist(), "num_right": self.num_right}

    def restore(self, state: dict[str, Any]) -> None:
        self._sum = torch.tensor(state["sum"], dtype=torch.float64)
        self.num_right = state["num_right"]

    def importance(self) -> tuple[Tensor, Tensor]:
        """Importance of query heads [L, Hq] and, as the mean over each group, of KV heads [L, H]; each sums to 1.

        Raises:
            CalibrationError: no head earned anything.
        """
        total = self._sum.sum()
        if not total > 0:
            raise CalibrationError(
                f"some head must earn credit; of {len(self._prompts)} prompts {self.num_right} were answered right and "
                "none gave any: use prompts that the model answers and whose needle holds the answer"
            )
        by_query_head = self._sum / total
        by_kv_head = by_query_head.unflatten(1, (self._model.num_kv_heads, -1)).mean(dim=2)
        return by_query_head, by_kv_head / by_kv_head.sum()
