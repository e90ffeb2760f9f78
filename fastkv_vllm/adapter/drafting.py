"""Tokens drafted by the served model itself, from a coarser view of what it holds; vLLM verifies them.

vLLM's speculative decoding asks a proposer for tokens after each step and runs the model over them in the next one,
which reads all bits as ever; its rejection sampler keeps those that it would have sampled itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from fastkv_vllm.adapter.batch import take_requests
from fastkv_vllm.adapter.device import made_on
from fastkv_vllm.adapter.encoded import EncodedPages

if TYPE_CHECKING:
    from fastkv_vllm.adapter.runner import CompressionRunner


class SelfDrafter:
    """vLLM's proposer of a class of one's own, which `--speculative-config` names.

    Drafts are for requests that are decoded greedily and whose entries have a coarser view. Keys and values of a draft
    go where the next step, which computes them anew, writes them too: into the blocks that the request has. Near the
    end of its last block, and of its answer, fewer tokens are drafted.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert vllm_config.speculative_config is not None, "it names this class"
        self._vllm_config = vllm_config
        self._most = vllm_config.speculative_config.num_speculative_tokens
        self._runner: CompressionRunner | None = None

    def load_model(self, model: nn.Module) -> None:
        """vLLM asks for a model of the drafter's own: there is none."""

    def start(self, runner: "CompressionRunner") -> None:
        """Draft with this runner's model, whose cache is there."""
        self._runner = runner

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft tokens of each request of the step that has just run.

        Args:
            sampled_token_ids: its new tokens by row of the batch; none where its prompt goes on.
            num_tokens_no_spec: tokens it has, these among them.
            token_ids_cpu, slot_mappings: of that step; not needed.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        counts = [
            self._num_drafts(row, int(num_tokens_no_spec[row])) if tokens else 0
            for row, tokens in enumerate(sampled_token_ids)
        ]
        for number in range(max(counts, default=0)):
            rows = [row for row, count in enumerate(counts) if count > number]
            last = [(drafts[row] or sampled_token_ids[row])[-1] for row in rows]
            positions = [int(num_tokens_no_spec[row]) - 1 + number for row in rows]
            for row, token in zip(rows, self._next_tokens(rows, last, positions), strict=True):
                drafts[row].append(token)
        return drafts

    def _num_drafts(self, row: int, num_tokens: int) -> int:
        """Tokens to draft for a request with so many tokens, of which the last is not in the cache."""
        runner = self._runner
        assert runner is not None, "set up with the cache"
        request_id, held = runner.input_batch.req_ids[row], self._pages(row)
        if held is None or request_id not in runner.input_batch.greedy_reqs:
            return 0
        request = runner.requests[request_id]
        assert request.sampling_params is not None, "it samples"
        num_slots = len(request.block_ids[0]) * runner.compressor.layout.block_size
        left = request.sampling_params.max_tokens - len(request.output_token_ids)
        # The step that verifies them adds a token of its own.
        return max(0, min(held.draft_tokens, self._most, num_slots - (num_tokens - 1), left - 1))

    def _pages(self, row: int) -> EncodedPages | None:
        """Encoded pages of a request, if it has some."""
        assert self._runner is not None, "set up with the cache"
        held = self._runner.compressor.held.get(self._runner.input_batch.req_ids[row])
        return held if isinstance(held, EncodedPages) else None

    def _next_tokens(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The likeliest token after one token each of some requests, by the coarser view.

        Args:
            rows: of the batch of the step that has just run.
            tokens: the last of each.
            positions: their places in the text.
        """
        runner = self._runner
        assert runner is not None, "set up with the cache"
        builder, size = runner._builder, runner.compressor.layout.block_size
        with made_on(runner.device):
            at = torch.tensor(positions)
            view: Any = take_requests(builder.view, rows, [1] * len(rows))
            view.seq_lens[:] = at + 1
            view.seq_lens_cpu_upper_bound[:] = at.cpu() + 1
            view.max_seq_len = max(positions) + 1
            blocks = view.block_table_tensor.gather(1, (at // size).unsqueeze(1)).squeeze(1)
            view.slot_mapping = blocks.to(torch.int64) * size + at % size
            held = {i: pages.draft_view for i, row in enumerate(rows) if (pages := self._pages(row)) is not None}
            metadata = builder.build_for(view, (), (), held)
            ids = torch.tensor(tokens, dtype=torch.int32)  # as vLLM has them: what it compiles knows no other
        names = runner._layer_names.values()
        slots = dict.fromkeys(names, view.slot_mapping)
        context = dict.fromkeys(names, metadata)
        with set_forward_context(context, self._vllm_config, num_tokens=len(rows), slot_mapping=slots):
            hidden = runner._model_forward(input_ids=ids, positions=at)
        return runner.model.compute_logits(hidden).argmax(dim=-1).tolist()


class DraftVerifier(RejectionSampler):
    """vLLM's rejection sampler where greedy requests alone have drafts.

    Drafts are held against the likeliest tokens whatever else is in the batch. vLLM divides by temperatures there
    first, which its CPU form (0.32) leaves unset. What other requests sample is the ordinary sampler's matter, as ever.
    """

    sampler: "BatchSampler"

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> "DraftVerifier":
        model = vllm_config.model_config
        sampler = BatchSampler(model.logprobs_mode, model.use_fp64_gumbel)
        return cls(sampler, vllm_config.speculative_config, device)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        self.sampler.batch = sampling_metadata
        as_greedy = replace(sampling_metadata, all_greedy=True, all_random=False)
        return super().forward(metadata, draft_probs, logits, as_greedy)


class BatchSampler(Sampler):
    """Samples the token behind the drafts, or the only one, as the batch's requests ask."""

    batch: SamplingMetadata

    def forward(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        batch = self.batch
        mixed = replace(sampling_metadata, all_greedy=batch.all_greedy, all_random=batch.all_random)
        return super().forward(logits, mixed, *args, **kwargs)
