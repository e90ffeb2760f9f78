"""Where outside judges live: environments of their own beside .venv, made by `scripts/judge_env.sh`."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG_LINES = 20
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


class JudgeMissing(FileNotFoundError):
    """A judge's environment is not there; the message says how to make it."""


def judge_python(name: str) -> Path:
    """Interpreter of a judge's environment.

    Args:
        name: as `scripts/judge_env.sh` takes it: kvpress or lm-eval.

    Raises:
        JudgeMissing: its environment is not there, or was left half-made.
    """
    directory = ROOT / f".venv-{name}"
    if not (directory / "judge-env.stamp").is_file():
        raise JudgeMissing(f"no {directory.name}: make it with scripts/judge_env.sh {name}")
    return directory / "bin" / "python"


def run_judge(
    name: str, arguments: Sequence[str], *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> str:
    """Run a judge's interpreter, offline and on one thread; returns what it printed.

    Args:
        name: as for `judge_python`.
        arguments: after the interpreter; its working directory is not on its module path.
        cwd: working directory.
        environment: more environment; it wins over `ENVIRONMENT`.

    Raises:
        JudgeMissing: no such environment.
        RuntimeError: it failed; the message ends with its last lines.
    """
    done = subprocess.run(
        [str(judge_python(name)), "-P", *arguments],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-LOG_LINES:])
        raise RuntimeError(f"{name} {' '.join(arguments)} failed with exit status {done.returncode}:\n{tail}")
    return done.stdout
