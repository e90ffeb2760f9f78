"""A vLLM engine in this process, watched step by step."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(ENVIRONMENT)  # vLLM reads it when it is imported

from vllm import LLM, RequestOutput, SamplingParams  # noqa: E402

from fastkv_vllm.cache import PromptPlan  # noqa: E402
from fastkv_vllm.calibrate.artefact import make, save  # noqa: E402
from fastkv_vllm.config import CompressionConfig  # noqa: E402
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, most_off, plan_of, reference, tolerance  # noqa: E402
from tests.reference.images import engine_prompt  # noqa: E402


@dataclass(frozen=True)
class Preemption:
    """State of a request when it was preempted."""

    request_id: str
    num_computed_tokens: int
    num_prompt_tokens: int
    compressed: bool

    @property
    def prompt_ended(self) -> bool:
        return self.num_computed_tokens >= self.num_prompt_tokens


class Engine:
    """An in-process engine whose scheduler is watched; works with and without compression.

    Fields:
        before_schedule: called with the step's number before it is scheduled.
        after_schedule: called with vLLM's scheduler output; the pool's integrity has been checked by then.
        free_blocks: free blocks after each schedule.
        preemptions: in order of their time.
    """

    def __init__(
        self, checkpoint: Path, method: str | None = None, config: dict[str, Any] | None = None, **arguments: Any
    ) -> None:
        gc.freeze()  # vLLM collects several times; a million objects of modules need no look each time
        if method is not None:
            arguments |= {"kv_compression": method, "kv_compression_config": _with_file(config or {}, checkpoint)}
        defaults = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 4,
            "num_gpu_blocks_override": 300,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        self.llm = LLM(
            model=str(checkpoint),
            dtype="float32",
            block_size=BLOCK_SIZE,
            seed=0,
            **(defaults | arguments),
        )
        self.checkpoint = checkpoint
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.config = self.scheduler.compression if method else None
        self.before_schedule: list[Callable[[int], None]] = []
        self.after_schedule: list[Callable[[Any], None]] = []
        self.free_blocks: list[int] = []
        self.preemptions: list[Preemption] = []
        self._last_scheduled: deque[set[str]] = deque(maxlen=2)  # one may be in flight when another is scheduled
        self._num_free = self.pool.get_num_free_blocks()
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._watched_schedule
        self._preempt, self.scheduler._preempt_request = self.scheduler._preempt_request, self._watched_preempt

    def close(self) -> None:
        """End the engine and give its memory back: vLLM freezes the collector's view of all older objects."""
        with mock.patch("gc.collect"):  # vLLM's finds nothing while we hold the engine, and takes seconds
            self.core.shutdown()
        del self.scheduler.schedule, self.scheduler._preempt_request
        self.__dict__.clear()
        gc.unfreeze()
        gc.collect()

    @property
    def worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    @property
    def compressor(self) -> Any:
        return self.worker.model_runner.compressor

    @property
    def totals(self) -> Any:
        return self.scheduler.totals

    @contextmanager
    def step_tokens(self, limit: int) -> Iterator[None]:
        """Within it, a step takes at most so many tokens."""
        old = self.scheduler.max_num_scheduled_tokens
        self.scheduler.max_num_scheduled_tokens = min(limit, old)
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = old

    @contextmanager
    def watch(
        self, *, before: Callable[[int], None] | None = None, after: Callable[[Any], None] | None = None
    ) -> Iterator[None]:
        """Within it, `before` sees each step's number and `after` its scheduler output."""
        self.free_blocks.clear()
        self.preemptions.clear()
        self.before_schedule = [before] if before else []
        self.after_schedule = [after] if after else []
        try:
            yield
        finally:
            self.before_schedule, self.after_schedule = [], []

    @contextmanager
    def watch_held(self) -> Iterator[tuple[list[Any], list[int]]]:
        """Within it, the lists get the pages held by the requests of each step, and the blocks held after it."""
        held: list[Any] = []
        blocks: list[int] = []

        def look(output: Any) -> None:
            held.extend(pages for rid, pages in self.compressor.held.items() if rid in output.num_scheduled_tokens)
            blocks.append(sum(not block.is_null for table in self.manager.req_to_blocks.values() for block in table))

        with self.watch(after=look):
            yield held, blocks

    @contextmanager
    def watch_kept(self) -> Iterator[list[list[list[int]]]]:
        """Within it, the list gets the positions that stay of each KV head, layer by layer."""
        kept: list[list[list[int]]] = []
        self.compressor.watch = lambda prefill, layer, heads: kept.append([head.tolist() for head in heads])
        try:
            yield kept
        finally:
            self.compressor.watch = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        contexts: Sequence[int | None] | None = None,
        **parameters: Any,
    ) -> list[RequestOutput]:
        """Answers to the prompts; with `contexts` only so many leading tokens of each are compressed (None: all)."""
        extra = [None if n is None else {"kv_context_tokens": n} for n in contexts or [None] * len(prompts)]
        return self.llm.generate(
            [engine_prompt(prompt) for prompt in prompts],
            [sampling(max_tokens, extra_args=args, **parameters) for args in extra],
            use_tqdm=False,
        )

    def check(
        self, prompts: Sequence[tuple[int, ...]], max_tokens: int = 36, contexts: Sequence[int | None] | None = None
    ) -> list[RequestOutput]:
        """Generate and require the reference's answers, counters that tell what happened, and an idle engine.

        Prompts whose answer hangs on float noise get another last token.
        """
        contexts = contexts or [None] * len(prompts)
        prompts = [
            clear(self.checkpoint, self.config, prompt, max_tokens, num_context)
            for prompt, num_context in zip(prompts, contexts, strict=True)
        ]
        before, num_preempted = self._counts(), len(self.preemptions)
        outputs = self.generate(prompts, max_tokens, contexts)
        for prompt, output, num_context in zip(prompts, outputs, contexts, strict=True):
            self.require_reference(prompt, output, max_tokens, num_context)
        if self.config is not None:
            counts = [now - then for now, then in zip(self._counts(), before, strict=True)]
            # A prompt that had ended when it was preempted ends, and counts, once more.
            ended = [p.num_prompt_tokens for p in self.preemptions[num_preempted:] if p.prompt_ended]
            lengths = [num_context or len(prompt) for prompt, num_context in zip(prompts, contexts, strict=True)]
            plans = [plan_of(self.config, num_tokens) for num_tokens in [*lengths, *ended]]
            done = [plan for plan in plans if isinstance(plan, PromptPlan)]
            expected = [len(done), len(plans) - len(done), sum(plan.num_tokens for plan in done)]
            assert counts == expected, f"compressed, left alone, tokens seen: {counts}, expected {expected}"
        self.require_idle()
        return outputs

    def abort(self, request_id: str) -> list[RequestOutput]:
        """Abort a request and run the others to their end, then another one: the worker is told with its first step.

        Returns:
            Outputs of the others that finished.
        """
        llm, finished = self.llm.llm_engine, []
        llm.abort_request([request_id])
        self.manager.check_integrity()
        while llm.has_unfinished_requests():
            finished += [output for output in llm.step() if output.finished]
        self.check(make_prompts([150], seed=1), max_tokens=2)
        return finished

    def require_reference(
        self,
        prompt: tuple[int, ...],
        output: RequestOutput,
        max_tokens: int,
        num_context: int | None = None,
        config: CompressionConfig | str | None = "served",
    ) -> None:
        """The reference's tokens and logprobs, with the server's configuration or that of the request."""
        config = self.config if config == "served" else config
        expected = reference(self.checkpoint, config, prompt, max_tokens, num_context)
        where = f"prompt of {len(prompt)} tokens, {output.num_cached_tokens} of them from the prefix cache"
        tokens = list(output.outputs[0].token_ids)
        for step, (got, want) in enumerate(zip(tokens, expected.tokens, strict=True)):
            margin = expected.margins[step]
            assert got == want, f"{where}: token {step} is {got}, not {want}; margin {margin:.1e}"
        errors = [abs(a - b) for a, b in zip(logprobs_of(output), expected.logprobs, strict=True)]
        off = f"{where}: logprob of token {errors.index(max(errors))} is off {errors}"
        *others, worst = sorted(errors)
        assert worst < most_off(config) and max(others, default=0.0) < tolerance(config), off

    def require_idle(self) -> None:
        """No block, plan, window or stashed row is left behind."""
        assert not self.scheduler.has_unfinished_requests()
        assert self.pool.get_num_free_blocks() == self._num_free, "blocks did not come back"
        assert not any(self.manager.req_to_blocks.values()), "tables are left"
        if self.config is None:
            return
        self.manager.check_integrity()
        left = {
            name: value
            for name in ("plans", "null_blocks", "ended", "unsettled", "stopping", "stashing")
            if (value := getattr(self.manager, name))
        }
        assert not left, f"left in the manager: {left}"
        assert not self.scheduler._reports, "reports of requests that are gone"
        if self.core.vllm_config.parallel_config.world_size == 1:
            votes, cuts = self.compressor.votes, self.compressor.cuts
            held = {
                name: list(getattr(owner, name))
                for owner, names in ((votes, ("windows", "sums")), (cuts, ("stash", "selected", "went_on")))
                for name in names
            }
            assert not any(held.values()), f"left in the worker: {held}"
            # The worker is told that a request is gone with the next step that is scheduled.
            gone = {*self.compressor.held, *self.compressor.evictor.requests}.difference(*self._last_scheduled)
            assert not gone, f"pages of requests that ended earlier are left in the worker: {gone}"

    def _counts(self) -> tuple[int, int, int]:
        if self.config is None:
            return 0, 0, 0
        return self.totals.requests_compressed, sum(self.totals.left_alone.values()), self.totals.prompt_tokens_seen

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        for call in self.before_schedule:
            call(len(self.free_blocks))
        output = self._schedule(*args, **kwargs)
        self._last_scheduled.append(set(output.num_scheduled_tokens))
        if self.config is not None:
            self.manager.check_integrity()
        self.free_blocks.append(self.pool.get_num_free_blocks())
        for call in self.after_schedule:
            call(output)
        return output

    def _watched_preempt(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.preemptions.append(
            Preemption(
                request.request_id,
                request.num_computed_tokens,
                request.num_prompt_tokens,
                self.config is not None and request.request_id in self.manager.null_blocks,
            )
        )
        return self._preempt(request, *args, **kwargs)


def _with_file(config: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The same with a file of the checkpoint in the place of numbers that only a file can hold."""
    groups = config.get("channel_groups")
    if not isinstance(groups, dict):
        return config
    file = checkpoint.with_name(f"{checkpoint.name}-channels.json")
    save(make("channel-groups", checkpoint, command="-", settings={}, data=groups), file)
    return config | {"channel_groups": str(file)}


def sampling(max_tokens: int, **parameters: Any) -> SamplingParams:
    """Greedy sampling that no token stops, with the logprob of each chosen token."""
    return SamplingParams(
        **({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0} | parameters),
        detokenize=False,
    )


def logprobs_of(output: RequestOutput) -> list[float]:
    """Log-probability of each generated token."""
    answer = output.outputs[0]
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
