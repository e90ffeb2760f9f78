"""Token-selective propagation: late layers run on the rows chosen at a cut, or at several, each from the last one's.

Source: FastKV, arXiv 2502.01068, section 3; chunked prefill is exact because rows wait after the first cut for the
chunk that carries the window.

| row of the step                     | after its prompt's first cut                         | after each later cut    |
|-------------------------------------|------------------------------------------------------|-------------------------|
| decode, short prompt, replay        | goes on, unchanged                                   | goes on, unchanged      |
| chunk of a prompt that goes on      | waits in the stash; late layers do not see it        |                         |
| last chunk of a prompt              | replaced by the chosen rows of the whole prompt      | goes on if chosen again |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from fastkv_vllm.adapter.attention import CompressionMetadata, CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import PrefillRows, take_requests
from fastkv_vllm.adapter.compressor import Compressor

Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Segment:
    """Rows of one request in the batch of some layers.

    Fields:
        request: its number in the step.
        first, count: its rows.
        prefill: what to know of them where its prompt is unfinished.
    """

    request: int
    first: int
    count: int
    prefill: PrefillRows | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def cuts(self) -> dict[int, int]:
        """Layer -> rows that go on after it."""
        return {} if self.prefill is None else dict(self.prefill.plan.cuts)

    @property
    def is_late(self) -> bool:
        return self.prefill is not None and self.prefill.late


@dataclass(frozen=True)
class _Stage:
    """The batch of the layers after one cut, up to the next.

    Fields:
        segments: requests with rows in it, in order.
        metadata: of their attention; None: no rows.
        slots: where their entries go, [rows].
    """

    segments: Sequence[_Segment]
    metadata: CompressionMetadata | None = None
    slots: torch.Tensor | None = None


class TSPStep:
    """One step with prompts under TSP: the batches between cuts, and the layers' detour while it runs.

    Prompts of a step may be cut after different layers.

    Args:
        compressor: holds stash and selection.
        segments: all requests of the step, in order.
        view: attention metadata of the whole batch, null blocks already cut off.
        builder: makes the late layers' metadata.
        layer_names: names of the attention layers by index.
    """

    def __init__(
        self,
        compressor: Compressor,
        segments: Sequence[_Segment],
        view: Any,
        builder: CompressionMetadataBuilder,
        layer_names: Mapping[int, str],
    ) -> None:
        self._compressor = compressor
        self._segments = segments
        self._layer_names = layer_names
        self._stage = _Stage(segments)
        self._positions: torch.Tensor | None = None  # of the rows after a cut; before it they are the model's
        self._stages: dict[int, _Stage] = {}  # layer with a cut -> what follows it
        stage = self._stage
        for layer in sorted({layer for segment in segments for layer in segment.cuts}):
            stage = self._stages[layer] = _stage_after(layer, stage, segments, view, builder)

    @contextmanager
    def detour(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within it, layers with a cut hand on the next batch and the layers after them run on that.

        Only the instances' `forward` is replaced, and only meanwhile: compiled code never traces it, which is why
        this step must run uncompiled.

        Args:
            layers: all decoder layers, in order.
        """
        get_forward_context().skip_compiled = True
        first = min(self._stages)
        for index, layer in enumerate(layers[first:], start=first):
            layer.forward = self._replace(index, layer.forward)
        try:
            yield
        finally:
            for layer in layers[first:]:
                del layer.forward

    def scatter(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Final hidden states by row of the step; rows that did not go on are zero and never sampled from.

        Args:
            hidden: output of the decoder on the last batch, [T_late, hidden].
            num_rows: rows of the step.
        """
        full = hidden.new_zeros(num_rows, hidden.shape[1])
        for segment in self._stage.segments:
            count = 1 if segment.is_late else segment.count
            full[self._segments[segment.request].rows][-count:] = hidden[segment.rows][-count:]
        return full

    def _replace(self, index: int, forward: Layer) -> Layer:
        """A layer after the first cut, or with it: on this stage's batch, if that has rows."""

        def run(positions: torch.Tensor, hidden: torch.Tensor, residual: Any, **kwargs: Any) -> Any:
            positions = positions if self._positions is None else self._positions
            if self._stage.segments:
                hidden, residual = forward(positions, hidden, residual, **kwargs)
            if self._stage.segments and index in self._stages:
                return self._cut(index, positions, hidden, residual)
            return hidden, residual

        return run

    def _cut(
        self, index: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stash what waits, gather what goes on, and point the layers after this one at their batch."""
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for segment in self._stage.segments:
            rows = segment.rows
            if index not in segment.cuts:
                parts.append((hidden[rows], residual[rows], positions[rows]))
                continue
            assert segment.prefill is not None, "it has cuts"
            self._count(index, segment)
            stream = hidden[rows] + residual[rows]
            if segment.prefill.destination is None:
                self._stash(segment.prefill, stream)
            else:
                chosen = self._compressor.selected[segment.prefill.request_id]
                picked = self._pick(segment.prefill, stream, positions[rows], chosen)
                parts.append((torch.zeros_like(picked), picked, chosen))
        self._stage = self._stages[index]
        if not parts:
            return hidden, residual
        context = get_forward_context()
        for later, name in self._layer_names.items():
            if later > index:
                context.attn_metadata[name] = self._stage.metadata
                context.slot_mapping[name] = self._stage.slots
        late_hidden, late_residual, self._positions = (torch.cat(part) for part in zip(*parts, strict=True))
        return late_hidden, late_residual

    def _count(self, index: int, segment: _Segment) -> None:
        """Rows that reach the prompt's first cut, and those that go on after its last."""
        assert segment.prefill is not None, "it has cuts"
        if index == min(segment.cuts):
            self._compressor.stats.tsp_rows_in += segment.count
        if index == max(segment.cuts) and segment.prefill.destination is not None:
            self._compressor.stats.tsp_rows_out += segment.cuts[index]

    def _stash(self, prefill: PrefillRows, stream: torch.Tensor) -> None:
        stash = self._compressor.stash
        if prefill.request_id not in stash:
            stash[prefill.request_id] = stream.new_empty(prefill.plan.num_tokens, stream.shape[1])
        stash[prefill.request_id][prefill.start : prefill.start + prefill.count] = stream

    def _pick(
        self, prefill: PrefillRows, stream: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """Rows `chosen` of the prompt's residual stream; `stream` holds those at `positions`, the stash those before.

        All of them ascend; after the first cut none is before.
        """
        earlier = int((chosen < positions[0]).sum())
        now = stream[torch.searchsorted(positions, chosen[earlier:])]
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


def _stage_after(
    layer: int, before: _Stage, step: Sequence[_Segment], view: Any, builder: CompressionMetadataBuilder
) -> _Stage:
    """What follows a layer with a cut.

    The chosen rows of a prompt are cached densely from its first block on; its blocks hold nothing else in these
    layers yet, and compaction moves what stays to where decode expects it.

    Args:
        layer: its index.
        before: the batch it runs on.
        step: all requests of the step.
        view, builder: as for `TSPStep`.
    """
    segments: list[_Segment] = []
    first = 0
    for segment in before.segments:
        prefill, count = segment.prefill, segment.count
        if prefill is not None and layer in segment.cuts:
            if prefill.destination is None:
                continue
            count = segment.cuts[layer]
            prefill = replace(prefill, count=count, start=0, late=True)
        if prefill is not None:
            prefill = replace(prefill, first=first)
        segments.append(_Segment(segment.request, first, count, prefill))
        first += count
    if not segments:
        return _Stage(segments)
    late = take_requests(view, [s.request for s in segments], [s.count for s in segments])
    slots = []
    for i, segment in enumerate(segments):
        if segment.prefill is None or not segment.is_late:
            slots.append(view.slot_mapping[step[segment.request].rows])
            continue
        late.seq_lens[i] = segment.count
        rank, block_size = torch.arange(segment.count), segment.prefill.plan.block_size
        slots.append(segment.prefill.blocks[rank // block_size] * block_size + rank % block_size)
    late.slot_mapping = torch.cat(slots)
    prefills = tuple(s.prefill for s in segments if s.prefill is not None)
    held = builder.batch.held if builder.batch is not None else {}
    late_held = {i: held[s.request] for i, s in enumerate(segments) if s.request in held}
    return _Stage(segments, builder.build_for(late, prefills, late_held), late.slot_mapping)
