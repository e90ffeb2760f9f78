"""Token-selective propagation: late layers run on the rows chosen at a cut, or at several, each from the last one's.

Source: FastKV, arXiv 2502.01068, section 3; chunked prefill is exact because rows wait after the first cut for the
chunk that carries the window.

| row of the step                     | after its prompt's first cut                         | after each later cut    |
|-------------------------------------|------------------------------------------------------|-------------------------|
| decode, short prompt, replay        | goes on, unchanged                                   | goes on, unchanged      |
| chunk of a prompt that goes on      | waits in the stash; late layers do not see it        |                         |
| last chunk of a prompt              | replaced by the chosen rows of the whole prompt      | goes on if chosen again |
| the same, of a prompt read again    | replaced by a short prompt that has run up to here   |                         |

Where the layer of the cut is found while it runs, the first cut is the first layer that may have it: if it has not, all
rows of the prompt go on, out of the stash, to the layer that has.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from fastkv_vllm.adapter.attention import CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import DecodeRows, PrefillRows, take_requests
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.detour import Layer, detour
from fastkv_vllm.kernels.propagate import gather_stream, scatter_rows

logger = logging.getLogger("vllm.fastkv")


@dataclass(frozen=True)
class _Segment:
    """Rows of one request in the batch of some layers.

    Fields:
        request: its number in the step.
        first, count: its rows.
        prefill: what to know of them where its prompt is unfinished.
        decode: what to know of them where they rate entries after it.
    """

    request: int
    first: int
    count: int
    prefill: PrefillRows | None
    decode: DecodeRows | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def is_late(self) -> bool:
        return self.prefill is not None and self.prefill.positions is not None

    def moved_to(self, first: int) -> "_Segment":
        """The same rows elsewhere in a batch."""
        prefill = None if self.prefill is None else replace(self.prefill, first=first)
        decode = None if self.decode is None else replace(self.decode, first=first)
        return replace(self, first=first, prefill=prefill, decode=decode)


class TSPStep:
    """One step with prompts under TSP: the batches between cuts, and the layers' detour while it runs.

    Prompts of a step may be cut after different layers. Where rows go on is what the layer before has chosen, so a
    batch is made when its first layer is about to run.

    Args:
        compressor: holds stash and selection.
        segments: all requests of the step, in order.
        builder: makes the late layers' metadata; it has just built that of the whole batch.
        layers: all decoder layers, in order; none on a detour yet.
        layer_names: names of the attention layers by index.
        embed: token ids [n] -> what the first layer takes, [n, hidden].
    """

    def __init__(
        self,
        compressor: Compressor,
        segments: Sequence[_Segment],
        builder: CompressionMetadataBuilder,
        layers: Sequence[nn.Module],
        layer_names: Mapping[int, str],
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._cuts, self._stats = compressor.cuts, compressor.stats
        self._segments = segments
        self._view: Any = builder.view
        self._builder = builder
        self._layers = layers
        self._forwards: Sequence[Layer] = [layer.forward for layer in layers]  # the layers' own
        self._layer_names = layer_names
        self._embed = embed
        self._going = segments  # those with rows in the batch of the layer that runs
        self._positions: torch.Tensor | None = None  # of the rows after a cut; before it they are the model's

    def detour(self) -> AbstractContextManager[None]:
        """Within it, layers with a cut hand on the next batch and the layers after them run on that."""
        first_cuts = []
        for segment in self._segments:
            if segment.prefill is not None and (layer := segment.prefill.plan.first_cut) is not None:
                first_cuts.append(layer)
                self._stats.tsp_rows_in += segment.count
        return detour(self._layers, min(first_cuts), self._replace)

    def scatter(self, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Final hidden states by row of the step; rows that did not go on are zero and never sampled from.

        Args:
            hidden: output of the decoder on the last batch, [T_late, hidden].
            num_rows: rows of the step.
        """
        rows = torch.full((len(hidden),), -1, device="cpu")
        for segment in self._going:
            count, end = 1 if segment.is_late else segment.count, self._segments[segment.request].rows.stop
            rows[segment.rows][-count:] = torch.arange(end - count, end, device="cpu")
        return scatter_rows(hidden, rows.to(hidden.device), num_rows)

    def _replace(self, index: int, forward: Layer) -> Layer:
        """A layer after the first cut, or with it: on the batch of those who go on, if there are any."""

        def run(positions: torch.Tensor, hidden: torch.Tensor, residual: Any, **kwargs: Any) -> Any:
            if not self._going:
                return hidden, residual
            positions = positions if self._positions is None else self._positions
            hidden, residual = forward(positions, hidden, residual, **kwargs)
            if not any(self._is_cut(index, segment) for segment in self._going):
                return hidden, residual
            return self._cut(index, positions, hidden, residual)

        return run

    def _is_cut(self, index: int, segment: _Segment) -> bool:
        """Whether the rows of a request that go on after this layer are others than those it ran on."""
        prefill = segment.prefill
        if prefill is None or not prefill.plan.cuts:
            return False
        if prefill.destination is None:
            return index == prefill.plan.first_cut
        return prefill.request_id in self._cuts.selected

    def _cut(
        self, index: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stash what waits and gather what goes on."""
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        segments: list[_Segment] = []
        for segment in self._going:
            rows, prefill = segment.rows, segment.prefill
            if not self._is_cut(index, segment):
                parts.append((hidden[rows], residual[rows], positions[rows]))
                segments.append(segment)
                continue
            assert prefill is not None, "it is cut"
            if prefill.plan.has_stash and (prefill.destination is None or prefill.plan.revives):
                self._stash(index, prefill, hidden[rows] + residual[rows])
            if prefill.destination is None:
                continue
            chosen = self._cuts.selected.pop(prefill.request_id)
            self._count(index, prefill, len(chosen))
            if prefill.plan.reads_again:
                again = replace(segment, count=len(chosen), prefill=_short_prompt(prefill, len(chosen)))
                parts.append(self._read_again(index, again, chosen))
                segments.append(again)
                continue
            picked = self._pick(prefill, hidden[rows], residual[rows], positions[rows], chosen)
            parts.append((torch.zeros_like(picked), picked, chosen))
            prefill = replace(prefill, count=len(chosen), start=0, positions=chosen)
            segments.append(replace(segment, count=len(chosen), prefill=prefill))
        self._lay_out(index, segments)
        if not parts:
            return hidden, residual
        late_hidden, late_residual, self._positions = (torch.cat(part) for part in zip(*parts, strict=True))
        return late_hidden, late_residual

    def _count(self, index: int, prefill: PrefillRows, num_rows: int) -> None:
        """The cuts of a prompt, and the rows that go on after its last."""
        if num_rows == prefill.plan.num_tokens:
            return  # rows come out of the stash, none is cut
        stats = self._stats
        stats.cut_layers[index] = stats.cut_layers.get(index, 0) + 1
        if num_rows == prefill.plan.cuts[-1][1]:
            stats.tsp_rows_out += num_rows
        logger.debug("request %s: %d of its rows go on after layer %d", prefill.request_id, num_rows, index)

    def _read_again(
        self, index: int, segment: _Segment, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the chosen tokens as a short prompt through the layers up to this one.

        Its entries go where they stay, into blocks of the prompt, of which these layers have no more need.

        Returns:
            Its rows after this layer: hidden, residual, positions.
        """
        prefill = segment.prefill
        assert prefill is not None and prefill.tokens is not None and prefill.positions is not None, "set with the plan"
        self._point([replace(segment, first=0)], range(index + 1))
        hidden, residual = self._embed(prefill.tokens[chosen]), None
        for forward in self._forwards[: index + 1]:
            hidden, residual = forward(prefill.positions, hidden, residual)
        assert residual is not None, "a layer has run"
        return hidden, residual, prefill.positions

    def _stash(self, index: int, prefill: PrefillRows, stream: torch.Tensor) -> None:
        stash, plan = self._cuts.stash, prefill.plan
        if prefill.request_id not in stash:
            num_sets = plan.num_stash_rows // plan.num_tokens
            stash[prefill.request_id] = stream.new_empty(num_sets, plan.num_tokens, stream.shape[1])
        own = slice(prefill.start, prefill.start + prefill.count)
        cut = [layer for layer, _ in plan.cuts].index(index) if plan.revives else 0
        stash[prefill.request_id][cut][own if prefill.positions is None else prefill.positions] = stream

    def _pick(
        self,
        prefill: PrefillRows,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor,
    ) -> torch.Tensor:
        """Rows at positions `chosen` of the prompt's residual stream: this step has those at `positions`.

        The stash has all before them at a prompt's first cut; at later cuts there are none before.
        """
        if prefill.start:
            before = self._cuts.stash[prefill.request_id][0, : prefill.start]
            return gather_stream(before, hidden, residual, chosen)
        return gather_stream(hidden[:0], hidden, residual, torch.searchsorted(positions, chosen))

    def _lay_out(self, index: int, segments: Sequence[_Segment]) -> None:
        """Put these requests' rows one after the other, and point the layers after this one at that batch."""
        starts = accumulate((segment.count for segment in segments), initial=0)
        self._going = [segment.moved_to(first) for segment, first in zip(segments, starts, strict=False)]
        if segments:
            self._point(self._going, range(index + 1, len(self._layer_names)))

    def _point(self, segments: Sequence[_Segment], layers: range) -> None:
        """Make the batch of these rows that of these layers.

        The chosen rows of a prompt are cached densely from its first block on; its blocks hold nothing else in these
        layers yet, and compaction moves what stays to where decode expects it.
        """
        late = take_requests(self._view, [s.request for s in segments], [s.count for s in segments])
        slots = []
        for i, segment in enumerate(segments):
            if segment.prefill is None or not segment.is_late:
                slots.append(self._view.slot_mapping[self._segments[segment.request].rows])
                continue
            blocks = segment.prefill.blocks
            late.seq_lens[i] = late.seq_lens_cpu_upper_bound[i] = segment.count
            late.block_table_tensor[i, : len(blocks)] = blocks
            rank, block_size = torch.arange(segment.count), segment.prefill.plan.block_size
            slots.append(blocks[rank // block_size] * block_size + rank % block_size)
        late.slot_mapping = torch.cat(slots)
        prefills = tuple(s.prefill for s in segments if s.prefill is not None)
        decodes = tuple(s.decode for s in segments if s.decode is not None)
        held = self._builder.batch.held if self._builder.batch is not None else {}
        late_held = {i: held[s.request] for i, s in enumerate(segments) if s.request in held}
        metadata = self._builder.build_for(late, prefills, decodes, late_held)
        context = get_forward_context()
        for layer in layers:
            name = self._layer_names[layer]
            context.attn_metadata[name], context.slot_mapping[name] = metadata, late.slot_mapping


def _short_prompt(prefill: PrefillRows, num_tokens: int) -> PrefillRows:
    """A prompt's chosen tokens as a prompt of their own, in the blocks that the prompt keeps."""
    assert prefill.destination is not None, "the prompt ends"
    kept = torch.tensor(prefill.destination)
    blocks = torch.cat([kept, prefill.blocks[prefill.plan.num_whole_blocks :]])
    return replace(prefill, count=num_tokens, start=0, blocks=blocks, positions=torch.arange(num_tokens))


def segments_of(
    query_start: Sequence[int], prefills: Sequence[PrefillRows], decodes: Sequence[DecodeRows]
) -> list[_Segment]:
    """Rows of each request of a step.

    Args:
        query_start: first row of each request and the number of rows, [R + 1].
        prefills: requests with an unfinished prompt.
        decodes: compressed requests whose entries are rated.
    """
    unfinished = {prefill.first: prefill for prefill in prefills}
    finished = {decode.first: decode for decode in decodes}
    return [
        _Segment(i, first, end - first, unfinished.get(first), finished.get(first))
        for i, (first, end) in enumerate(pairwise(query_start))
    ]
