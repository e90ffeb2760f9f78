"""Tasks for kvpress, through JSON files, in its own environment."""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import CHILD_ENVIRONMENT
from benchmarks.judges import run_judge

KVPRESS_CHILD = Path(__file__).with_name("kvpress_child.py")


def run_kvpress(task: dict[str, Any]) -> dict[str, Any]:
    """Give a task to `kvpress_child` and return its answer; its process gets what ours get: one thread, same malloc.

    Raises:
        JudgeMissing: the environment is not there.
        RuntimeError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "task.json"), Path(directory, "answer.json")
        source.write_text(json.dumps(task))
        run_judge("kvpress", [str(KVPRESS_CHILD), str(source), str(target)], environment=CHILD_ENVIRONMENT)
        return json.loads(target.read_text())
