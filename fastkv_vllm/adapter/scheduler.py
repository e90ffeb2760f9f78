"""vLLM's schedulers, with a plan for each prompt that ends."""

import logging
import time
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from fastkv_vllm.adapter.choice import NONE, Choice
from fastkv_vllm.adapter.kv_cache import CompressingManager
from fastkv_vllm.adapter.metrics import encode_stats
from fastkv_vllm.adapter.request import context_tokens, tokens_after_image
from fastkv_vllm.adapter.step import (
    CompressionStats,
    Orders,
    PromptStats,
    WorkerStats,
    attach_orders,
    orders_of,
    stats_of,
)
from fastkv_vllm.adapter.wiring import compression_config
from fastkv_vllm.cache import LeftAlone, PromptPlan, StepPlan
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import UNIFORM

logger = logging.getLogger("vllm.fastkv")

REPORT = "fastkv"  # key of an answer's kv_transfer_params
_INTEGRITY_PERIOD_S = 60.0  # the full check walks the whole pool


class _CompressionMixin(Scheduler):
    """Ends chunks where entries are chosen, frees in the same step the blocks that do not stay, sends the orders.

    Entries are chosen at the prompt's end, where heads stream at stops within it, too, and where entries are evicted
    while decoding at each block's end after it; where they are encoded then, at each block's end a residual window
    later.

    `totals` counts since start-up; tests and the idle check read it. What was done for a request goes out with its last
    output, in the field that vLLM's answers have for KV transfer, which compression excludes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compression = compression_config(self.vllm_config)
        self._choice = Choice(self.vllm_config, self.compression)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or type(managers[0]) is not CompressingManager:
            raise RuntimeError(
                "compression needs one KV-cache group of full attention, managed by CompressingManager; got "
                f"{[type(manager).__name__ for manager in managers]}"
            )
        self.manager: CompressingManager = managers[0]
        if self.num_spec_tokens:
            # As many at any size of the batch. Without such a table vLLM fills up a prompt of one token, or of which
            # one is not cached, with drafts that nobody made.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.totals = CompressionStats()
        self._unreported = CompressionStats()
        self._reports: dict[str, dict[str, str | int | float]] = {}  # request -> what was done for it
        self._next_integrity_check = 0.0

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        blocks, num_hit, *rest = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        plan = self._plan(request)
        if isinstance(plan, PromptPlan):
            # The voters' queries must be computed, a resumed request must pass its prompt's end again, and from its
            # first stop on a prompt is not read as others read it.
            limit = min(plan.num_tokens - plan.num_voters, plan.stops[0] - 1) // plan.block_size * plan.block_size
            if num_hit > limit:
                blocks, num_hit = self.kv_cache_manager.truncate_computed_blocks(blocks, limit), limit
        return (blocks, num_hit, *rest)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id in self.manager.ended:
            known = self.manager.plans[request.request_id]
            # Where rows come back each token chooses anew what the next one finds.
            limit = 1 if known.revives else known.until_next_block(num_computed_tokens)
            return num_new_tokens if limit is None else min(num_new_tokens, limit)
        if num_computed_tokens >= request.num_prompt_tokens:
            return num_new_tokens
        plan = self.manager.plans.get(request.request_id) or self._plan(request)
        if isinstance(plan, LeftAlone) or num_computed_tokens >= plan.num_tokens:
            return num_new_tokens
        self.manager.plans[request.request_id] = plan
        num_new_tokens = min(num_new_tokens, plan.stop_after(num_computed_tokens) - num_computed_tokens)
        # vLLM may yet shorten a chunk before an image that its encoder has no room for.
        ends = num_computed_tokens + num_new_tokens == plan.num_tokens and not request.has_encoder_inputs
        has_rows = plan.has_stash and (plan.revives or not ends)
        if has_rows and request.request_id not in self.manager.stashing:
            limit = self.compression.max_tsp_tokens
            assert limit is not None, "filled in by CompressionConfig.for_model"
            if self.manager.num_stash_rows() + plan.num_stash_rows > limit:
                return 0  # waits until another prompt or request has ended; one always fits
        return num_new_tokens

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        compressed = {rid: self.manager.null_blocks[rid] for rid in scheduled if rid in self.manager.null_blocks}
        prefills: dict[str, PromptPlan] = {}
        for rid in scheduled:
            if rid in self.manager.plans and rid not in self.manager.ended:
                prefills[rid] = self.manager.plans[rid]
            elif rid not in self.manager.plans:
                self._count_left_alone(self.requests[rid], scheduled[rid])
        super()._update_after_schedule(scheduler_output)
        reached = {rid: plan.stop_at(self.requests[rid].num_computed_tokens) for rid, plan in prefills.items()}
        stayed = self.manager.compress({rid: stop for rid, stop in reached.items() if stop is not None})
        destinations = {rid: blocks for rid, blocks in stayed.items() if rid in self.manager.ended}
        for rid in destinations:
            self._count_compressed(rid, prefills[rid])
        giving = {rid for rid in compressed.keys() - prefills.keys() if self._gives_up_a_block(rid)}
        evicting = frozenset(rid for rid in giving if self.manager.plans[rid].evicts)
        self.manager.evict(evicting)
        encoding = self.manager.encode({rid: self.requests[rid].num_computed_tokens for rid in giving - evicting})
        for rid in (*evicting, *(rid for rid, stays in encoding.items() if not stays)):
            self._count_prompts(self._config(self.requests[rid]), PromptStats(decode_blocks_freed=1))
        plan = StepPlan(
            prefills=prefills,
            destinations=destinations,
            streaming={rid: blocks for rid, blocks in stayed.items() if rid not in destinations},
            null_blocks=compressed,
            partial=frozenset(self.manager.plans.keys() - self.manager.ended),
            compressed=frozenset(self.manager.null_blocks),
            evicting=evicting,
            encoding=encoding,
            renumbered=frozenset(rid for rid in compressed if self.manager.plans[rid].reads_again),
        )
        attach_orders(scheduler_output, Orders(plan, {rid: self._config(self.requests[rid]) for rid in prefills}))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        stats = stats_of(model_runner_output)
        if stats is not None:
            self.totals.add_worker(stats)
            self._unreported.add_worker(stats)
            self._settle(orders_of(scheduler_output), stats)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.has_unfinished_requests():
            # Workers drop the rows of the last request with the step that tells them of its end.
            self.totals.worker.stash_bytes = self._unreported.worker.stash_bytes = 0
            self._check_idle()
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            encode_stats(stats, self._unreported)
            self._unreported = CompressionStats()
            self._unreported.worker.stash_bytes = self.totals.worker.stash_bytes
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, Any]:
        _, *more = super()._free_request(request, *args, **kwargs)
        report = self._reports.pop(request.request_id, None)
        return (None if report is None else {REPORT: report}, *more)

    def _check_idle(self) -> None:
        """Without requests: all blocks free at once, and every block accounted for now and then."""
        self.manager.check_idle()
        if time.monotonic() >= self._next_integrity_check:
            self.manager.check_integrity()
            self._next_integrity_check = time.monotonic() + _INTEGRITY_PERIOD_S

    def _config(self, request: Request) -> CompressionConfig:
        config = self._choice.of(request.sampling_params)
        assert config is not None, f"{request.request_id} wants no compression and has a plan"
        return config

    def _plan(self, request: Request) -> PromptPlan | LeftAlone:
        if request.streaming_queue is not None:
            return LeftAlone.SESSION
        config = self._choice.of(request.sampling_params)
        if config is None:
            return LeftAlone.REQUESTED
        num_tokens = context_tokens(request.sampling_params, request.num_prompt_tokens)
        num_after_image = tokens_after_image(request.mm_features, num_tokens)
        plan = config.plan(num_tokens, self.manager.block_size, num_after_image, self._choice.entry)
        if isinstance(plan, LeftAlone) or config.head_budgets == UNIFORM:
            return plan
        return replace(plan, num_ranks=self.vllm_config.parallel_config.tensor_parallel_size)

    def _gives_up_a_block(self, request_id: str) -> bool:
        """Whether a block of a compressed request is evicted or encoded after the step just scheduled."""
        num_tokens = self.requests[request_id].num_computed_tokens
        return self.manager.plans[request_id].until_next_block(num_tokens) == self.manager.block_size

    def _settle(self, orders: Orders, stats: WorkerStats) -> None:
        """Give back what the prompts that ended in a step did not need of their budget, now that its worker knows."""
        for rid, destination in orders.plan.destinations.items():
            num_blocks = self.manager.settle(rid, destination, stats.surplus.get(rid, 0))
            plan = orders.plan.prefills[rid]
            kept = stats.fewer_pages.get(rid, plan.num_pages) * plan.block_size + plan.num_tail
            report = self._reports.get(rid, {})  # else it has ended meanwhile
            report["prompt_tokens_kept"] = kept
            prompts = PromptStats(prompt_tokens_kept=kept, blocks_freed=num_blocks)
            if rid in stats.recalls:
                floor, (planned, recall) = orders.configs[rid].min_attention_recall, stats.recalls[rid]
                assert floor is not None, "only then is there a guard"
                prompts.guard_triggers, prompts.guard_shortfalls = int(planned < floor), int(recall < floor)
                report["attention_recall"] = round(recall, 4)
            self._count_prompts(orders.configs[rid], prompts)
            if num_blocks:
                logger.debug("request %s: %d more blocks freed than its plan said", rid, num_blocks)

    def _count_compressed(self, request_id: str, plan: PromptPlan) -> None:
        config = self._config(self.requests[request_id])
        self._reports[request_id] = {
            "method": config.method,
            "prompt_tokens_seen": plan.num_tokens,
            "prompt_tokens_kept": plan.num_kept,
        }
        self._count_prompts(config, PromptStats(1, plan.num_tokens, blocks_freed=plan.num_freed_blocks))
        logger.debug(
            "%s: request %s compressed from %d to %d entries per head, rows after layers: at most %s, %d blocks freed",
            config.method,
            request_id,
            plan.num_tokens,
            plan.num_kept,
            dict(plan.cuts),
            plan.num_freed_blocks,
        )

    def _count_prompts(self, config: CompressionConfig, prompts: PromptStats) -> None:
        for stats in (self.totals, self._unreported):
            stats.add_prompts(config.method, prompts)

    def _count_left_alone(self, request: Request, num_scheduled: int) -> None:
        before, prompt = request.num_computed_tokens, request.num_prompt_tokens
        if before < prompt <= before + num_scheduled:
            reason = self._plan(request)
            assert isinstance(reason, LeftAlone), f"{request.request_id} ends its prompt without its plan {reason}"
            self._reports[request.request_id] = {"method": NONE, "left_alone": reason.value}
            for stats in (self.totals, self._unreported):
                stats.left_alone[reason.value] = stats.left_alone.get(reason.value, 0) + 1


class CompressionScheduler(_CompressionMixin, Scheduler):
    """vLLM's synchronous scheduler with compression."""


class AsyncCompressionScheduler(_CompressionMixin, AsyncScheduler):
    """vLLM's run-ahead scheduler with compression."""


__all__ = ["AsyncCompressionScheduler", "CompressionScheduler"]
