"""Run by test_tensor_parallel.py in a process of its own: two workers, what they keep and what comes out, as JSON."""

import sys
from pathlib import Path

from fastkv_vllm.adapter.kept import merged
from tests.engine.child import report
from tests.engine.harness import Engine, logprobs_of
from tests.engine.oracle import clear, freed_blocks, plan_of, reference
from tests.engine.requests import answer, ask, filled
from tests.engine.settings import CHANNELS, ENCODED, EXACT, MIXED, RAGGED, SERVER


def record(worker):
    """Keep what is chosen from now on."""
    from fastkv_vllm.adapter import compressor, cuts, uneven
    from fastkv_vllm.kernels.select import select, select_ragged

    found = []

    def recorded_ragged(scores, num_kept):
        kept = select_ragged(scores, num_kept)
        found.append([head.tolist() for head in kept.split(num_kept.tolist())])
        return kept

    compressor.select = cuts.select = lambda *args: found.append(select(*args).tolist()) or select(*args)
    uneven.select_ragged = recorded_ragged
    worker.fastkv_test_selections = found


def recorded(worker):
    found = list(worker.fastkv_test_selections)
    worker.fastkv_test_selections.clear()
    return found


def main(checkpoint: Path, *names: str) -> None:
    measured = SERVER | {"channel_groups": CHANNELS}
    engine = Engine(checkpoint, "fastkv", measured, tensor_parallel_size=2, distributed_executor_backend="mp")
    SERVER["channel_groups"] = engine.config.channel_groups  # what the references read: each rank has its heads' part
    engine.llm.collective_rpc(record)
    results = {}
    for name in names:
        method, settings = (EXACT | RAGGED)[name]
        config = filled(method, settings)
        alone = clear(checkpoint, config, MIXED[1], 8)
        mixed = [clear(checkpoint, config, prompt, 36) for prompt in MIXED]
        with engine.step_tokens(200):
            engine.llm.collective_rpc(recorded)
            num_revived = engine.totals.worker.revived_rows
            (output,) = ask(engine, [(alone, method, settings)], 8)
            selections = engine.llm.collective_rpc(recorded)
            last = merged(engine.llm.collective_rpc("last_kept"), 2)
            num_revived = engine.totals.worker.revived_rows - num_revived
            ask(engine, [(prompt, method, settings) for prompt in mixed], 36)
        results[name] = {
            "prompt": alone,
            "selections": selections,
            "last": last,
            "num_revived": num_revived,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": logprobs_of(output),
        }
    for name in ("adakv-int2", "fastkv-pyramid-adaptive-kivi4", "pyramidinfer"):
        method, settings = (ENCODED | RAGGED)[name]
        with engine.step_tokens(200):
            ask(engine, [(clear(checkpoint, filled(method, settings), MIXED[1], 8), method, settings)], 8)
    slack = {
        config.method: plan.num_whole_blocks - plan.num_pages - freed_blocks(plan, kept, num_ranks=2)
        for prompt, config in answer(engine)
        if config is not None
        for plan, kept in [(plan_of(config, len(prompt)), reference(checkpoint, config, prompt, 24))]
    }
    assert slack["headkv"] > 0 and slack["duoattention"] > 0, f"the test needs ranks that hold unequal: {slack}"
    report(results)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
