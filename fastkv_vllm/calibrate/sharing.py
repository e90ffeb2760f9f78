"""KVSharer's map: which layers read the entries of another, found by trying the most dissimilar pairs first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, attention_of_last, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt


@dataclass(frozen=True)
class SharingSettings:
    """How the map is found; threshold and tokens are those of the authors' code (arXiv 2410.18517).

    Fields:
        num_shared: layers that read another's entries; None: a quarter.
        threshold: least mean cosine, (-1, 1), between the last hidden states with and without sharing.
        num_tokens: first tokens of each prompt whose keys and values are compared.
        num_queries: last tokens of each prompt, its answer included, that read shared entries and whose hidden states
            are compared.
    """

    num_shared: int | None = None
    threshold: float = 0.5
    num_tokens: int = 64
    num_queries: int = 32

    def settings(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)


class LayerDistances:
    """How far apart the layers' keys and values are, one prompt a step.

    Each layer's keys and values are averaged over prompts, position by position; the distance of two layers is the
    Euclidean distance of their mean entries, averaged over positions and heads, keys and values alike.

    Source: KVSharer, section 3 (sorting by dissimilarity), and its code.
    """

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], num_tokens: int) -> None:
        self._model = model
        self._prompts = prompts
        self._num_tokens = min(num_tokens, *(len(prompt.token_ids) for prompt in prompts))
        self._sums: list[Tensor] = []

    def step(self, index: int) -> None:
        found: list[Tensor] = []

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            found.append(torch.stack([keys, values]).float().cpu())
            return causal_attention(queries, keys, values)

        self._model.prefill(self._prompts[index].token_ids[: self._num_tokens], attend)
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def state(self) -> dict[str, Any]:
        return {"sums": [layer.tolist() for layer in self._sums]}

    def restore(self, state: dict[str, Any]) -> None:
        self._sums = [torch.tensor(layer) for layer in state["sums"]]

    def distances(self) -> Tensor:
        """Between all layers, [L, L]."""
        means = torch.stack(self._sums) / len(self._prompts)  # [L, 2, H, n, D]
        apart = [(layer - means).norm(dim=-1).mean(dim=(1, 2, 3)) for layer in means]
        return torch.stack(apart)


def pairs_to_try(distances: Tensor) -> list[tuple[int, int]]:
    """Pairs (follower, owner), the most dissimilar first; the owner is the earlier layer."""
    num_layers = len(distances)
    pairs = [(follower, owner) for follower in range(num_layers) for owner in range(follower)]
    return sorted(pairs, key=lambda pair: -float(distances[pair]))


class SharingSearch:
    """Takes pairs in order as long as answers stay alike, one pair a step.

    A pair is taken if with it the hidden states after the final norm, of the last tokens of all prompts, have a mean
    cosine with the unchanged model's above the threshold. A layer follows one owner that follows none: an owner that
    comes to follow another takes its followers along.

    Prompts are read as in serving: tokens before the last ones see every layer's own entries.

    Fields:
        owners: follower -> owner.
        similarity: mean cosine with these.
    """

    def __init__(
        self,
        model: CalibrationModel,
        prompts: Sequence[Prompt],
        pairs: Sequence[tuple[int, int]],
        settings: SharingSettings,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._pairs = pairs
        self._threshold = settings.threshold
        self._num_queries = settings.num_queries
        self._num_shared = max(model.num_layers // 4, 1) if settings.num_shared is None else settings.num_shared
        self.owners: dict[int, int] = {}
        self.similarity = 1.0
        self._unchanged: list[Tensor] = []

    def step(self, index: int) -> None:
        follower, owner = self._pairs[index]
        owner = self.owners.get(owner, owner)
        if follower in self.owners or len(self.owners) == self._num_shared:
            return
        tried = {other: owner if of == follower else of for other, of in self.owners.items()} | {follower: owner}
        similarity = self._similarity(tried)
        if similarity > self._threshold:
            self.owners, self.similarity = tried, similarity

    def state(self) -> dict[str, Any]:
        return {"owners": sorted(self.owners.items()), "similarity": self.similarity}

    def restore(self, state: dict[str, Any]) -> None:
        self.owners = {follower: owner for follower, owner in state["owners"]}
        self.similarity = state["similarity"]

    def found(self) -> list[int]:
        """Layer whose entries each layer reads, [L].

        Raises:
            CalibrationError: fewer read another's than asked for.
        """
        if len(self.owners) < self._num_shared:
            raise CalibrationError(
                f"{self._num_shared} layers must find an owner; {len(self.owners)} did with a cosine above "
                f"{self._threshold:g}: lower --threshold or --layers"
            )
        return [self.owners.get(layer, layer) for layer in range(self._model.num_layers)]

    def _similarity(self, owners: Mapping[int, int]) -> float:
        if not self._unchanged:
            self._unchanged = [self._hidden(prompt, {}) for prompt in self._prompts]
        alike = [
            F.cosine_similarity(self._hidden(prompt, owners), before, dim=-1).mean()
            for prompt, before in zip(self._prompts, self._unchanged, strict=True)
        ]
        return float(torch.stack(alike).mean())

    @torch.inference_mode()
    def _hidden(self, prompt: Prompt, owners: Mapping[int, int]) -> Tensor:
        """Last hidden states of the tokens that read shared entries, [n, hidden_size] float32."""
        token_ids = (*prompt.token_ids, *prompt.answer_ids)
        num_queries = min(self._num_queries, len(token_ids))
        entries: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            entries.append((keys, values))
            own = causal_attention(queries, keys, values)
            if layer not in owners:
                return own
            shared = attention_of_last(queries[:, -num_queries:], *entries[owners[layer]])
            return torch.cat([own[:, :-num_queries], shared], dim=1)

        return self._model.final_hidden(token_ids, slice(-num_queries, None), attend)
