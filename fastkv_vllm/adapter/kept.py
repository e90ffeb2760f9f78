"""What stayed of the last compressed prompt, small enough to be asked for by whoever looks."""

import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from fastkv_vllm.adapter.batch import PrefillRows

MOST_STRETCHES = 128  # of a prompt; longer ones have wider stretches


class LastKept:
    """Shares of a prompt's entries that stay, by layer, KV head and stretch of the prompt.

    `note` is what a compressor's `watch` calls. No text, no token and no name of a request is held.

    Args:
        num_layers: of the model.

    Fields:
        map: of the last prompt; None before the first.
    """

    def __init__(self, num_layers: int) -> None:
        self.map: dict[str, Any] | None = None
        self._num_layers = num_layers
        self._unfinished: dict[str, dict[str, list[Any]]] = {}

    def note(self, prefill: PrefillRows, layer: int, positions: Sequence[torch.Tensor]) -> None:
        """Take down a layer of a prompt; layers come in order, all within one step.

        Args:
            prefill: whose entries.
            layer: index of the layer.
            positions: that stay of each of this rank's KV heads.
        """
        found = self._unfinished.setdefault(prefill.request_id, {"num_kept": [], "shares": []})
        found["num_kept"].append([len(head) for head in positions])
        found["shares"].append([shares(head, prefill.plan.num_tokens) for head in positions])
        if layer == self._num_layers - 1:
            self.map = {
                "time_s": time.time(),
                "method": prefill.recipe.config.method,
                "num_tokens": prefill.plan.num_tokens,
                **self._unfinished.pop(prefill.request_id),
            }


def shares(positions: torch.Tensor, num_tokens: int) -> list[float]:
    """Share of each stretch of a prompt that is among some positions; stretches differ by one token at most."""
    num_stretches = min(MOST_STRETCHES, num_tokens)
    whole, part = (torch.arange(num_tokens), positions)
    sizes, found = (torch.bincount(p * num_stretches // num_tokens, minlength=num_stretches) for p in (whole, part))
    return [round(share, 3) for share in (found / sizes).tolist()]


def merged(ranks: Sequence[dict[str, Any] | None], num_kv_heads: int) -> dict[str, Any] | None:
    """One map of all KV heads from those of the ranks, in their order; None before the first prompt.

    Where there are more ranks than heads, neighbours hold the same one.

    Args:
        ranks: of each rank, after the same step.
        num_kv_heads: of a layer, over all ranks.
    """
    different = [rank for rank in ranks[:: max(1, len(ranks) // num_kv_heads)] if rank is not None]
    if not different:
        return None
    layers = {
        name: [[*chain(*heads)] for heads in zip(*(rank[name] for rank in different), strict=True)]
        for name in ("num_kept", "shares")
    }
    return different[0] | layers
