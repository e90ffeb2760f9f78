"""Answers of a model whose late layers see only the rows a TSP layer lets go on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt, PromptReader
from fastkv_vllm.calibrate.tsp_layer import Propagation


class TspAttention:
    """Attention with token-selective propagation after one layer, nothing dropped from the caches of the rest.

    Rows that do not go on stay in the tensors and are seen by nobody, so every architecture works unchanged: what the
    chosen rows compute is what they compute alone. One object per prompt.
    """

    def __init__(self, layer: int, propagation: Propagation) -> None:
        self._layer = layer
        self._propagation = propagation
        self._rows: Tensor | None = None  # chosen positions of the prompt, ascending
        self._num_prompt = 0

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_queries, num_keys = queries.shape[1], keys.shape[1]
        is_prompt = num_queries == num_keys
        if layer == self._layer and is_prompt:
            self._num_prompt = num_keys
            self._rows = self._propagation.rows(queries, keys)
        if layer <= self._layer:
            return causal_attention(queries, keys, values)
        assert self._rows is not None, "layers run in order, the prompt first"
        if is_prompt:
            out = torch.zeros_like(queries)
            rows = self._rows
            out[:, rows] = causal_attention(queries[:, rows], keys[:, rows], values[:, rows])
            return out
        answer = torch.arange(self._num_prompt, num_keys, device=keys.device)
        visible = torch.cat([self._rows, answer])
        return causal_attention(queries, keys[:, visible], values[:, visible])


class AnswerSweep:
    """Right and wrong answers with one TSP layer, one prompt a step; without a layer nothing is held back."""

    def __init__(
        self,
        model: CalibrationModel,
        reader: PromptReader,
        prompts: Sequence[Prompt],
        propagation: Propagation,
        layer: int | None,
    ) -> None:
        self._model = model
        self._reader = reader
        self._prompts = prompts
        self._propagation = propagation
        self._layer = layer
        self._hits: list[bool] = []

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self._hits) / len(self._hits)

    def step(self, index: int) -> None:
        prompt = self._prompts[index]
        tsp = None if self._layer is None else TspAttention(self._layer, self._propagation)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return (causal_attention if tsp is None else lambda *qkv: tsp(layer, *qkv))(queries, keys, values)

        generated = self._model.decode(prompt.token_ids, prompt.max_new_tokens, attend)
        self._hits.append(self._reader.is_right(prompt, generated))

    def state(self) -> dict[str, Any]:
        return {"hits": self._hits}

    def restore(self, state: dict[str, Any]) -> None:
        self._hits = state["hits"]
