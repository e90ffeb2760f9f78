"""A real `vllm serve` in a process of its own, for benchmarks and tests.

with serve("benchmarks/tiny_model/checkpoint", method="fastkv", config={"tsp_layer": 5}) as server:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

HOST = "127.0.0.1"
BLOCK_SIZE = 32
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
LOG_LINES = 30

DEFAULT_FLAGS = ("--block-size", str(BLOCK_SIZE), "--max-model-len", "4096")
DEFAULT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
}


class ServerFailed(RuntimeError):
    """The server ended by itself or did not become healthy; the message ends with its log's last lines."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Fields:
        base_url: address without a path, no slash at the end.
        model: name to ask for in requests.
        pid: process id of `vllm serve`; its engine is a child of it.
        log: file with its output, removed at exit unless the `with` block fails.
    """

    base_url: str
    model: str
    pid: int
    log: Path

    def metrics(self) -> dict[str, list[Sample]]:
        """What `/metrics` says now: sample name (counters end in `_total`) -> its samples, one per label set."""
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=30) as response:
            text = response.read().decode()
        samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample)
        return samples

    def cpu_seconds(self) -> float:
        """CPU seconds, user and system, that the server's living processes have used since they were started."""
        total = 0.0
        for process in _tree(self.pid):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def log_tail(self) -> str:
        """The log's last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def sample_value(samples: Mapping[str, Sequence[Sample]], name: str, **labels: str) -> float:
    """Sum of a metric over its samples with these labels; 0 where the server has none of that name.

    Args:
        samples: result of `Server.metrics`.
        name: sample name, counters with `_total`.
    """
    return sum(
        sample.value
        for sample in samples.get(name, ())
        if all(sample.labels.get(label) == value for label, value in labels.items())
    )


@contextmanager
def serve(
    model: str | Path,
    *,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    stdout: Path | None = None,
) -> Iterator[Server]:
    """Run `vllm serve` and wait until it is healthy; end it, and all it started, when the block is left.

    Args:
        model: checkpoint directory.
        method: value of --kv-compression; None: plain vLLM.
        config: value of --kv-compression-config.
        extra: more flags; they win over `DEFAULT_FLAGS`.
        env: more environment; it wins over `DEFAULT_ENVIRONMENT`, which wins over the caller's.
        stdout: file or device its standard output goes to; None: the log, beside its errors.

    Raises:
        ServerFailed: it ended by itself or was not healthy after START_TIMEOUT_S seconds.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", HOST, "--port", str(port)]
    command += [*DEFAULT_FLAGS, *extra]
    if method is not None:
        command += ["--kv-compression", method]
    if config is not None:
        command += ["--kv-compression-config", json.dumps(dict(config))]
    descriptor, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
    with os.fdopen(descriptor, "wb") as log, stdout.open("wb") if stdout else nullcontext(log) as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**os.environ, **DEFAULT_ENVIRONMENT, **(env or {})},
            start_new_session=True,
        )
    server = Server(f"http://{HOST}:{port}", str(model), process.pid, Path(name))
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        _stop(process)
    server.log.unlink()


def _free_port() -> int:
    """A port nobody listens on, below the range the kernel hands out: a server takes half a minute to bind it."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ServerFailed("no free port between 20000 and 30000")


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"vllm serve ended with exit status {process.returncode}:\n{server.log_tail()}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.base_url}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise ServerFailed(f"vllm serve was not healthy after {START_TIMEOUT_S} s:\n{server.log_tail()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, SIGKILL to what is then left of its session and its tree, and wait until all is gone."""
    children = _tree(process.pid)[1:]
    with suppress(subprocess.TimeoutExpired):
        process.terminate()  # nothing happens where it has ended already
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session is its process group
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, STOP_TIMEOUT_S)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
