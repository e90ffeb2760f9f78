"""Random requests of random methods come, go on, are aborted and preempted: no block is ever lost.

The engine checks the whole pool after every schedule and once more when it is idle. `FASTKV_RANDOM_STEPS` says how many
engine steps to take at least; `make soak` takes 50,000.
"""

import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.engine.harness import Engine, sampling
from tests.engine.oracle import make_prompts
from tests.engine.settings import REQUESTS, SERVER

NUM_STEPS = int(os.environ.get("FASTKV_RANDOM_STEPS", "600"))
NUM_RULES = 60  # of one history; engine steps are several times as many
PROMPT = make_prompts([1500])[0]


@pytest.fixture(scope="module")
def engine(start) -> Engine:
    """A pool of 60 blocks: the longest prompt takes 47 of them."""
    return start("fastkv", SERVER, max_num_seqs=6, num_gpu_blocks_override=61, max_model_len=1800)


class Histories:
    """Counts of what has happened, over all histories."""

    def __init__(self) -> None:
        self.steps = self.compressed = self.aborted = self.preempted = 0


def machine(engine: Engine, seen: Histories) -> type[RuleBasedStateMachine]:
    llm = engine.llm.llm_engine

    class Requests(RuleBasedStateMachine):
        """One history: it ends with an idle engine."""

        def __init__(self) -> None:
            super().__init__()
            self.number = 0
            self.compressed = engine.totals.requests_compressed

        @rule(
            name=st.sampled_from(list(REQUESTS)),
            length=st.one_of(st.integers(1, 1500), st.sampled_from([127, 128, 640, 641, 1472])),
            max_tokens=st.integers(1, 70),
            share=st.sampled_from([None, 0.5, 0.9]),
        )
        def come(self, name: str, length: int, max_tokens: int, share: float | None) -> None:
            method, configuration = REQUESTS[name]
            extra: dict[str, object] = {"kv_compression": method}
            if configuration:
                extra["kv_compression_config"] = json.dumps(configuration)
            if share is not None and length * share >= 1:
                extra["kv_context_tokens"] = int(length * share)
            self.number += 1
            request_id = f"{seen.steps}-{self.number}"
            prompt = {"prompt_token_ids": list(PROMPT[-length:])}
            llm.add_request(request_id, prompt, sampling(max_tokens, extra_args=extra))

        @rule(count=st.integers(1, 12), limit=st.sampled_from([7, 100, 500, 2048]))
        def go_on(self, count: int, limit: int) -> None:
            with engine.step_tokens(limit):
                for _ in range(count):
                    self.step()

        @rule(number=st.integers(0, 9))
        def abort(self, number: int) -> None:
            running = [*engine.scheduler.requests]
            if running:
                seen.aborted += 1
                llm.abort_request([running[number % len(running)]], internal=True)

        @rule()
        def preempt(self) -> None:
            seen.preempted += len(engine.scheduler.running)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

        def step(self) -> None:
            if llm.has_unfinished_requests():
                llm.step()
                seen.steps += 1

        def teardown(self) -> None:
            while llm.has_unfinished_requests():
                self.step()
            if engine.scheduler.has_finished_requests():
                llm.step()  # an empty one, as a server does: it tells the worker of those aborted last
            engine.require_idle()
            seen.compressed += engine.totals.requests_compressed - self.compressed

    return Requests


def rounds(num_steps: int, seen: Histories) -> Iterator[int]:
    """Numbers of rounds, as many as the steps take."""
    number = 0
    while seen.steps < num_steps:
        yield number
        number += 1


def test_no_block_is_lost(engine: Engine) -> None:
    seen = Histories()
    requests = machine(engine, seen)
    quiet = settings(
        max_examples=6,
        stateful_step_count=NUM_RULES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for number in rounds(NUM_STEPS, seen):
        requests = type(f"Requests{number}", (requests,), {})  # a derandomised run depends on the name alone
        run_state_machine_as_test(requests, settings=settings(quiet, derandomize=True))
    print(f"{seen.steps} steps: {vars(seen)}")
    assert seen.steps >= NUM_STEPS
    assert min(seen.compressed, seen.aborted, seen.preempted) > 0, vars(seen)
