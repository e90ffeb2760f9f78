"""Requests followed through an in-process engine, step by step."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vllm import LLM, SamplingParams


@dataclass
class Followed:
    """What happened from the first request's arrival to the end of the last.

    Fields:
        num_requests: requests sent.
        cpu_s, wall_s: of all of it.
        first_token: CPU and wall seconds to the first token; blocks held before and after the step that made it.
        decodes: requests and CPU seconds of each step without prompt tokens.
        drafted, accepted: tokens drafted, and those of them accepted, in such steps.
        num_preemptions: requests sent back for lack of blocks.
        peak_running: most requests in one step.
        peak_blocks: most blocks held at a time until the first token, looked at after each allocation.
        blocks_left: blocks that did not come back.
        cached_tokens: prompt tokens found in the prefix cache.
        answers: token ids by request.
    """

    num_requests: int
    cpu_s: float = 0.0
    wall_s: float = 0.0
    first_token: tuple[float, float, int, int] | None = None
    decodes: list[tuple[int, float]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    num_preemptions: int = 0
    peak_running: int = 0
    peak_blocks: int = 0
    blocks_left: int = 0
    cached_tokens: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def step_ms(self) -> float | None:
        """Median CPU milliseconds of the steps that decode all requests at once; None: there was none."""
        full = [seconds for count, seconds in self.decodes if count == self.num_requests]
        return median(full) * 1e3 if full else None


def follow(llm: LLM, prompts: list[list[int]], output_tokens: int, settings: dict[str, Any] | None = None) -> Followed:
    """Send all prompts at once and step until the last has its answer, greedy and of full length.

    Args:
        settings: each request's own; None: the engine's.
    """
    engine = llm.llm_engine
    followed = Followed(len(prompts))
    sampling = SamplingParams(
        max_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=settings
    )
    with _Watch(engine.engine_core.engine_core.scheduler, followed) as watch:
        cpu, wall = time.process_time(), time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            held, start = watch.held(), time.process_time()
            outputs = engine.step()
            end = time.process_time()
            if outputs and followed.first_token is None:
                followed.first_token = (end - cpu, time.perf_counter() - wall, held, watch.held())
            if watch.scheduled and max(watch.scheduled) == 1:
                followed.decodes.append((len(watch.scheduled), end - start))
                followed.drafted += watch.drafted
                followed.accepted += watch.accepted
            finished = [output for output in outputs if output.finished]
            followed.answers |= {output.request_id: list(output.outputs[0].token_ids) for output in finished}
            followed.cached_tokens += sum(output.num_cached_tokens or 0 for output in finished)
        followed.cpu_s, followed.wall_s = time.process_time() - cpu, time.perf_counter() - wall
        followed.blocks_left = watch.held()
    return followed


class _Watch:
    """Within it, the scheduler's steps, preemptions and allocations are seen.

    Fields:
        scheduled: tokens per request of the last step, beside drafts.
        drafted, accepted: drafts that it verified, and accepted.
    """

    def __init__(self, scheduler: Any, followed: Followed) -> None:
        self.scheduled: list[int] = []
        self.drafted = self.accepted = 0
        self._scheduler, self._followed = scheduler, followed
        self._manager = scheduler.kv_cache_manager
        self._num_free = self._manager.block_pool.get_num_free_blocks()

    def held(self) -> int:
        """Blocks held now and not before."""
        return self._num_free - self._manager.block_pool.get_num_free_blocks()

    def __enter__(self) -> "_Watch":
        schedule, preempt = self._scheduler.schedule, self._scheduler._preempt_request
        allocate, followed = self._manager.allocate_slots, self._followed
        count_drafts = self._scheduler.make_spec_decoding_stats

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            drafts = output.scheduled_spec_decode_tokens
            self.scheduled = [n - len(drafts.get(rid, ())) for rid, n in output.num_scheduled_tokens.items()]
            self.drafted = self.accepted = 0
            followed.peak_running = max(followed.peak_running, len(self.scheduled))
            return output

        def watched_preempt(*args: Any, **kwargs: Any) -> Any:
            followed.num_preemptions += 1
            return preempt(*args, **kwargs)

        def watched_count(*args: Any, **kwargs: Any) -> Any:
            self.drafted += kwargs["num_draft_tokens"]
            self.accepted += kwargs["num_accepted_tokens"]
            return count_drafts(*args, **kwargs)

        def watched_allocate(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            if followed.first_token is None:
                followed.peak_blocks = max(followed.peak_blocks, self.held())
            return blocks

        self._scheduler.schedule, self._scheduler._preempt_request = watched_schedule, watched_preempt
        self._scheduler.make_spec_decoding_stats = watched_count
        self._manager.allocate_slots = watched_allocate
        return self

    def __exit__(self, *_: object) -> None:
        del self._scheduler.schedule, self._scheduler._preempt_request, self._scheduler.make_spec_decoding_stats
        del self._manager.allocate_slots
