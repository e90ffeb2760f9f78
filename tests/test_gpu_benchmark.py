"""The benchmark for GPUs as far as it goes without one: its calls, its tables, and what it says where there is none."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_kernels
from benchmarks.speed.summary import summarise
from benchmarks.table import format_table


def test_a_host_without_a_gpu_gets_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("benchmarks.gpu needs a CUDA GPU and torch sees none here; ")


def test_each_kernel_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference's form; where torch has a way of its own, it gives the same."""
    monkeypatch.setattr(gpu, "COPY_BYTES", 64)
    monkeypatch.setattr(gpu, "seconds_of", lambda run: (run() is not None and 1.0) or 2.0)
    kernels = gpu.measure_kernels(torch.device("cpu"), 800)
    assert [row["op"] for row in kernels["rows"]] == [
        "window_scores",
        "column_sums",
        "select",
        "compact",
        "page_tables",
        "propagate",
        *["merge_layers"] * 2,
        "quantise",
        "quantise",
        *["encoded_attention"] * 5,
    ]
    assert all(row["num_bytes"] > 0 for row in kernels["rows"])
    assert kernels["left_out"] == gpu_kernels.left_out() == ["the CUDA library (make csrc)", "xformers"]
    cases = {case.op: case for case in gpu_kernels.kernel_cases(torch.device("cpu"), 800)}
    for op in ("select", "propagate"):
        assert torch.equal(cases[op].run(), cases[op].rival())


def test_xformers_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its documentation has it: groups of heads in a dimension of their own, lengths of log-sum-exps rounded up."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *, attn_bias: str, scale: float) -> tuple[Tensor, Tensor]:
        assert attn_bias == "from the bottom right" and key.shape == value.shape
        logits = torch.einsum("bmghd,bnghd->bghmn", query.float(), key.float()) * scale
        num_queries, num_keys = logits.shape[3:]
        logits = logits.masked_fill(torch.ones(num_queries, num_keys).triu(1 + num_keys - num_queries) > 0, -torch.inf)
        return query, torch.nn.functional.pad(logits.logsumexp(-1), (0, 32))

    bias = SimpleNamespace(LowerTriangularFromBottomRightMask=lambda: "from the bottom right")
    fmha = SimpleNamespace(memory_efficient_attention_forward_requires_grad=attention, attn_bias=bias)
    monkeypatch.setattr(gpu_kernels, "_has_xformers", lambda: True)
    monkeypatch.setattr(gpu_kernels, "import_module", {"xformers.ops.fmha": fmha}.__getitem__)
    ours, theirs = (case for case in gpu_kernels.kernel_cases(torch.device("cpu"), 800) if case.op == "window_scores")
    assert "xformers" in theirs.shape
    torch.testing.assert_close(theirs.run(), ours.run())


def test_tables_of_a_recorded_outcome() -> None:
    """Figures made up: 3 TB/s of copies, fastkv twice as fast to its first token, a rival that is refused."""
    raw = {"blocks_before": 9, "blocks_after": 3, "peak_running": 1, "num_preemptions": 0}
    said = {
        "plain": [raw | {"first_token_wall_s": 2.0, "wall_s": 3.27}] * 2,
        "fastkv": [raw | {"first_token_wall_s": 1.0, "wall_s": 1.635}] * 2,
        "snapkv": [raw | {"first_token_wall_s": 2.5, "wall_s": 3.135}] * 2,
        "fp8": [{"refused": "ValueError: not here"}] * 2,
    }
    load = {"num_requests": 1, "prompt_tokens": 8192, "output_tokens": 128}
    rows = [
        {"op": "select", "shape": "800 of 8000", "num_bytes": 3 * 10**8, "seconds": 2e-4, "torch_seconds": 1e-3},
        {"op": "compact", "shape": "800 entries", "num_bytes": 3 * 10**8, "seconds": 1e-4, "torch_seconds": None},
    ]
    report = {
        "kernels": {"copy_bytes_per_s": 3e12, "rows": rows, "left_out": ["xformers"]},
        "engine": {"1 x 8192": {"load": load, "setups": summarise(gpu.ENGINE_FIGURES, load, gpu.SETUPS, said)}},
    }
    (heading, kernels), (title, engine) = gpu.tables(report)
    assert heading == "Kernels, by the bytes that must move; without xformers"
    assert kernels == format_table(
        ["kernel", "inputs", "us", "GB/s", "of a copy's", "times as fast as torch"],
        [
            ["copy", "1073741824 bytes", "", "3000", "100 %", ""],
            ["select", "800 of 8000", "200.0", "1500", "50%", "5.00"],
            ["compact", "800 entries", "100.0", "3000", "100%", ""],
        ],
    )
    assert title == "Engine, 1 x 8192 prompt tokens"
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in engine.splitlines()
    }
    assert cells["plain"][:6] == ["2.00", "1.00", "10.00", "1.00", "2544", "1.00"]
    assert cells["fastkv"][:6] == ["1.00", "2.00", "5.00", "2.00", "5089", "2.00"]
    assert cells["snapkv"][:4] == ["2.50", "0.80", "5.00", "2.00"]
    assert cells["fp8"][0] == "ValueError: not here" and not any(cells["fp8"][1:])


def test_its_loads_fit_the_model() -> None:
    for load in gpu.engine_loads(quick=False).values():
        assert load.most_tokens <= 131_072
