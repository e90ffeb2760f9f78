"""Engines that need a process of their own: a module that prints its findings as one line of JSON."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARK = "RESULT "


def run(module: str, *args: str, env: Mapping[str, str]) -> dict[str, Any]:
    """What a module run as a program reported last; its output where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=800,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    assert done.returncode == 0 and lines, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(lines[-1].removeprefix(_MARK))


def report(result: dict[str, Any]) -> None:
    print(_MARK + json.dumps(result))
