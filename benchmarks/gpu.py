"""What kernels and engine do on a GPU: one command for a host that has one. It has not been run yet.

python -m benchmarks.gpu [--part kernels engine] [--quick] [--rounds N] [--json FILE]

kernels: the time of each Triton kernel, beside that of a copy of the bytes it cannot do without, and torch's way where
there is one. Medians of CUDA events.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.child import run_in_child
from benchmarks.environment import describe_command, describe_environment
from benchmarks.roofline import MODELS
from benchmarks.speed.load import FP8, PLAIN, SNAPKV, Load, Setup
from benchmarks.speed.summary import FIGURES, summarise
from benchmarks.table import format_table
from fastkv_vllm.codecs import CODECS, Codec, EntryShape
from fastkv_vllm.codecs.affine import CHANNELS
from fastkv_vllm.kernels.column_sums import age_weights, column_sums
from fastkv_vllm.kernels.compact import compact
from fastkv_vllm.kernels.encoded_attention import PagedEntries, encoded_attention
from fastkv_vllm.kernels.page_tables import page_tables
from fastkv_vllm.kernels.propagate import gather_stream
from fastkv_vllm.kernels.quantise import dequantise, quantise
from fastkv_vllm.kernels.select import select
from fastkv_vllm.kernels.window_scores import paged_window_scores

MODEL = "llama-3.1-8b"
BLOCK_SIZE = 16
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


@dataclass(frozen=True)
class KernelCase:
    """A kernel with inputs of a real size.

    Fields:
        op: folder of `fastkv_vllm/kernels/`.
        shape: of the inputs, for the table.
        run: one call.
        num_bytes: what any way of doing it must read and write.
        rival: what torch has for it; None: nothing alike.
    """

    op: str
    shape: str
    run: Callable[[], object]
    num_bytes: int
    rival: Callable[[], object] | None = None


def kernel_cases(device: torch.device, num_tokens: int) -> list[KernelCase]:
    """Kernels on a layer of the model with a prompt of so many tokens, a multiple of 160."""
    shape = MODELS[MODEL]
    heads, group, dim = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim
    made = {"device": device, "dtype": torch.bfloat16}
    num_blocks, num_kept, rows = num_tokens // BLOCK_SIZE, num_tokens // 10, shape.num_layers * heads
    pages = torch.randn(num_blocks * heads, BLOCK_SIZE, 2 * dim, **made)
    tables = (torch.arange(num_blocks, device=device) * heads + torch.arange(heads, device=device).unsqueeze(1)).int()
    window, queries = torch.randn(1, 32, heads * group, dim, **made), torch.randn(512, heads * group, dim, **made)
    keys = torch.randn(heads, num_tokens, dim, **made)
    scores = torch.randn(rows, num_tokens, device=device)
    hidden, residual = torch.randn(2, num_tokens, shape.hidden_size, **made)
    chosen = torch.randperm(num_tokens, device=device)[: num_tokens // 5].sort().values
    read_keys, text = heads * num_tokens * dim * 2, f"{num_tokens} tokens"
    num_keys = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    weights = age_weights(len(queries), 1.0, device)
    return [
        KernelCase(
            "window_scores",
            f"32 queries, {heads} heads, {text}",
            lambda: paged_window_scores(
                window, pages, tables.unsqueeze(0), num_keys, max_num_keys=num_tokens, kernel_size=7, pooling="max"
            ),
            read_keys,
        ),
        KernelCase(
            "column_sums",
            f"{len(queries)} queries, {heads} heads, {text}",
            lambda: column_sums(queries, keys, start=num_tokens - len(queries), weights=weights),
            read_keys,
        ),
        KernelCase(
            "select",
            f"{num_kept} of {num_tokens}, {rows} rows",
            lambda: select(scores, num_kept),
            rows * (num_tokens * 4 + num_kept * 8),
            lambda: scores.topk(num_kept).indices.sort().values,
        ),
        _compact_case(pages, heads, num_tokens, num_kept),
        _page_tables_case(device, shape.num_layers, heads, num_blocks),
        KernelCase(
            "propagate",
            f"{len(chosen)} of {num_tokens} rows of {shape.hidden_size}",
            lambda: gather_stream(hidden[:0], hidden, residual, chosen),
            3 * len(chosen) * shape.hidden_size * 2,
            lambda: (hidden + residual)[chosen],
        ),
        *_quantise_cases(keys),
        *(_encoded_attention_case(keys, group, codec) for codec in ("int4", "fp8", "kivi4", "int4x2", "skvq")),
    ]


def _compact_case(pages: torch.Tensor, heads: int, num_tokens: int, num_kept: int) -> KernelCase:
    """Chosen entries of each head to the last pages of its prompt."""
    device, size = pages.device, BLOCK_SIZE
    num_pages = num_kept // size
    kept = torch.stack(
        [torch.randperm(num_tokens, device=device)[: num_pages * size].sort().values for _ in range(heads)]
    )
    head = torch.arange(heads, device=device).unsqueeze(1)
    sources = ((kept // size * heads + head) * size + kept % size).view(heads * num_pages, size)
    last = torch.arange(num_tokens // size - num_pages, num_tokens // size, device=device)
    destinations = (last * heads + head).flatten()
    starts = torch.arange(heads + 1, device=device) * num_pages
    cache = pages.unsqueeze(1)
    flat = pages.view(-1, pages.shape[-1])

    def by_torch() -> None:
        pages[destinations] = flat[sources]

    return KernelCase(
        "compact",
        f"{num_pages * size} of {num_tokens} entries, {heads} heads",
        lambda: compact(cache, sources, destinations, starts=starts),
        2 * sources.numel() * pages.shape[-1] * pages.element_size(),
        by_torch,
    )


def _quantise_cases(keys: torch.Tensor) -> list[KernelCase]:
    """The keys of a layer as codec int4 stores them, and back."""
    groups = keys.flatten(0, 1).unflatten(1, (-1, CHANNELS))
    data = quantise(groups, 4)
    shape = f"{keys.shape[0]} heads, {keys.shape[1]} tokens"
    return [
        KernelCase(
            "quantise",
            f"{shape}, to 4 bits",
            lambda: quantise(groups, 4),
            groups.numel() * groups.element_size() + data.numel(),
            lambda: quantise(groups, 4, impl="reference"),
        ),
        KernelCase(
            "quantise",
            f"{shape}, back",
            lambda: dequantise(data, 4),
            data.numel() + groups.numel() * 4,
            lambda: dequantise(data, 4, impl="reference"),
        ),
    ]


def _encoded_attention_case(keys: torch.Tensor, group: int, name: str) -> KernelCase:
    """A decode step of 8 requests that hold entries of a codec, a tenth of a prompt, and 64 as they are."""
    num_reqs, num_dense, codec, exact = 8, 64, CODECS[name], CODECS["exact"]
    heads, num_tokens, dim = keys.shape
    num_kept, num_sequences = num_tokens // 10 // codec.group_size * codec.group_size, num_reqs * heads
    vectors, entry = keys[:, :num_kept].flatten(0, 1), EntryShape(dim, keys.dtype)
    data = codec.encode(vectors, vectors).unflatten(0, (heads, -1))
    encoded = data.flatten(1).repeat(num_reqs, 1)
    dense = keys.new_ones(num_sequences, num_dense * 2 * dim).view(torch.uint8)
    tables = torch.arange(num_sequences, dtype=torch.int32, device=keys.device).unsqueeze(1)

    def part(pages: torch.Tensor, length: int, of: Codec) -> PagedEntries:
        lengths = torch.full_like(tables[:, 0], length)
        return PagedEntries(pages, tables, lengths, of.form(entry), partial(of.decode, entry=entry))

    parts = [part(encoded, num_kept, codec), part(dense, num_dense, exact)]
    queries = keys.new_ones(num_sequences, group, dim)
    return KernelCase(
        "encoded_attention",
        f"{num_reqs} requests, {heads} heads, {num_kept} {name} entries and {num_dense} as they are",
        lambda: encoded_attention(queries, parts, scale=dim**-0.5),
        encoded.numel() + dense.numel(),
    )


def _page_tables_case(device: torch.device, num_layers: int, heads: int, num_blocks: int) -> KernelCase:
    """A request that holds a tenth of its prompt's pages begins another block."""
    num_held, num_since = num_blocks // 10, 8
    whole = {"dtype": torch.int64, "device": device}
    held = torch.randint(num_blocks, (num_layers, heads, num_held), **whole)
    counts = torch.full((num_layers, heads), num_held, **whole)
    blocks = torch.randint(num_blocks, (num_since,), dtype=torch.int32, device=device)
    first = torch.arange(num_layers, **whole) * num_blocks * heads
    out = torch.zeros(num_layers, heads, num_held + num_since, dtype=torch.int32, device=device)
    return KernelCase(
        "page_tables",
        f"{num_layers} layers, {heads} heads, {num_held} pages each",
        lambda: page_tables(held, counts, blocks, first=first, out=out),
        held.numel() * 12,
    )


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
    return {"copy_bytes_per_s": 2 * COPY_BYTES / copy_s, "rows": rows}


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
        found.append(("Kernels, by the bytes that must move", _kernel_table(report["kernels"])))
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
