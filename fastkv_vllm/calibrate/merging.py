"""MiniCache's report: what answers lose when neighbouring layers are merged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, attention_of_last, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.codecs import NO_CODEC, VALUES, VECTOR_CODECS, EntryShape, ExactCodec, PairCodec, neighbours


@dataclass(frozen=True)
class MergingSettings:
    """How layers are merged, and who reads them.

    Fields:
        merge_layers, merge_t, merge_gamma, codec: as the settings of these names.
        first_layer: pairs are merged from this layer on; None: from half of the layers on.
        num_queries: last tokens of each prompt, its answer included, that read merged entries; not of themselves.
    """

    merge_layers: str = VALUES
    merge_t: float = 0.6
    merge_gamma: float = 0.05
    codec: str = NO_CODEC
    first_layer: int | None = None
    num_queries: int = 32

    def settings(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)


class MergingTrial:
    """Reads each pair of neighbours merged, and all pairs together, one prompt a step.

    Counted are the tokens of the answers that are the most likely ones before and no longer after. As in serving,
    tokens before the last ones see every layer's own entries. With a codec a merged pair is stored by it, and where all
    pairs are merged the other layers' entries are, too.

    Fields:
        owners: layer with which each layer is merged, its own number where it is not.
    """

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], settings: MergingSettings) -> None:
        short = [prompt for prompt in prompts if len(prompt.token_ids) <= settings.num_queries]
        if short:
            raise CalibrationError(
                f"prompts must have more than the {settings.num_queries} tokens that read merged entries; one has "
                f"{len(short[0].token_ids)}: drop it or lower --queries"
            )
        self._model = model
        self._prompts = prompts
        self._has_codes = settings.codec != NO_CODEC
        vectors = VECTOR_CODECS[settings.codec] if self._has_codes else ExactCodec()
        self._codec = PairCodec(settings.merge_t, settings.merge_gamma, settings.merge_layers == VALUES, vectors)
        self._num_queries = settings.num_queries
        self.owners = neighbours(model.num_layers, settings.first_layer)
        if len(set(self.owners)) == model.num_layers:
            raise CalibrationError(
                f"--first-layer must leave a pair of the model's {model.num_layers} layers; "
                f"{settings.first_layer} leaves none"
            )
        self._num_right = 0
        self._lost_together = 0
        self._lost = [0] * (model.num_layers - 1)
        self._changes = [0.0] * (model.num_layers - 1)

    def step(self, index: int) -> None:
        prompt = self._prompts[index]
        entries: list[Tensor] = []
        right = self._is_right(prompt, {}, entries)
        self._num_right += int(right.sum())
        together: dict[int, Tensor] = {}
        if self._has_codes:
            together = {layer: self._stored(own) for layer, own in enumerate(entries)}
        for lower in range(self._model.num_layers - 1):
            pair = dict(zip((lower, lower + 1), self._merged(entries[lower], entries[lower + 1]), strict=True))
            changes: list[float] = []
            self._lost[lower] += int((right & ~self._is_right(prompt, pair, changes=changes)).sum())
            self._changes[lower] += sum(changes) / 2
            if self.owners[lower + 1] == lower:
                together |= pair
        self._lost_together += int((right & ~self._is_right(prompt, together)).sum())

    def state(self) -> dict[str, Any]:
        return {
            "num_right": self._num_right,
            "lost_together": self._lost_together,
            "lost": self._lost,
            "changes": self._changes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._num_right, self._lost_together = state["num_right"], state["lost_together"]
        self._lost, self._changes = list(state["lost"]), list(state["changes"])

    def found(self) -> dict[str, Any]:
        """Shares of the right answer tokens that are lost: `lost` with all pairs, `lost_by_pair` [L-1] with each alone.

        And `changed_by_pair` [L-1], how far each alone moves its layers' attention: |difference| / |output|.

        Raises:
            CalibrationError: the model has predicted no token of an answer.
        """
        if self._num_right == 0:
            raise CalibrationError("the model must predict tokens of the answers; it predicts none: use other prompts")
        return {
            "lost": self._lost_together / self._num_right,
            "lost_by_pair": [count / self._num_right for count in self._lost],
            "changed_by_pair": [change / len(self._prompts) for change in self._changes],
            "num_right": self._num_right,
        }

    def _is_right(
        self,
        prompt: Prompt,
        merged: Mapping[int, Tensor],
        entries: list[Tensor] | None = None,
        changes: list[float] | None = None,
    ) -> Tensor:
        """Which tokens of the answer are the most likely ones where these layers' entries are read, [n] bool.

        Args:
            merged: layer -> keys and values of the tokens before the last ones, [H, 2, M, D].
            entries: is given each layer's own.
            changes: is given how far the attention of each merged layer moves.
        """
        token_ids = (*prompt.token_ids, *prompt.answer_ids)
        num_read = len(token_ids) - self._num_queries

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            own = causal_attention(queries, keys, values)
            if entries is not None:
                entries.append(torch.stack([keys, values], dim=1)[:, :, :num_read].cpu())
            if layer not in merged:
                return own
            read = merged[layer].to(keys)
            keys = torch.cat([read[:, 0], keys[:, num_read:]], dim=1)
            values = torch.cat([read[:, 1], values[:, num_read:]], dim=1)
            last = attention_of_last(queries[:, num_read:], keys, values)
            if changes is not None:
                before = own[:, num_read:].float()
                changes.append(float((last.float() - before).norm() / before.norm()))
            return torch.cat([own[:, :num_read], last], dim=1)

        count = len(prompt.answer_ids)
        likely = self._model.next_tokens(token_ids, count + 1, attend)[:-1]
        return likely.cpu() == torch.tensor(prompt.answer_ids)

    def _merged(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Entries [H, 2, M, D] of two layers as they come back, [2, H, 2, M, D]."""
        num_heads, _, num_entries, head_dim = lower.shape
        most = math.ceil(self._codec.gamma * num_entries)
        records, retained = self._codec.merge(lower, upper, most)
        own = torch.zeros(num_heads, 2, most, head_dim)
        for head, (stored, stays) in enumerate(zip(self._stored(upper), retained, strict=True)):
            own[head, :, : int(stays.sum())] = stored[:, stays]
        return self._codec.restore(records, own, EntryShape(head_dim, lower.dtype))

    def _stored(self, entries: Tensor) -> Tensor:
        """Entries [H, 2, M, D] that are not merged as they come back, float32."""
        vectors = self._codec.vectors
        data = vectors.encode_vectors(entries.flatten(0, 2))
        return vectors.decode_vectors(data, entries.shape[3], entries.dtype).view(entries.shape)
