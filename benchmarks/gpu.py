"""What kernels and engine do on a GPU: one command for a host that has one. It has not been run yet.

python -m benchmarks.gpu [--part kernels engine] [--quick] [--rounds N] [--json FILE]

kernels: the time of each Triton kernel, beside that of a copy of the bytes it cannot do without, and torch's way where
there is one; of the CUDA library (`make csrc`) and of xformers where they are there, else their names. Medians of CUDA
events.

engine: time to first token, time per token and tokens/s of Llama-3.1-8B's shape with random weights: plain vLLM,
fastkv, snapkv, vLLM's fp8 cache; all on Model Runner V1, which compression needs. Each configuration runs in a process
of its own per round, in turn (A B C D, B C D A, ..), so that a drift of the clock meets all alike; a ratio compares
runs of one round. Seconds are of the wall. Where the pool is fixed all have the same bytes for their cache.

Nothing is measured unless the kernels' tests pass on this GPU.

The last line is JSON; with --json it goes to a file, too. It names the GPU, its driver and all versions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.child import run_in_child
from benchmarks.environment import describe_command, describe_environment
from benchmarks.gpu_kernels import MODEL, kernel_cases, left_out
from benchmarks.roofline import MODELS
from benchmarks.speed.load import FP8, PLAIN, SNAPKV, Load, Setup
from benchmarks.speed.summary import FIGURES, summarise
from benchmarks.table import format_table

PARTS = ("kernels", "engine")
COPY_BYTES = 2**30
NUM_CALLS = 20
FASTKV = Setup("fastkv", "fastkv", {"retention_ratio": 0.1, "tsp_layer": 15, "tsp_ratio": 0.2})
SETUPS = (PLAIN, FASTKV, SNAPKV, FP8)
ENGINE_FIGURES = (
    "first_token_wall_s",
    "tpot_wall_ms",
    "wall_tokens_per_s",
    "peak_running",
    "num_preemptions",
    "blocks_before",
    "blocks_after",
)
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
TAIL_LINES = 40


class NoGPU(RuntimeError):
    """There is none here."""


def measure_kernels(device: torch.device, num_tokens: int) -> dict[str, Any]:
    """Seconds of each kernel, of torch's way where it has one, and of a copy."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=device)
    copy_s = seconds_of(lambda: target.copy_(source))
    rows = [
        {
            "op": case.op,
            "shape": case.shape,
            "num_bytes": case.num_bytes,
            "seconds": seconds_of(case.run),
            "torch_seconds": None if case.rival is None else seconds_of(case.rival),
        }
        for case in kernel_cases(device, num_tokens)
    ]
    return {"copy_bytes_per_s": 2 * COPY_BYTES / copy_s, "rows": rows, "left_out": left_out()}


def seconds_of(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU, after some that compile and warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(NUM_CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def engine_loads(*, quick: bool) -> dict[str, Load]:
    """Loads by name: one request of each length, and many in a pool of fixed bytes."""
    if quick:
        return {"1 x 8192": Load(1, 8192, 16, 8192)}
    alone = {f"1 x {n}": Load(1, n, 128, 8192) for n in (8192, 32768, 131_072 - 128)}
    # 20000 blocks of 16 tokens: 40 GiB of bfloat16, room for nine such prompts.
    return alone | {"64 x 32768, 20000 blocks": Load(64, 32768, 256, 8192, num_blocks=20000)}


def measure_engine(model: Path, load: Load, num_rounds: int) -> dict[str, Any]:
    """A load's entry in the report; each round begins with another setup."""
    said: dict[str, list[Mapping[str, Any]]] = {setup.name: [] for setup in SETUPS}
    for i in range(num_rounds):
        for setup in (*SETUPS[i % len(SETUPS) :], *SETUPS[: i % len(SETUPS)]):
            task = {"model": str(model), "setup": asdict(setup), "load": asdict(load)}
            said[setup.name].append(run_in_child("benchmarks.gpu_engine", task, ENVIRONMENT))
            print(f"round {i + 1}, {setup.name}: {said[setup.name][-1]}", file=sys.stderr, flush=True)
    return {"load": asdict(load), "setups": summarise(ENGINE_FIGURES, asdict(load), SETUPS, said)}


def write_config(directory: Path) -> Path:
    """A directory with the model's config.json and no weights."""
    shape = MODELS[MODEL]
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    ).save_pretrained(directory)
    return directory


def require_gpu() -> torch.device:
    """The GPU.

    Raises:
        NoGPU: there is none.
    """
    if not torch.cuda.is_available():
        raise NoGPU(
            "benchmarks.gpu needs a CUDA GPU and torch sees none here; what runs without one is `make bench` and "
            "`python -m benchmarks.model`, a prediction"
        )
    return torch.device("cuda")


def describe_gpu() -> dict[str, Any]:
    """Name, memory and capability of the GPU, and what drives it."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "driver, clock, power": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def check_kernels() -> int:
    """Tests of the kernels that passed on this GPU.

    Raises:
        RuntimeError: some did not.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "-m", "gpu"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    *_, last = done.stdout.splitlines() or [""]
    if done.returncode != 0 or " passed" not in last:
        tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"the kernels' tests do not pass on this GPU, so nothing is measured:\n{tail}")
    return int(last.split(" passed")[0].split()[-1])


def tables(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and Markdown of each part the report has."""
    found = []
    if "kernels" in report:
        missing = "".join(f"; without {name}" for name in report["kernels"]["left_out"])
        found.append((f"Kernels, by the bytes that must move{missing}", _kernel_table(report["kernels"])))
    for name, entry in report.get("engine", {}).items():
        found.append((f"Engine, {name} prompt tokens", _engine_table(entry)))
    return found


def _kernel_table(kernels: Mapping[str, Any]) -> str:
    bandwidth = kernels["copy_bytes_per_s"]
    rows = [["copy", f"{COPY_BYTES} bytes", "", f"{bandwidth / 1e9:.0f}", "100 %", ""]]
    for row in kernels["rows"]:
        speed, other = row["num_bytes"] / row["seconds"], row["torch_seconds"]
        faster = "" if other is None else f"{other / row['seconds']:.2f}"
        cells = [f"{row['seconds'] * 1e6:.1f}", f"{speed / 1e9:.0f}", f"{speed / bandwidth:.0%}", faster]
        rows.append([row["op"], row["shape"], *cells])
    return format_table(["kernel", "inputs", "us", "GB/s", "of a copy's", "times as fast as torch"], rows)


def _engine_table(entry: Mapping[str, Any]) -> str:
    header = ["", *(cell for name in ENGINE_FIGURES for cell in _headings(name))]
    rows = []
    for name, setup in entry["setups"].items():
        if "refused" in setup:
            rows.append([name, setup["refused"], *[""] * (len(header) - 2)])
            continue
        rows.append([name, *(cell for figure in ENGINE_FIGURES for cell in _cells(figure, setup["figures"]))])
    return format_table(header, rows)


def _headings(name: str) -> Sequence[str]:
    return [FIGURES[name].heading, *(["ratio"] if FIGURES[name].better else [])]


def _cells(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
    figure, found = FIGURES[name], figures.get(name)
    if found is None:
        return [""] * len(_headings(name))
    ratio = found.get("ratio_to_plain")
    value = figure.form(found["median"])
    return [value, *([f"{ratio['median']:.2f}" if ratio else ""] if figure.better else [])]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small loads, one round: does it run at all")
    parser.add_argument("--rounds", type=int, default=2, help="processes per configuration and load")
    parser.add_argument("--json", type=Path, help="file to write after each load")
    args = parser.parse_args()
    try:
        device = require_gpu()
        report: dict[str, Any] = {
            "benchmark": "gpu",
            "command": describe_command(),
            "quick": args.quick,
            "environment": describe_environment(),
            "gpu": describe_gpu(),
            "kernel_tests_passed": check_kernels(),
        }
    except (NoGPU, RuntimeError) as error:
        sys.exit(str(error))
    if "kernels" in args.part:
        report["kernels"] = measure_kernels(device, 8000 if args.quick else 128_000)
        _write(args.json, report)
        torch.cuda.empty_cache()
    if "engine" in args.part:
        report["engine"] = {}
        with tempfile.TemporaryDirectory() as directory:
            model = write_config(Path(directory))
            for name, load in engine_loads(quick=args.quick).items():
                report["engine"][name] = measure_engine(model, load, 1 if args.quick else args.rounds)
                _write(args.json, report)
    for title, markdown in tables(report):
        print(f"\n{title}\n\n{markdown}")
    print(f"\n{json.dumps(report)}")


def _write(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(f"{json.dumps(report, indent=1)}\n")


if __name__ == "__main__":
    main()
