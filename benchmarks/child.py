"""Work in a fresh process: the task and its answer travel as JSON files.

The parent calls `run_in_child("benchmarks.some.module", task)`; under its main guard that module calls `answer(work)`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# One thread, an in-process engine, glibc that keeps freed pages: page faults of fresh pages are most of the noise.
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
TAIL_LINES = 15


def run_in_child(module: str, task: Any, environment: Mapping[str, str] = MappingProxyType({})) -> Any:
    """Give a task to a module in a fresh process and return its answer.

    Args:
        module: dotted name; it calls `answer`.
        task: anything JSON can say.
        environment: more variables; they win over `CHILD_ENVIRONMENT`, which wins over the caller's.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "task.json"), Path(directory, "answer.json")
        source.write_text(json.dumps(task))
        done = subprocess.run(
            [sys.executable, "-m", module, str(source), str(target)],
            env={**os.environ, **CHILD_ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
            raise RuntimeError(f"{module} {task} failed with exit status {done.returncode}:\n{tail}")
        return json.loads(target.read_text())


def answer(work: Callable[[Any], Any]) -> None:
    """The child's side: do the task of the file named first, write what comes out to the file named second."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    target.write_text(json.dumps(work(json.loads(source.read_text()))))
