"""vLLM's model runners (V1) with compression."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from vllm import envs
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, GPUModelRunner

from fastkv_vllm.adapter.attention import CompressionAttentionImpl, CompressionMetadataBuilder
from fastkv_vllm.adapter.batch import Batch, DecodeRows, PrefillRows
from fastkv_vllm.adapter.compressor import Compressor
from fastkv_vllm.adapter.device import made_on
from fastkv_vllm.adapter.drafting import DraftVerifier, SelfDrafter
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
from fastkv_vllm.cache import PromptPlan, StepPlan


class CompressionRunner(GPUModelRunner):
    """Obeys the plan of each step. `start_compression` stands in for an initialiser."""

    def start_compression(self) -> None:
        """Set up what compression holds; call once, after vLLM's own initialiser."""
        self._orders: Orders | None = None
        self._tsp: TSPStep | None = None
        self._in_graph = False
        self._not_held: dict[tuple[str, int], HeadPages] = {}  # requests and null blocks, while graphs run

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._require_our_classes(kv_cache_config)
        self._builder = self.attn_groups[0][0].get_metadata_builder(0)
        layout = self._builder.page_layout(self.kv_caches[0].dtype)
        with made_on(self.device):
            codecs = measured_codecs(self.vllm_config)
        self.compressor = Compressor(self.kv_caches, layout, codecs)
        self._builder.compressor = self.compressor
        self._builder.takes_codes = all(
            layer.impl.alibi_slopes is None and not layer.impl.logits_soft_cap and layer.impl.sinks is None
            for layer in get_layers_from_vllm_config(self.vllm_config, Attention).values()
        )
        if self.speculative_config is not None:
            assert isinstance(self.drafter, SelfDrafter), "all others are refused"
            self.drafter.start(self)
            self.rejection_sampler = DraftVerifier.of(self.vllm_config, self.device)
        self.last_kept = LastKept(len(self.kv_caches))
        if STATUS_PLUGIN in (envs.VLLM_PLUGINS or ()):
            self.compressor.watch = self.last_kept.note
        names = kv_cache_config.kv_cache_groups[0].layer_names
        self._layer_names = {extract_layer_index(name): name for name in names}
        # Wherever a model of several parts keeps them: those that the attention with a cache lies in.
        paths = [self._layer_names[index].partition(".self_attn.")[0] for index in sorted(self._layer_names)]
        self._decoder_layers = [self.get_model().get_submodule(path) for path in paths]

    def _cleanup_profiling_kv_cache(self) -> None:
        """Let go of the cache that graphs were profiled with, and of what was made for it: vLLM frees it here."""
        for name in ("compressor", "_builder"):
            self.__dict__.pop(name, None)
        super()._cleanup_profiling_kv_cache()

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        orders = self._orders = orders_of(scheduler_output)
        plan = orders.plan
        with made_on(self.device):
            self.compressor.erase(plan.compressed)
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            if self._builder.batch is not None:
                with made_on(self.device):
                    self._encode(plan)
                    self.compressor.finish(self._builder.batch.prefills)
        finally:
            self._orders, self._tsp = None, None
            self._builder.batch = None
            self.compressor.end_step()
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
        self.compressor.forget(plan.partial, plan.compressed)
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        # Of a step whose tokens are still on their way from the GPU, what they will be filled into.
        filled = output._model_runner_output if isinstance(output, AsyncGPUModelRunnerOutput) else output
        if isinstance(filled, ModelRunnerOutput) and filled.req_ids:
            attach_stats(filled, self.compressor.take_stats())
        return output

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        """A full graph runs none of our Python: where compression has more to do than read, the step is not for one."""
        if self._orders is not None and not self._only_reads(self._orders.plan):
            kwargs["force_uniform_decode"] = False
        execution = super()._determine_batch_execution_and_padding(*args, **kwargs)
        self._in_graph = execution[0] == CUDAGraphMode.FULL
        return execution

    def _only_reads(self, plan: StepPlan) -> bool:
        """Whether all that a step asks of compression is that entries are read where they lie."""
        held, evicted = self.compressor.held, self.compressor.evictor.requests
        return not any(
            rid in plan.prefills
            or rid in evicted
            or isinstance(held.get(rid), EncodedPages | MergedPages | RevivablePages)
            for rid in self.input_batch.req_ids
        )

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        return True  # it looks at what each request has left

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, CommonAttentionMetadata | None]:
        if self._orders is None:  # a dummy run
            return super()._build_attention_metadata(*args, **kwargs)
        with made_on(self.device):
            batch = self._batch_in_graph(self._orders.plan) if self._in_graph else self._make_batch(self._orders)
        self._builder.batch = batch
        metadata = super()._build_attention_metadata(*args, **kwargs)
        if any(prefill.plan.cuts for prefill in batch.prefills):
            num_reqs = self.input_batch.num_reqs
            starts = self.query_start_loc.np[: num_reqs + 1].tolist()
            segments = segments_of(starts, batch.prefills, batch.decodes)
            self._tsp = TSPStep(
                self.compressor,
                segments,
                self._builder,
                self._decoder_layers,
                self._layer_names,
                self.get_model().embed_input_ids,
            )
        return metadata

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._orders is not None and self._orders.plan.renumbered:
            self._renumber(kwargs["positions"], self._orders.plan)
        batch, tsp = self._builder.batch, self._tsp
        revival = None if batch is None else batch.revival
        with ExitStack() as detours:
            for step in (revival, tsp):  # rows that come back run along in the layers of any batch
                if step is not None:
                    detours.enter_context(step.detour())
                    detours.enter_context(made_on(self.device))
            hidden = super()._model_forward(*args, **kwargs)
            return hidden if tsp is None else tsp.scatter(hidden, kwargs["positions"].shape[0])

    def _renumber(self, positions: torch.Tensor, plan: StepPlan) -> None:
        """Make positions those that RoPE is to see: rows after a prompt that was read again follow the short prompt.

        In place: captured graphs read them there, and vLLM writes them anew in each step.
        """
        starts = self.query_start_loc.np
        for row, request_id in enumerate(self.input_batch.req_ids):
            if request_id in plan.renumbered:
                positions[starts[row] : starts[row + 1]] -= plan.null_blocks[request_id] * self._builder.block_size

    def _make_batch(self, orders: Orders) -> Batch:
        """The step's orders in terms of the rows of the persistent batch."""
        plan = orders.plan
        self._not_held.clear()
        block_size = self._builder.block_size
        starts = self.query_start_loc.np
        table = self.input_batch.block_table[0].get_cpu_tensor()
        prefills, decodes = [], []
        null_blocks: dict[int, int] = {}
        held: dict[int, Held] = {}
        for row, request_id in enumerate(self.input_batch.req_ids):
            if request_id in self.compressor.held and request_id in plan.null_blocks:
                held[row] = self.compressor.held[request_id]
            elif request_id in plan.null_blocks:
                null_blocks[row] = plan.null_blocks[request_id]
            if request_id in plan.null_blocks and request_id not in plan.prefills:
                decodes += self._decode_rows(row, request_id, plan)
            if request_id in plan.prefills:
                prompt, pages = plan.prefills[request_id], held.get(row)
                assert pages is None or isinstance(pages, HeadPages), "a codec excludes stops within the prompt"
                num_blocks = -(-prompt.num_tokens // block_size)
                prefills.append(
                    PrefillRows(
                        request_id=request_id,
                        plan=prompt,
                        recipe=recipe_of(orders.configs[request_id]),
                        first=int(starts[row]),
                        count=int(starts[row + 1] - starts[row]),
                        start=int(self.input_batch.num_computed_tokens_cpu[row]),
                        blocks=table[row, :num_blocks].to(self.device, torch.int64),
                        destination=plan.destinations.get(request_id),
                        held=pages,
                        streaming=plan.streaming.get(request_id),
                        tokens=self._prompt_tokens(row, prompt) if prompt.reads_again else None,
                    )
                )
        revivable = [pages for pages in held.values() if isinstance(pages, RevivablePages)]
        revival = RevivalStep(revivable, self._decoder_layers, self.compressor.stats) if revivable else None
        return Batch(tuple(prefills), tuple(decodes), null_blocks, held, block_size, revival)

    def _batch_in_graph(self, plan: StepPlan) -> Batch:
        """The same of a step that a captured graph runs, where requests without pages of their own have none."""
        requests, before = self.input_batch.req_ids, self._not_held
        ours = {rid: pages for rid, pages in self.compressor.held.items() if rid in plan.null_blocks}
        places = {rid: (rid, plan.null_blocks.get(rid, 0)) for rid in requests if rid not in ours}
        self._not_held = {
            place: before.get(place) or HeadPages.none(self.compressor.pool, place[1]) for place in places.values()
        }
        held = {row: ours.get(rid) or self._not_held[places[rid]] for row, rid in enumerate(requests)}
        return Batch((), (), {}, held, self._builder.block_size, in_graph=True)

    def _decode_rows(self, row: int, request_id: str, plan: StepPlan) -> list[DecodeRows]:
        """The rows of a compressed request where it evicts and they matter to that, or none."""
        evictor, block_size = self.compressor.evictor, self._builder.block_size
        if request_id not in evictor.requests:
            return []
        first, end = self.query_start_loc.np[row : row + 2].tolist()
        num_tokens = int(self.input_batch.num_computed_tokens_cpu[row]) + end - first
        rows = DecodeRows(
            request_id=request_id,
            first=first,
            count=end - first,
            block=int(self.input_batch.block_table[0].block_table.np[row, (num_tokens - 1) // block_size]),
            num_filled=(num_tokens - 1) % block_size + 1,
            evicts=request_id in plan.evicting,
        )
        return [rows] if evictor.concerns(rows) else []

    def _prompt_tokens(self, row: int, prompt: PromptPlan) -> torch.Tensor:
        """Ids of a request's prompt tokens, [P] int64."""
        ids = torch.from_numpy(self.input_batch.token_ids_cpu[row, : prompt.num_tokens])
        return ids.to(self.device, torch.int64)

    def _move_blocks(self, request_id: str, destination: list[int], plan: StepPlan) -> None:
        """Put null blocks and kept blocks into the request's table as the scheduler does; surplus ones are null."""
        held = self.compressor.held.get(request_id)
        num_whole = plan.prefills[request_id].num_whole_blocks if held is None else held.num_whole
        kept = destination[self.compressor.stats.surplus.get(request_id, 0) :]
        whole = [0] * (num_whole - len(kept)) + kept
        self.requests[request_id].block_ids[0][: len(whole)] = whole
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.block_table[0].block_table.np[row, : len(whole)] = whole

    def _encode(self, plan: StepPlan) -> None:
        """Encode the blocks that have left their request's residual window."""
        for request_id, stays in plan.encoding.items():
            held = self.compressor.held[request_id]
            block = self.requests[request_id].block_ids[0][held.num_whole]
            self.compressor.encode(request_id, block, stays)

    def _give_back(self, request_id: str, number: int) -> None:
        """Take a block from the request's table and put a null block before it, as the scheduler does."""
        table = self.requests[request_id].block_ids[0]
        table.pop(number)
        table.insert(0, 0)
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.block_table[0].block_table.np[row, : len(table)] = table

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


class CPUCompressionRunner(CompressionRunner, CPUModelRunner): ...
