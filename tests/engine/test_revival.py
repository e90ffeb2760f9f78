"""LazyLLM while it decodes: rows left behind come back, as many as the reference's, and nothing of them is left."""

from itertools import pairwise

import pytest
from vllm.exceptions import VLLMValidationError

from fastkv_vllm.adapter.revival import RevivablePages
from tests.engine.harness import sampling
from tests.engine.oracle import clear, make_prompts, plan_of, reference
from tests.engine.settings import MIXED, RAGGED, TSP

METHOD, SETTINGS = RAGGED["lazyllm"]
ROW_BYTES = 128 * 4  # hidden size, float32
NUM_CUTS = 3


@pytest.fixture
def engine(start):
    return start(METHOD, SETTINGS)


def streams(engine):
    """Rows that the worker holds, of prompts in prefill and of those that decode."""
    held = [pages.streams for pages in engine.compressor.held.values() if isinstance(pages, RevivablePages)]
    return [*engine.compressor.cuts.stash.values(), *held]


def test_as_many_come_back_as_in_the_reference(engine):
    """Nearly all that is not held: the random model looks elsewhere with each token."""
    prompts = [clear(engine.checkpoint, engine.config, prompt, 24) for prompt in make_prompts([700, 500], seed=21)]
    before = engine.totals.worker.revived_rows
    engine.check(prompts, max_tokens=24)
    expected = sum(reference(engine.checkpoint, engine.config, prompt, 24).num_revived for prompt in prompts)
    assert engine.totals.worker.revived_rows - before == expected > 1000


def test_layers_hold_as_many_and_others(engine):
    """Each step the stages hold the plan's counts, each within the one before it, forced ones always."""
    (prompt,) = make_prompts([700], seed=22)
    plan, seen = plan_of(engine.config, 700), []

    def look(output):
        held = [pages for rid, pages in engine.compressor.held.items() if rid in output.num_scheduled_tokens]
        seen.extend([stage.tolist() for stage in pages.stages] for pages in held)

    with engine.watch(after=look):
        engine.generate([prompt], 12)
    rows = [700, *(count for _, count in plan.cuts)]
    for stages in seen:
        assert [len(stage) + plan.num_tail for stage in stages] == rows
        for outer, inner in pairwise(stages):
            assert set(inner) <= set(outer) and len(set(inner)) == len(inner)
            assert set(range(plan.forced_from, 700 - plan.num_tail)) <= set(inner)
    assert len({tuple(sorted(stages[-1])) for stages in seen}) > 5, "the last layers always held the same"


def test_the_rows_stay_within_their_bound(start):
    limit = 2000
    engine = start(METHOD, SETTINGS | {"max_tsp_tokens": limit}, max_model_len=640, max_num_seqs=6)
    held, reported, running = [], [], []

    def look(output):
        held.append(sum(rows.nbytes for rows in streams(engine)))
        reported.append(engine.totals.worker.stash_bytes)
        running.append(len(engine.scheduler.running))

    with engine.step_tokens(300), engine.watch(after=look):
        engine.check(make_prompts([400, 260, 90, 500, 350], seed=23), max_tokens=12)
    assert 500 * NUM_CUTS * ROW_BYTES <= max(held) <= limit * ROW_BYTES
    assert reported[1:] == held[1:], "the figure in the statistics is not what the worker holds"
    assert max(running) < 5, "no prompt had to wait: the bound was not reached"
    assert engine.totals.worker.stash_bytes == 0


@pytest.mark.parametrize("step", [3, 5, 7, 12, 19])
def test_preempted(engine, step):
    """In prefill, after it and while the answer is replayed: a token at a time, each choosing anew."""
    prompts = make_prompts([450, 90, 300], seed=24)

    def preempt(number):
        if number in (step, step + 8):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        engine.check(prompts, max_tokens=16)
    assert engine.preemptions


@pytest.mark.parametrize("num_steps", [2, 5, 9])
def test_aborted(engine, num_steps):
    llm = engine.llm.llm_engine
    victim, other = make_prompts([450, 300], seed=25)
    llm.add_request("victim", {"prompt_token_ids": list(victim)}, sampling(40))
    with engine.step_tokens(100):
        for _ in range(num_steps):
            llm.step()
        assert len(streams(engine)) == 1
        llm.abort_request(["victim"])
        engine.manager.check_integrity()
        engine.check([other], max_tokens=4)  # the engine tells its worker with the next step
    assert [len(rows[0]) for rows in streams(engine)] == [300], "of the last request, until the next step"


def test_a_question_is_read_a_token_at_a_time(engine):
    steps = []
    with engine.watch(after=lambda output: steps.append(list(output.num_scheduled_tokens.values()))):
        engine.check(MIXED[1:2], max_tokens=4, contexts=[672])
    assert steps == [[672], *[[1]] * 31], "28 of the question, of which the last gives a token, and three of the answer"


def test_a_server_without_room_refuses_it(start):
    engine = start("fastkv", TSP)
    extra = {"kv_compression": METHOD, "kv_compression_config": SETTINGS}
    prompt = {"prompt_token_ids": list(MIXED[1])}
    with pytest.raises(
        VLLMValidationError, match=r"may hold 6144 rows of a prompt, .* for 2048; start it with max_tsp"
    ):
        engine.llm.generate([prompt], sampling(4, extra_args=extra), use_tqdm=False)
    engine.require_idle()
