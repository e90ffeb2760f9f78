"""The halting rule: what layers do not need goes back one step after the prompt, once, and to nobody else's loss."""

import pytest

from fastkv_vllm.adapter.step import orders_of
from tests.engine.harness import sampling
from tests.engine.oracle import clear, freed_blocks, make_prompts, plan_of, reference
from tests.engine.settings import HALTING

NUM_TOKENS = 700
PROMPT, OTHER = make_prompts([NUM_TOKENS, 450], seed=3)


@pytest.fixture(scope="module")
def engine(start):
    return start("dbudgetkv", HALTING)


@pytest.fixture
def settled(engine, monkeypatch):
    """(blocks the worker did not need, blocks that went back), of each prompt that ended."""
    found, settle = [], engine.manager.settle

    def watched(request_id, destination, surplus):
        found.append((surplus, settle(request_id, destination, surplus)))
        return found[-1][1]

    monkeypatch.setattr(engine.manager, "settle", watched)
    return found


def expected(engine, prompt):
    """The prompt without doubt about what stays, its plan, and the blocks that it gives back in all."""
    prompt = clear(engine.checkpoint, engine.config, prompt, 8)
    plan = plan_of(engine.config, len(prompt))
    freed = freed_blocks(plan, reference(engine.checkpoint, engine.config, prompt, 8))
    assert freed > plan.num_freed_blocks + 1, "the test needs a budget that is not used up"
    return prompt, plan, freed


def test_blocks_come_back_one_step_later(engine):
    prompt, plan, freed = expected(engine, PROMPT)
    tables = []

    def look(output):
        (rid,) = output.num_scheduled_tokens
        runner = engine.worker.model_runner
        if rid in runner.requests:
            blocks = [block.block_id for block in engine.manager.req_to_blocks[rid]]
            row = runner.input_batch.block_table[0].get_cpu_tensor()[runner.input_batch.req_id_to_index[rid]]
            tables.append((blocks, runner.requests[rid].block_ids[0], row[: len(blocks)].tolist()))
            assert orders_of(output).plan.null_blocks == {rid: freed}

    before = engine.totals.blocks_freed, engine.totals.prompt_tokens_kept
    idle = engine.pool.get_num_free_blocks()
    with engine.watch(after=look):
        engine.check([prompt], max_tokens=4)
        first, second, *_ = engine.free_blocks
    held = plan.num_pages + 1
    assert first == idle - held, "the ceiling's surplus is free in the step that ends the prompt"
    assert second - first == freed - plan.num_freed_blocks > 0
    assert len(tables) == 3
    for blocks, requests_table, row in tables:
        assert blocks == requests_table == row
        assert blocks[:freed] == [0] * freed and 0 not in blocks[freed:]
    assert engine.totals.blocks_freed - before[0] == freed
    kept = (plan.num_whole_blocks - freed) * plan.block_size + plan.num_tail
    assert engine.totals.prompt_tokens_kept - before[1] == kept


def end_of_prompt(act):
    """Watcher that acts between the schedule of a step that ends a prompt and its run, once for each prompt."""
    seen = set()

    def look(output):
        for rid in orders_of(output).plan.destinations:
            if rid not in seen:
                seen.add(rid)
                act(rid)

    return look


def test_preempted_before_the_worker_has_told(engine, settled):
    """Its blocks went back as a whole; the prompt ends once more, and then gives back its own."""

    def preempt(rid):
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    prompts = [expected(engine, prompt)[0] for prompt in (PROMPT, OTHER)]
    with engine.watch(after=end_of_prompt(preempt)):
        engine.check(prompts, max_tokens=8)
    assert any(p.compressed for p in engine.preemptions)
    assert any(surplus > back == 0 for surplus, back in settled), "no report came too late"
    assert any(surplus == back > 0 for surplus, back in settled), "no report counted"


def test_aborted_before_the_worker_has_told(engine, settled):
    llm = engine.llm.llm_engine
    prompt, _, _ = expected(engine, OTHER)
    finished = []
    llm.add_request("victim", {"prompt_token_ids": list(PROMPT)}, sampling(8))
    llm.add_request("other", {"prompt_token_ids": list(prompt)}, sampling(8))

    def abort(rid):
        if rid.startswith("victim"):
            llm.abort_request(["victim"])

    with engine.watch(after=end_of_prompt(abort)):
        while llm.has_unfinished_requests():
            finished += llm.step()
    (answer,) = [output for output in finished if output.finished and output.request_id == "other"]
    engine.require_reference(prompt, answer, 8)
    assert sorted(back > 0 for _, back in settled) == [False, True]
    engine.require_idle()


def test_only_the_latest_compression_counts(engine):
    """Equal ids are not enough: a prompt compressed anew may have got the same blocks."""
    told = []

    def tell(rid):
        destination = engine.manager.unsettled[rid]
        told.append(engine.manager.settle(rid, list(destination), 1))

    with engine.watch(after=end_of_prompt(tell)):
        engine.check([PROMPT], max_tokens=4)
    assert told == [0]


def test_the_ceiling_holds(start):
    """A rule that no layer can meet: the budget's pages, all of them."""
    engine = start("dbudgetkv", HALTING | {"retention_ratio": 0.3, "halting_loss": 0.05})
    before = engine.totals.blocks_freed
    engine.check([PROMPT], max_tokens=4)
    assert engine.totals.blocks_freed - before == plan_of(engine.config, NUM_TOKENS).num_freed_blocks


def test_what_went_back_is_used(start):
    """The second prompt finds room beside the first one's answer only in what the rule gave back."""
    engine = start("dbudgetkv", HALTING, num_gpu_blocks_override=33, max_model_len=768)
    prompts = [expected(engine, prompt)[0] for prompt in make_prompts([700, 600], seed=3)]
    most = []

    def look(output):
        most.append(len(engine.scheduler.running))

    with engine.watch(after=look):
        engine.check(prompts, max_tokens=40)
    assert max(most) == 2 and not engine.preemptions
    first, second = (plan_of(engine.config, len(prompt)) for prompt in prompts)
    assert first.num_pages + 1 + second.num_whole_blocks + 1 > 32, "the second would find room without the rule"
