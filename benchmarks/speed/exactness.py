"""No figure of a configuration whose exactness tests fail."""

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/engine/test_exact.py",
    "tests/engine/test_kept.py",
    "tests/engine/test_ragged.py",
    "tests/engine/test_settings.py",
    "tests/engine/test_codecs.py",
    "tests/engine/test_sharing.py",
    "tests/engine/test_quantspec.py",
)
QUICK_TESTS = "test_prompts_one_by_one_in_one_chunk or (test_kept_entries and whole) or test_pages or not_accepted"
TAIL_LINES = 40


class ExactnessFailed(RuntimeError):
    """Exactness tests of a method failed, or there are none; the message ends with pytest's last lines."""


def check_exactness(methods: Iterable[str], tests: Sequence[str] = TESTS, *, quick: bool = False) -> dict[str, int]:
    """Run the exactness tests of each method in a process of its own.

    Args:
        methods: names that choose tests by their ids.
        tests: files, relative to the repository.
        quick: one chunking instead of all.

    Returns:
        Number of passed tests by method.

    Raises:
        ExactnessFailed: some failed, or none passed.
    """
    return {method: _check(method, tests, quick) for method in methods}


def _check(method: str, tests: Sequence[str], quick: bool) -> int:
    selection = f"{method} and ({QUICK_TESTS})" if quick else method
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", selection],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    passed = re.search(r"\b(\d+) passed", lines[-1] if lines else "")
    if done.returncode != 0 or passed is None:
        tail = "\n".join(lines[-TAIL_LINES:])
        raise ExactnessFailed(f"exactness tests of {method} do not pass, so nothing is measured:\n{tail}")
    return int(passed[1])
