"""vLLM's model runners of the second generation (V2) with compression.

| matter            | V1                            | V2                                                      |
|-------------------|-------------------------------|---------------------------------------------------------|
| a request's table | on the host, copied each step | on the device alone: its ids are kept here beside it    |
| the model         | called by a method            | called in the middle of one: its `forward` is replaced  |
| positions         | the model's                   | the sampler's, too: they are put back after the model   |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from fastkv_vllm.adapter.planned import PlannedRunner, StepRows


class CompressionRunnerV2(PlannedRunner, GPUModelRunner):
    """Obeys the plan of each step; its rows are those of the batch that vLLM makes for it."""

    def start_compression(self) -> None:
        super().start_compression()
        self._tables: dict[str, list[int]] = {}

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model.forward = partial(self._forward, self.model.forward)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._set_up(kv_cache_config)

    def capture_model(self, *, profile_only: bool = False) -> int:
        num_bytes = super().capture_model(profile_only=profile_only)
        if profile_only:
            self._let_go_of_cache()
        return num_bytes

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, dummy_run: bool = False, **kwargs: Any
    ) -> Any:
        execute = partial(super().execute_model, scheduler_output, *args, dummy_run=dummy_run, **kwargs)
        if dummy_run:
            return execute()
        return self._obey(scheduler_output, partial(self._execute, execute))

    def _execute(self, execute: Callable[[], Any]) -> Any:
        output = execute()
        if self._orders is not None and self.execute_model_state is not None:
            self._shift_positions(self.execute_model_state.input_batch.positions, 1)
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        self._report(output.model_runner_output if isinstance(output, AsyncOutput) else output)
        return output

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> tuple[Any, int | None]:
        state, uniform_token_count = super().gather_batch_req_state(scheduler_output, dummy_run)
        if self._orders is not None and not self._only_reads(scheduler_output.num_scheduled_tokens):
            uniform_token_count = None
        return state, uniform_token_count

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        *args: Any,
        **kwargs: Any,
    ) -> InputBatch:
        self._in_graph = batch_desc.cg_mode == CUDAGraphMode.FULL
        return super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, *args, **kwargs)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        prepared = super().prepare_attn(input_batch)  # slots follow from true positions
        if self._orders is not None:
            starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1].tolist()
            self._begin(StepRows(input_batch.req_ids, starts, input_batch.num_computed_tokens_np.tolist()))
            self._shift_positions(input_batch.positions, -1)
        return prepared

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self._tables[request.req_id] = list(request.block_ids[0])

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        requests = scheduler_output.scheduled_cached_reqs
        for request_id, blocks in zip(requests.req_ids, requests.new_block_ids, strict=True):
            if blocks is not None:
                self._tables[request_id] += blocks[0]

    def _remove_request(self, req_id: str) -> bool:
        self._tables.pop(req_id, None)
        return super()._remove_request(req_id)

    def _table(self, request_id: str) -> list[int]:
        return self._tables[request_id]

    def _write_table(self, request_id: str) -> None:
        # Not staged as vLLM's writes are: the next step may give the row to another request and stage a write of its.
        table = torch.tensor(self._tables[request_id], dtype=torch.int32)
        rows = self.block_tables.block_tables[0].gpu
        rows[self.req_states.req_id_to_index[request_id], : len(table)] = table.to(self.device)

    def _tokens(self, request_id: str, count: int) -> torch.Tensor:
        return self.req_states.all_token_ids.gpu[self.req_states.req_id_to_index[request_id], :count]


class CPUCompressionRunnerV2(CompressionRunnerV2, CPUModelRunner): ...
