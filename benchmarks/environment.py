"""What a figure was measured on: goes into every report."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("fastkv-vllm", "vllm", "torch", "transformers")


def describe_environment() -> dict[str, object]:
    """Versions, processor, system date (UTC) and the load the machine already has (1, 5, 15 minutes)."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def describe_command() -> str:
    """The command line of this process, as one types it in the repository's root."""
    return shlex.join([".venv/bin/python", *sys.orig_argv[1:]])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
