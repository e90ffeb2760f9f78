"""torch.compile on: compiled steps and steps with TSP rows or rows that come back, which run uncompiled, agree."""

import pytest
from vllm.config import CompilationMode
from vllm.forward_context import get_forward_context

from fastkv_vllm.adapter.step import orders_of
from tests.engine.oracle import make_prompts
from tests.engine.requests import answer
from tests.engine.settings import SERVER, SMALL


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [("snapkv", SMALL), ("fastkv", SERVER)])
def test_mixed_requests(start, method, settings):
    engine = start(method, settings, enforce_eager=False, max_num_batched_tokens=512)
    config = engine.core.vllm_config.compilation_config
    assert config.mode != CompilationMode.NONE and config.backend == "inductor"
    decoder = engine.worker.model_runner.get_model().model
    assert decoder.compiled and not decoder.do_not_compile
    eager = []
    runner = engine.worker.model_runner
    forward = runner.model.model.forward

    def count(*args, **kwargs):  # the uncompiled code: called on steps that skip compilation only
        eager.append(get_forward_context().skip_compiled)
        return forward(*args, **kwargs)

    runner.model.model.forward = count
    steps = []
    with engine.step_tokens(100), engine.watch(after=steps.append):
        engine.check(make_prompts([500, 90, 700]))
    del runner.model.model.forward
    tsp_steps = [s for s in steps if method == "fastkv" and orders_of(s).plan.prefills]
    assert len(eager) == len(tsp_steps) and all(eager)
    assert len(steps) > len(eager) + 30, "no step ran compiled"
    answer(engine, ("gemfilter", "none"))  # compiled steps get positions of the runner's own
    if method == "fastkv":
        answer(engine, ("lazyllm", "none"))  # only uncompiled steps let rows come back
        assert engine.totals.worker.revived_rows > 100
