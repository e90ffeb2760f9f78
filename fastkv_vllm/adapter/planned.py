"""What a model runner does with the plan of each step, whichever of vLLM's two generations it is of."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import Batch, DecodeRows, PrefillRows
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.device import made_on
from fastkv_vllm.adapter.encoded import EncodedPages
from fastkv_vllm.adapter.kept import LastKept
from fastkv_vllm.adapter.kv_cache import CompressibleSpec
from fastkv_vllm.adapter.merged import Held, MergedPages
from fastkv_vllm.adapter.ragged import HeadPages
from fastkv_vllm.adapter.recipe import recipe_of
from fastkv_vllm.adapter.revival import RevivablePages, RevivalStep
from fastkv_vllm.adapter.step import Orders, attach_stats, orders_of
from fastkv_vllm.adapter.tsp import TSPStep, segments_of
from fastkv_vllm.adapter.wiring import STATUS_PLUGIN, measured_codecs
from fastkv_vllm.cache import StepPlan


@dataclass(frozen=True)
class StepRows:
    """The requests of a step, in the order of their rows.

    Fields:
        request_ids: of each.
        starts: first row of each, and the number of rows, [R + 1].
        num_computed: tokens of each that were cached before the step, [R].
    """

    request_ids: Sequence[str]
    starts: Sequence[int]
    num_computed: Sequence[int]


class PlannedRunner:
    """Stands before one of vLLM's runners. `start_compression` stands in for an initialiser.

    The runner says where its requests' blocks and tokens are, and calls: `_set_up` when the cache is there, `_obey` for
    each step, within it `_begin` before metadata are built, and `_forward` in the model's place.
    """

    device: torch.device
    vllm_config: Any
    attn_groups: list[list[Any]]
    get_model: Callable[[], Any]

    def start_compression(self) -> None:
        """Set up what compression holds; call once, after vLLM's own initialiser."""
        self._orders: Orders | None = None
        self._warms_up = False
        self._in_graph = False
        self._not_held: dict[tuple[str, int], HeadPages] = {}  # requests and null blocks, while graphs run

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Within it, vLLM makes up requests that no scheduler has planned: they are its alone."""
        self._warms_up = True
        yield
        self._warms_up = False

    @abstractmethod
    def _table(self, request_id: str) -> list[int]:
        """Ids of a request's blocks. The list is the runner's own: who changes it calls `_write_table`."""

    @abstractmethod
    def _write_table(self, request_id: str) -> None:
        """Bring a table that was changed, and is as long as before, to where vLLM reads it."""

    @abstractmethod
    def _tokens(self, request_id: str, count: int) -> torch.Tensor:
        """Ids of a request's first tokens, [count]."""

    def _set_up(self, kv_cache_config: KVCacheConfig) -> None:
        """Make what works on the cache that is there now."""
        self._require_our_classes(kv_cache_config)
        names = kv_cache_config.kv_cache_groups[0].layer_names
        self._layer_names = dict(sorted((extract_layer_index(name), name) for name in names))
        # Wherever a model of several parts keeps them: those that the attention with a cache lies in.
        paths = [name.partition(".self_attn.")[0] for name in self._layer_names.values()]
        self._decoder_layers = [self.get_model().get_submodule(path) for path in paths]
        attention = get_layers_from_vllm_config(self.vllm_config, Attention)
        kv_caches = [attention[name].kv_cache for name in self._layer_names.values()]
        self._builder = self.attn_groups[0][0].get_metadata_builder(0)
        layout = self._builder.page_layout(kv_caches[0].dtype)
        with made_on(self.device):
            codecs = measured_codecs(self.vllm_config)
        self.compressor = Compressor(kv_caches, layout, codecs)
        self._builder.compressor = self.compressor
        self._builder.takes_codes = all(
            layer.impl.alibi_slopes is None and not layer.impl.logits_soft_cap and layer.impl.sinks is None
            for layer in attention.values()
        )
        self.last_kept = LastKept(len(kv_caches))
        if STATUS_PLUGIN in (envs.VLLM_PLUGINS or ()):
            self.compressor.watch = self.last_kept.note

    def _let_go_of_cache(self) -> None:
        """Let go of a cache that graphs were profiled with, and of what was made for it."""
        for name in ("compressor", "_builder"):
            self.__dict__.pop(name, None)

    def _obey(self, scheduler_output: SchedulerOutput, execute: Callable[[], Any]) -> Any:
        """Run a step by its plan; `execute` is vLLM's own part of that."""
        if self._warms_up:
            return execute()
        orders = self._orders = orders_of(scheduler_output)
        plan = orders.plan
        with made_on(self.device):
            self.compressor.erase(plan.compressed)
        try:
            output = execute()
            if self._builder.batch is not None:
                with made_on(self.device):
                    self._encode(plan)
                    self.compressor.finish(self._builder.batch.prefills)
        finally:
            self._orders = None
            self._builder.batch = None
            self.compressor.end_step()
        self._rewrite_tables(plan)
        self.compressor.forget(plan.partial, plan.compressed)
        return output

    def _report(self, output: Any) -> None:
        """Let the output of a step, which may not have its tokens yet, say what was done in it."""
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            attach_stats(output, self.compressor.take_stats())

    def _rewrite_tables(self, plan: StepPlan) -> None:
        """Change requests' tables as the scheduler does."""
        for request_id, destination in (*plan.destinations.items(), *plan.streaming.items()):
            self._move_blocks(request_id, destination, plan)
        for request_id in plan.evicting:
            self._give_back(request_id, -1)
            held = self.compressor.held.get(request_id)
            if held is not None:
                self.compressor.held[request_id] = replace(held, num_whole=held.num_whole + 1)
        for request_id, stays in plan.encoding.items():
            if not stays:
                self._give_back(request_id, self.compressor.held[request_id].num_whole - 1)

    def _only_reads(self, request_ids: Iterable[str]) -> bool:
        """Whether all that a step of these requests asks of compression is that entries are read where they lie.

        A full graph runs none of our Python: where compression has more to do than read, the step is not for one.
        """
        assert self._orders is not None, "a step runs"
        held, evicted = self.compressor.held, self.compressor.evictor.requests
        return not any(
            rid in self._orders.plan.prefills
            or rid in evicted
            or isinstance(held.get(rid), EncodedPages | MergedPages | RevivablePages)
            for rid in request_ids
        )

    def _begin(self, rows: StepRows) -> None:
        """Tell the builder of metadata what the orders of the step mean for its rows."""
        assert self._orders is not None, "a step runs"
        self._rows = rows
        with made_on(self.device):
            batch = self._batch_in_graph(self._orders.plan) if self._in_graph else self._make_batch(self._orders)
        self._builder.batch = batch

    def _forward(self, forward: Callable[..., torch.Tensor], *args: Any, **inputs: Any) -> torch.Tensor:
        """Hidden states of the step's rows by vLLM's `forward`, whose layers go on the detours that the step asks for.

        Rows that come back run along in the layers of any batch. What has no orders, a dummy run, is vLLM's alone.
        """
        if self._orders is None:
            return forward(*args, **inputs)
        batch, tsp = self._builder.batch, self._tsp_step(self._builder.batch)
        with ExitStack() as detours:
            for step in (batch.revival, tsp):
                if step is not None:
                    detours.enter_context(step.detour())
                    detours.enter_context(made_on(self.device))
            hidden = forward(*args, **inputs)
            return hidden if tsp is None else tsp.scatter(hidden, inputs["positions"].shape[0])

    def _tsp_step(self, batch: Batch) -> TSPStep | None:
        """The way of rows that are cut in this step, whose metadata have just been built; None where none are."""
        if not any(prefill.plan.cuts for prefill in batch.prefills):
            return None
        return TSPStep(
            self.compressor,
            segments_of(self._rows.starts, batch.prefills, batch.decodes),
            self._builder,
            self._decoder_layers,
            self._layer_names,
            self.get_model().embed_input_ids,
        )

    def _shift_positions(self, positions: torch.Tensor, sign: int) -> None:
        """Move positions to those that RoPE is to see (-1) or back (1): rows after a prompt that was read again follow
        the short prompt.

        In place: captured graphs read them there, and vLLM writes them anew in each step.
        """
        assert self._orders is not None, "a step runs"
        plan, starts = self._orders.plan, self._rows.starts
        for row, request_id in enumerate(self._rows.request_ids if plan.renumbered else ()):
            if request_id in plan.renumbered:
                shift = plan.null_blocks[request_id] * self._builder.block_size
                positions[starts[row] : starts[row + 1]] += sign * shift

    def _make_batch(self, orders: Orders) -> Batch:
        """The step's orders in terms of the rows of the batch."""
        plan, rows = orders.plan, self._rows
        self._not_held.clear()
        prefills, decodes = [], []
        null_blocks: dict[int, int] = {}
        held: dict[int, Held] = {}
        for row, request_id in enumerate(rows.request_ids):
            if request_id in self.compressor.held and request_id in plan.null_blocks:
                held[row] = self.compressor.held[request_id]
            elif request_id in plan.null_blocks:
                null_blocks[row] = plan.null_blocks[request_id]
            if request_id in plan.null_blocks and request_id not in plan.prefills:
                decodes += self._decode_rows(row, plan)
            if request_id in plan.prefills:
                pages = held.get(row)
                assert pages is None or isinstance(pages, HeadPages), "a codec excludes stops within the prompt"
                prefills.append(self._prefill_rows(row, orders, pages))
        revivable = [pages for pages in held.values() if isinstance(pages, RevivablePages)]
        revival = RevivalStep(revivable, self._decoder_layers, self.compressor.stats) if revivable else None
        return Batch(tuple(prefills), tuple(decodes), null_blocks, held, self._builder.block_size, revival)

    def _batch_in_graph(self, plan: StepPlan) -> Batch:
        """The same of a step that a captured graph runs, where requests without pages of their own have none."""
        requests, before = self._rows.request_ids, self._not_held
        ours = {rid: pages for rid, pages in self.compressor.held.items() if rid in plan.null_blocks}
        places = {rid: (rid, plan.null_blocks.get(rid, 0)) for rid in requests if rid not in ours}
        self._not_held = {
            place: before.get(place) or HeadPages.none(self.compressor.pool, place[1]) for place in places.values()
        }
        held = {row: ours.get(rid) or self._not_held[places[rid]] for row, rid in enumerate(requests)}
        return Batch((), (), {}, held, self._builder.block_size, in_graph=True)

    def _prefill_rows(self, row: int, orders: Orders, held: HeadPages | None) -> PrefillRows:
        """The rows of a request with an unfinished prompt, which may hold pages since a stop before them."""
        plan, (first, end) = orders.plan, self._rows.starts[row : row + 2]
        request_id = self._rows.request_ids[row]
        prompt = plan.prefills[request_id]
        blocks = self._table(request_id)[: -(-prompt.num_tokens // self._builder.block_size)]
        return PrefillRows(
            request_id=request_id,
            plan=prompt,
            recipe=recipe_of(orders.configs[request_id]),
            first=first,
            count=end - first,
            start=self._rows.num_computed[row],
            blocks=torch.tensor(blocks, dtype=torch.int64),
            destination=plan.destinations.get(request_id),
            held=held,
            streaming=plan.streaming.get(request_id),
            tokens=self._prompt_tokens(request_id, prompt.num_tokens) if prompt.reads_again else None,
        )

    def _decode_rows(self, row: int, plan: StepPlan) -> list[DecodeRows]:
        """The rows of a compressed request where it evicts and they matter to that, or none."""
        evictor, block_size = self.compressor.evictor, self._builder.block_size
        request_id = self._rows.request_ids[row]
        if request_id not in evictor.requests:
            return []
        first, end = self._rows.starts[row : row + 2]
        num_tokens = self._rows.num_computed[row] + end - first
        rows = DecodeRows(
            request_id=request_id,
            first=first,
            count=end - first,
            block=self._table(request_id)[(num_tokens - 1) // block_size],
            num_filled=(num_tokens - 1) % block_size + 1,
            evicts=request_id in plan.evicting,
        )
        return [rows] if evictor.concerns(rows) else []

    def _prompt_tokens(self, request_id: str, count: int) -> torch.Tensor:
        """Ids of a request's prompt tokens, [P] int64."""
        return self._tokens(request_id, count).to(self.device, torch.int64)

    def _move_blocks(self, request_id: str, destination: list[int], plan: StepPlan) -> None:
        """Put null blocks and kept blocks into the request's table; surplus ones are null."""
        held = self.compressor.held.get(request_id)
        num_whole = plan.prefills[request_id].num_whole_blocks if held is None else held.num_whole
        kept = destination[self.compressor.stats.surplus.get(request_id, 0) :]
        self._table(request_id)[:num_whole] = [0] * (num_whole - len(kept)) + kept
        self._write_table(request_id)

    def _encode(self, plan: StepPlan) -> None:
        """Encode the blocks that have left their request's residual window."""
        for request_id, stays in plan.encoding.items():
            held = self.compressor.held[request_id]
            self.compressor.encode(request_id, self._table(request_id)[held.num_whole], stays)

    def _give_back(self, request_id: str, number: int) -> None:
        """Take a block from the request's table and put a null block before it."""
        table = self._table(request_id)
        table.pop(number)
        table.insert(0, 0)
        self._write_table(request_id)

    def _require_our_classes(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse to serve where vLLM has built something else than what compression was written for."""
        groups, layers = kv_cache_config.kv_cache_groups, get_layers_from_vllm_config(self.vllm_config, Attention)
        impls = {
            name: type(layer.impl).__name__
            for name, layer in layers.items()
            if not isinstance(layer.impl, CompressionAttentionImpl)
        }
        scales = [getattr(layer, f"_{part}_scale").numel() for layer in layers.values() for part in "qkv"]
        spec = groups[0].kv_cache_spec if groups else None
        problems = {
            "one KV-cache group": (len(groups) == 1 and len(self.attn_groups[0]) == 1, f"{len(groups)} groups"),
            "specification CompressibleSpec": (type(spec) is CompressibleSpec, type(spec).__name__),
            "unpadded pages": (getattr(spec, "page_size_padded", None) is None, "padded pages"),
            "attention CompressionAttentionImpl": (not impls, str(impls)),
            "one scale for all heads of a layer": (set(scales) == {1}, f"{max(scales, default=0)}"),
        }
        if not impls and len(groups) == 1:
            builder = self.attn_groups[0][0].get_metadata_builder(0)
            problems["builder CompressionMetadataBuilder"] = (
                isinstance(builder, CompressionMetadataBuilder),
                type(builder).__name__,
            )
            problems["kernel blocks of the manager's size"] = (
                builder.block_size == getattr(spec, "block_size", None),
                f"{builder.block_size}",
            )
        broken = [f"needs {what}, got {found}" for what, (holds, found) in problems.items() if not holds]
        if broken:
            raise RuntimeError("compression cannot run on what vLLM has built: " + "; ".join(broken))
