"""vLLM's model runners of the first generation (V1) with compression."""

from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, GPUModelRunner

from fastkv_vllm.adapter.drafting import DraftVerifier, SelfDrafter
from fastkv_vllm.adapter.planned import PlannedRunner, StepRows


class CompressionRunner(PlannedRunner, GPUModelRunner):
    """Obeys the plan of each step; its rows are those of vLLM's persistent batch."""

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._set_up(kv_cache_config)
        if self.speculative_config is not None:
            assert isinstance(self.drafter, SelfDrafter), "all others are refused"
            self.drafter.start(self)
            self.rejection_sampler = DraftVerifier.of(self.vllm_config, self.device)

    def _cleanup_profiling_kv_cache(self) -> None:
        self._let_go_of_cache()
        super()._cleanup_profiling_kv_cache()

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        return self._obey(scheduler_output, partial(super().execute_model, scheduler_output, *args, **kwargs))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        # Of a step whose tokens are still on their way from the GPU, what they will be filled into.
        self._report(output._model_runner_output if isinstance(output, AsyncGPUModelRunnerOutput) else output)
        return output

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._orders is not None and not self._only_reads(self.input_batch.req_ids):
            kwargs["force_uniform_decode"] = False
        execution = super()._determine_batch_execution_and_padding(*args, **kwargs)
        self._in_graph = execution[0] == CUDAGraphMode.FULL
        return execution

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        return True  # it looks at what each request has left

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, CommonAttentionMetadata | None]:
        if self._orders is not None:
            batch = self.input_batch
            starts = self.query_start_loc.np[: batch.num_reqs + 1].tolist()
            computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
            self._begin(StepRows(batch.req_ids, starts, computed))
        return super()._build_attention_metadata(*args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._orders is not None:
            self._shift_positions(kwargs["positions"], -1)
        return self._forward(super()._model_forward, *args, **kwargs)

    def _table(self, request_id: str) -> list[int]:
        return self.requests[request_id].block_ids[0]

    def _write_table(self, request_id: str) -> None:
        table, row = self._table(request_id), self.input_batch.req_id_to_index[request_id]
        self.input_batch.block_table[0].block_table.np[row, : len(table)] = table

    def _tokens(self, request_id: str, count: int) -> torch.Tensor:
        row = self.input_batch.req_id_to_index[request_id]
        return torch.from_numpy(self.input_batch.token_ids_cpu[row, :count])


class CPUCompressionRunner(CompressionRunner, CPUModelRunner):
    """Also keeps what vLLM's runner for CPUs lets end the engine: a seeded request whose prompt comes in chunks."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        # A row whose prompt is not over is sampled, too, and thrown away. vLLM then rewinds the request's generator by
        # a number of Philox's, which those of CPUs do not have; here such a row draws from the common one.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        unused = {row: generators.pop(row) for row in discarded if row in generators}
        output = super().sample_tokens(*args, **kwargs)
        generators.update(unused)
        return output
