"""A request aborted at any step leaves nothing behind and disturbs nobody."""

import pytest

from tests.engine.harness import sampling
from tests.engine.oracle import make_prompts
from tests.engine.settings import SMALL, TSP

VICTIM, OTHER = make_prompts([450, 300])
STEP = 100


@pytest.fixture(params={"fastkv": TSP, "snapkv": SMALL}, scope="module")
def engine(request, start):
    return start(request.param, {"fastkv": TSP, "snapkv": SMALL}[request.param])


# The prompt's chunks are steps 0..4, the last one ends inside the block; after step 4 it is compressed.
@pytest.mark.parametrize("num_steps", [0, 1, 3, 4, 5, 6, 15])
def test_abort_after_some_steps(engine, num_steps):
    llm = engine.llm.llm_engine
    llm.add_request("victim", {"prompt_token_ids": list(VICTIM)}, sampling(40))
    llm.add_request("other", {"prompt_token_ids": list(OTHER)}, sampling(16))
    before = engine.totals.requests_compressed
    finished = []
    with engine.step_tokens(STEP):
        for _ in range(num_steps):
            finished += llm.step()
        holds_stash = [rid for rid in engine.compressor.cuts.stash if rid.startswith("victim")]
        assert bool(holds_stash) == (engine.config.uses_tsp and 0 < num_steps < 5)
        assert engine.totals.requests_compressed - before == (num_steps >= 5) + (num_steps >= 8)
        finished += engine.abort("victim")
    (answer,) = [output for output in finished if output.finished]
    engine.require_reference(OTHER, answer, 16)


def test_abort_of_the_only_request_in_mid_prefill(engine):
    """No step follows that could tell the worker: what it holds goes with the next request's first step."""
    llm = engine.llm.llm_engine
    with engine.step_tokens(STEP):
        llm.add_request("alone", {"prompt_token_ids": list(VICTIM)}, sampling(40))
        for _ in range(4):
            llm.step()
        llm.abort_request(["alone"])
        while llm.has_unfinished_requests():
            llm.step()
        engine.manager.check_integrity()
        assert not engine.manager.plans and not engine.manager.stashing
        engine.check([OTHER], max_tokens=2)
