"""Token-selective propagation: late layers run on the rows chosen at the TSP layer.

Source: FastKV, arXiv 2502.01068, section 3; chunked prefill is exact because rows wait after the TSP layer for the
chunk that carries the window.

| row of the step                     | after the TSP layer                                  |
|-------------------------------------|------------------------------------------------------|
| decode, short prompt, replay        | goes on, unchanged                                   |
| chunk of a prompt that goes on      | waits in the stash; late layers do not see it        |
| last chunk of a prompt              | replaced by the chosen rows of the whole prompt      |
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from fastkv_vllm.adapter.attention import CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import PrefillRows, take_requests
from fastkv_vllm.adapter.compressor import Compressor

Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Segment:
    """Rows of one request: where they lie in the step, and how many go on."""

    request: int
    first: int
    count: int
    prefill: PrefillRows | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def under_tsp(self) -> bool:
        return self.prefill is not None and self.prefill.plan.num_tsp is not None

    @property
    def num_late(self) -> int:
        if self.prefill is None or self.prefill.plan.num_tsp is None:
            return self.count
        return 0 if self.prefill.destination is None else self.prefill.plan.num_tsp


class TSPStep:
    """One step with prompts under TSP: the late layers' batch, and the layers' detour while it runs.

    Args:
        compressor: holds stash and selection.
        segments: all requests of the step, in order.
        view: attention metadata of the early layers, null blocks already cut off.
        builder: makes the late layers' metadata.
        late_layer_names: names of the late attention layers.
    """

    def __init__(
        self,
        compressor: Compressor,
        segments: Sequence[_Segment],
        view: Any,
        builder: CompressionMetadataBuilder,
        late_layer_names: Sequence[str],
    ) -> None:
        self._compressor = compressor
        self._segments = segments
        self._late_layer_names = late_layer_names
        self._positions = view.positions
        self._metadata = None
        self._slots = None
        going = [segment for segment in segments if segment.num_late]
        if going:
            late, prefills = _late_batch(view, going)
            held = builder.batch.held if builder.batch is not None else {}
            late_held = {i: held[s.request] for i, s in enumerate(going) if s.request in held}
            self._metadata = builder.build_for(late, prefills, late_held)
            self._slots = late.slot_mapping
            self._late_of_going = list(zip(going, late.query_start_loc.tolist(), strict=False))

    @contextmanager
    def detour(self, layers: Sequence[nn.Module], tsp_layer: int) -> Iterator[None]:
        """Within it, the TSP layer hands on the late batch and the layers after it run on that.

        Only the instances' `forward` is replaced, and only meanwhile: compiled code never traces it, which is why
        this step must run uncompiled.
        """
        get_forward_context().skip_compiled = True
        cut, *late = layers[tsp_layer:]
        replacements = {cut: self._cut(cut.forward), **{layer: self._late(layer.forward) for layer in late}}
        for layer, forward in replacements.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in replacements:
                del layer.forward

    def scatter(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Final hidden states by row of the step; rows that did not go on are zero and never sampled from.

        Args:
            hidden: output of the decoder on the late batch, [T_late, hidden].
            num_rows: rows of the step.
        """
        full = hidden.new_zeros(num_rows, hidden.shape[1])
        if self._metadata is None:
            return full
        for segment, first in self._late_of_going:
            count = 1 if segment.under_tsp else segment.count
            end = first + segment.num_late
            full[segment.rows][-count:] = hidden[end - count : end]
        return full

    def _cut(self, forward: Layer) -> Layer:
        def run(positions: torch.Tensor, hidden: torch.Tensor, residual: Any, **kwargs: Any) -> Any:
            hidden, residual = forward(positions, hidden, residual, **kwargs)
            return self._enter_late(hidden, residual)

        return run

    def _late(self, forward: Layer) -> Layer:
        def run(positions: torch.Tensor, hidden: torch.Tensor, residual: Any, **kwargs: Any) -> Any:
            if self._metadata is None:
                return hidden, residual
            return forward(self._positions, hidden, residual, **kwargs)

        return run

    def _enter_late(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stash what waits, gather what goes on, and point the late layers at their batch."""
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        stats = self._compressor.stats
        for segment in self._segments:
            rows = segment.rows
            if not segment.under_tsp:
                parts.append((hidden[rows], residual[rows], self._positions[rows]))
                continue
            assert segment.prefill is not None, "under TSP"
            stats.tsp_rows_in += segment.count
            stats.tsp_rows_out += segment.num_late
            stream = hidden[rows] + residual[rows]
            if segment.prefill.destination is None:
                self._stash(segment.prefill, stream)
            else:
                chosen = self._compressor.selected[segment.prefill.request_id]
                picked = self._pick(segment.prefill, stream, chosen)
                parts.append((torch.zeros_like(picked), picked, chosen))
        if self._metadata is None:
            return hidden, residual
        context = get_forward_context()
        for name in self._late_layer_names:
            context.attn_metadata[name] = self._metadata
            context.slot_mapping[name] = self._slots
        late_hidden, late_residual, self._positions = (torch.cat(part) for part in zip(*parts, strict=True))
        return late_hidden, late_residual

    def _stash(self, prefill: PrefillRows, stream: torch.Tensor) -> None:
        stash = self._compressor.stash
        if prefill.request_id not in stash:
            stash[prefill.request_id] = stream.new_empty(prefill.plan.num_tokens, stream.shape[1])
        stash[prefill.request_id][prefill.start : prefill.start + prefill.count] = stream

    def _pick(self, prefill: PrefillRows, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Rows `chosen` of the whole prompt's residual stream; `stream` holds those of the last chunk."""
        earlier = int((chosen < prefill.start).sum())
        now = stream[chosen[earlier:] - prefill.start]
        if earlier == 0:
            return now
        return torch.cat([self._compressor.stash[prefill.request_id][chosen[:earlier]], now])


def segments_of(query_start: Sequence[int], prefills: Sequence[PrefillRows]) -> list[_Segment]:
    """Rows of each request of a step.

    Args:
        query_start: first row of each request and the number of rows, [R + 1].
        prefills: requests with an unfinished prompt.
    """
    by_first = {prefill.first: prefill for prefill in prefills}
    return [
        _Segment(i, first, end - first, by_first.get(first)) for i, (first, end) in enumerate(pairwise(query_start))
    ]


def _late_batch(view: Any, going: Sequence[_Segment]) -> tuple[Any, tuple[PrefillRows, ...]]:
    """Metadata and prefills of the late layers' batch.

    The chosen rows of a prompt are cached densely from its first block on; its blocks hold nothing else in these
    layers yet, and compaction moves what stays to where decode expects it.
    """
    late = take_requests(view, [s.request for s in going], [s.num_late for s in going])
    slots, prefills = [], []
    for i, (segment, first) in enumerate(zip(going, late.query_start_loc.tolist(), strict=False)):
        if segment.prefill is None or not segment.under_tsp:
            slots.append(view.slot_mapping[segment.rows])
            if segment.prefill is not None:
                prefills.append(replace(segment.prefill, first=first))
            continue
        plan, count = segment.prefill.plan, segment.num_late
        late.seq_lens[i] = count
        rank = torch.arange(count)
        slots.append(segment.prefill.blocks[rank // plan.block_size] * plan.block_size + rank % plan.block_size)
        prefills.append(replace(segment.prefill, first=first, count=count, start=0, late=True))
    late.slot_mapping = torch.cat(slots)
    return late, tuple(prefills)
