"""Run by test_tensor_parallel.py in a process of its own: two workers, what they keep and what comes out, as JSON."""

import sys
from pathlib import Path

from fastkv_vllm.methods import UNIFORM
from tests.engine.child import report
from tests.engine.harness import Engine, logprobs_of
from tests.engine.oracle import clear
from tests.engine.requests import answer, ask, filled
from tests.engine.settings import EXACT, MIXED, REQUESTS


def record(worker):
    """Keep what is chosen from now on."""
    import fastkv_vllm.adapter.compressor as compressor

    found, select = [], compressor.select
    compressor.select = lambda *args: found.append(select(*args).tolist()) or select(*args)
    worker.fastkv_test_selections = found


def recorded(worker):
    found = list(worker.fastkv_test_selections)
    worker.fastkv_test_selections.clear()
    return found


def main(checkpoint: Path, *names: str) -> None:
    engine = Engine(checkpoint, *EXACT["fastkv"], tensor_parallel_size=2, distributed_executor_backend="mp")
    engine.llm.collective_rpc(record)
    results = {}
    for name in names:
        method, settings = EXACT[name]
        config = filled(method, settings)
        alone = clear(checkpoint, config, MIXED[1], 8)
        mixed = [clear(checkpoint, config, prompt, 36) for prompt in MIXED]
        with engine.step_tokens(200):
            engine.llm.collective_rpc(recorded)
            (output,) = ask(engine, [(alone, method, settings)], 8)
            selections = engine.llm.collective_rpc(recorded)
            ask(engine, [(prompt, method, settings) for prompt in mixed], 36)
        results[name] = {
            "prompt": alone,
            "selections": selections,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": logprobs_of(output),
        }
    configs = {name: filled(*asked) for name, asked in REQUESTS.items()}
    # Heads that share budgets need to be on one rank.
    answer(engine, [name for name, config in configs.items() if config is None or config.head_budgets == UNIFORM])
    report(results)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
