"""Run by test_tensor_parallel.py in a process of its own: two workers draft the same tokens, each by its own head."""

import sys
from pathlib import Path

from tests.engine.child import report
from tests.engine.harness import Engine
from tests.engine.oracle import make_prompts
from tests.engine.settings import DRAFTING


def main(checkpoint: Path) -> None:
    engine = Engine(checkpoint, "quantspec", DRAFTING, tensor_parallel_size=2, distributed_executor_backend="mp")
    drafted = []
    look = engine.watch(after=lambda output: drafted.extend(output.scheduled_spec_decode_tokens.values()))
    with engine.step_tokens(200), look:
        engine.check(make_prompts([400, 90, 611], seed=7), max_tokens=9)
    report({"drafted": sum(map(len, drafted))})
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
