"""One load on a real `vllm serve`, sent by `vllm bench serve`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
from prometheus_client.samples import Sample

from benchmarks.child import CHILD_ENVIRONMENT
from benchmarks.server import Server, ServerFailed, sample_value, serve
from benchmarks.speed.load import RANDOM_IDS, WARM_UP_TOKENS, Counters, Load, Setup, require_done

METRICS = (
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl") for kind in ("mean", "median", "p99")),
    *("duration", "completed", "failed", "request_throughput", "output_throughput", "total_token_throughput"),
)
WARM_UP_OUTPUT = 8
WORKER_TITLE = "VLLM::Worker"


def measure_server(model: Path, setup: Setup, load: Load) -> dict[str, Any]:
    """Start a server, warm it up, send it the load and ask it whether it did what its setup says.

    Returns:
        `METRICS` of `vllm bench serve`, and `request_goodput` where the load has a limit; CPU seconds while it ran of
        all the server's processes (`server_cpu_s`: the engine's core polls while a step runs) and of the one that
        computes (`worker_cpu_s`); `num_preemptions`. For a rival the server does not start with, its last line, as
        `refused`.

    Raises:
        RuntimeError: requests failed, or the server did something else.
    """
    try:
        with serve(model, method=setup.method, config=setup.config or None, extra=_flags(setup, load)) as server:
            return _measure(server, model, setup, load)
    except ServerFailed as error:
        if setup.is_rival:
            return {"refused": str(error).splitlines()[-1]}
        raise


def _flags(setup: Setup, load: Load) -> list[str]:
    flags = {
        "--max-model-len": load.prompt_tokens + load.output_tokens,
        "--max-num-batched-tokens": load.step_tokens,
        "--max-num-seqs": load.num_requests,
        "--num-gpu-blocks-override": load.blocks_of(setup),
        **{f"--{name.replace('_', '-')}": value for name, value in setup.engine.items()},
    }
    pairs = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    return ["--no-enable-prefix-caching", "--enforce-eager", *(word for pair in pairs for word in pair)]


def _measure(server: Server, model: Path, setup: Setup, load: Load) -> dict[str, Any]:
    _warm_up(server, min(load.prompt_tokens, WARM_UP_TOKENS))
    before = _cpu_figures(server)
    result = _bench(server, model, load)
    cpu_s = {name: seconds - before[name] for name, seconds in _cpu_figures(server).items()}
    if (result["completed"], result["failed"]) != (load.num_requests, 0):
        raise RuntimeError(f"{setup.name}: {load.num_requests} requests sent, {result['completed']} answered")
    metrics = server.metrics()
    num_preemptions = int(sample_value(metrics, "vllm:num_preemptions_total"))
    counters = _counters(metrics)
    require_done(setup, counters, num_prompts=load.num_requests + 1, num_preemptions=num_preemptions)
    names = METRICS if load.goodput_ms is None else (*METRICS, "request_goodput")
    return {name: result[name] for name in names} | cpu_s | {"num_preemptions": num_preemptions}


def _cpu_figures(server: Server) -> dict[str, float]:
    """CPU seconds since their start of all the server's processes and of its worker."""
    processes = psutil.Process(server.pid).children(recursive=True)
    times = [process.cpu_times() for process in processes if process.cmdline()[:1] == [WORKER_TITLE]]
    if not times:
        raise RuntimeError(f"the server has no process called {WORKER_TITLE}")
    return {"server_cpu_s": server.cpu_seconds(), "worker_cpu_s": sum(time.user + time.system for time in times)}


def _counters(metrics: Mapping[str, Sequence[Sample]]) -> Counters | None:
    """The server's counters of compression; None: it has none."""
    if "vllm:fastkv_requests_compressed_total" not in metrics:
        return None
    names = ("requests_compressed", "requests_left_alone", "tsp_rows_in", "tsp_rows_out")
    return Counters(*(int(sample_value(metrics, f"vllm:fastkv_{name}_total")) for name in names))


def _warm_up(server: Server, num_tokens: int) -> None:
    ids = [RANDOM_IDS[0] + i % (RANDOM_IDS[1] - RANDOM_IDS[0]) for i in range(num_tokens)]
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        client.completions.create(model=server.model, prompt=ids, max_tokens=WARM_UP_OUTPUT, temperature=0)


def _bench(server: Server, model: Path, load: Load) -> dict[str, Any]:
    """What `vllm bench serve` saves.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = {
            "--backend": "openai",
            "--base-url": server.base_url,
            "--model": str(model),
            "--dataset-name": "random",
            "--random-input-len": load.prompt_tokens,
            "--random-output-len": load.output_tokens,
            "--num-prompts": load.num_requests,
            "--max-concurrency": load.concurrency or load.num_requests,
            "--seed": 0,
            "--temperature": 0,
            "--result-dir": directory,
            "--result-filename": "result.json",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        vllm = str(Path(sys.executable).with_name("vllm"))
        done = subprocess.run(
            [vllm, "bench", "serve", *words, *_goodput(load), "--ignore-eos", "--save-result", "--disable-tqdm"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **CHILD_ENVIRONMENT},
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise RuntimeError(f"vllm bench serve failed with exit status {done.returncode}:\n{tail}")
        return json.loads(Path(directory, "result.json").read_text())


def _goodput(load: Load) -> list[str]:
    if load.goodput_ms is None:
        return []
    ttft, tpot = load.goodput_ms
    return ["--goodput", f"ttft:{ttft}", f"tpot:{tpot}"]
