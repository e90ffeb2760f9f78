"""Predictions beside this repository's own CPU measurements.

Two constants of the machine are taken from plain vLLM: FLOP/s from its TTFT, bytes/s from its decode steps. Everything
else is predicted with them.
"""

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.roofline.compare import Comparison
from benchmarks.roofline.devices import Device
from benchmarks.roofline.operations import decode_operations, prefill_operations
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.room import room_for
from benchmarks.roofline.setting import Setting, Workload
from benchmarks.roofline.shapes import ModelShape
from fastkv_vllm.config import CompressionConfig

REPORT = "speed.json"
FITTED_TTFT, FITTED_DECODE = "ttft-8192", "decode"  # cases the two constants are taken from
PLAIN = "plain"


@dataclass(frozen=True)
class _Case:
    """One load of the report: its shape, what was measured by setup, and how much each gained over plain vLLM."""

    name: str
    load: dict[str, Any]
    setups: dict[str, dict[str, Any]]

    def value(self, setup: str, figure: str) -> float | None:
        found = self.setups[setup].get("figures", {}).get(figure)
        return None if found is None else found["median"]

    def gain(self, setup: str, figure: str) -> float | None:
        found = self.setups[setup].get("figures", {}).get(figure, {}).get("ratio_to_plain")
        return None if found is None else found["median"]

    @property
    def ours(self) -> dict[str, dict[str, Any]]:
        """Setups a roofline tells apart: plain vLLM and those that compress."""
        return {name: s for name, s in self.setups.items() if name == PLAIN or s["method"] is not None}

    def workload(self, *, batch: int | None = None) -> Workload:
        """Halfway through its answers."""
        return Workload(self.load["prompt_tokens"], batch or self.load["num_requests"], self.load["output_tokens"] // 2)


def compare_measured(results: Path) -> tuple[list[Comparison], list[str]]:
    """Figures of `speed.json`, and notes: the constants, and what was not measured.

    Args:
        results: folder of the file, which may be missing.
    """
    path = results / REPORT
    report = json.loads(path.read_text()) if path.exists() else {"scenarios": {}}
    cases = {name: _Case(name, case["load"], case["setups"]) for name, case in report["scenarios"].items()}
    missing = [name for name in (FITTED_TTFT, FITTED_DECODE) if name not in cases]
    if missing:
        return [], [f"{REPORT}: {', '.join(missing)} not measured, nothing to calibrate with"]
    shape, block_size = ModelShape.from_config(report["model"]), report["block_size"]
    device, note = _calibrate(shape, cases)
    rows: list[Comparison] = []
    for name, case in cases.items():
        if name.startswith("ttft-"):
            rows += _compare_ttft(shape, device, case, block_size)
        if name == FITTED_DECODE or name.startswith("tpot-"):
            rows += _compare_decode(shape, device, case, block_size)
        if name == "pool":
            rows += _compare_pool(shape, device, case, block_size)
    return rows, [note]


def _calibrate(shape: ModelShape, cases: dict[str, _Case]) -> tuple[Device, str]:
    """The machine's FLOP/s and bytes/s, and a line that says so."""
    plain, prefill, decode = Setting(PLAIN), cases[FITTED_TTFT], cases[FITTED_DECODE]
    operations = prefill_operations(shape, plain, Workload(prefill.load["prompt_tokens"]))
    flops_per_s = sum(o.count * o.flops for o in operations) / _measured(prefill, "first_token_cpu_s")
    operations = decode_operations(shape, plain, decode.workload())
    bytes_per_s = sum(o.count * o.memory_bytes for o in operations) / (_measured(decode, "step_ms") / 1e3)
    device = Device(
        "calibrated",
        bf16_flops=flops_per_s,
        fp8_flops=None,
        memory_bytes=0,
        memory_bytes_per_s=bytes_per_s,
        link_bytes_per_s=inf,
        linear_fraction=1,
        attention_fraction=1,
        memory_fraction=1,
    )
    return device, (
        f"calibrated: {flops_per_s / 1e9:.1f} GFLOP/s from plain TTFT ({FITTED_TTFT}), {bytes_per_s / 1e9:.1f} GB/s "
        f"from plain decode ({FITTED_DECODE})"
    )


def _measured(case: _Case, figure: str) -> float:
    value = case.value(PLAIN, figure)
    assert value is not None, f"{case.name} has no {figure} of plain vLLM"
    return value


def _compare_ttft(shape: ModelShape, device: Device, case: _Case, block_size: int) -> list[Comparison]:
    """TTFT of plain vLLM; of each method its ratio to plain, and the shares of scoring and moving."""
    at, workload = f"{case.load['prompt_tokens']} tokens", Workload(case.load["prompt_tokens"])
    plain = predict(shape, device, Setting(PLAIN), workload)
    fitted = case.name == FITTED_TTFT
    rows = [Comparison(f"TTFT s, plain, {at}", plain.ttft_s, _measured(case, "first_token_cpu_s"), fitted)]
    for name, setup in case.ours.items():
        gain = case.gain(name, "first_token_cpu_s")
        if name == PLAIN or gain is None:
            continue
        ours = predict(shape, device, _setting(name, setup, block_size), workload)
        rows.append(Comparison(f"TTFT plain / {name}, {at}", plain.ttft_s / ours.ttft_s, gain))
        rows += _compare_shares(f"{name}, {at}", ours, case, name)
    return rows


def _compare_shares(what: str, ours: Prediction, case: _Case, setup: str) -> list[Comparison]:
    return [
        Comparison(f"{name} % of TTFT, {what}", 100 * ours.prefill_s[name] / ours.ttft_s, 100 * share)
        for name, key in (("scoring", "choice_share"), ("moving", "compact_share"))
        if name in ours.prefill_s and (share := case.value(setup, key))
    ]


def _compare_decode(shape: ModelShape, device: Device, case: _Case, block_size: int) -> list[Comparison]:
    """Milliseconds of a plain step of all requests, and each method's gain over it."""
    at = f"{case.load['num_requests']} x {case.load['prompt_tokens']}"
    plain = predict(shape, device, Setting(PLAIN), case.workload()).tpot_s
    fitted = case.name == FITTED_DECODE
    rows = [Comparison(f"decode step ms, plain, {at}", plain * 1e3, _measured(case, "step_ms"), fitted)]
    for name, setup in case.ours.items():
        gain = case.gain(name, "step_ms")
        if name != PLAIN and gain is not None:
            step = predict(shape, device, _setting(name, setup, block_size), case.workload()).tpot_s
            rows.append(Comparison(f"decode step of plain / {name}, {at}", plain / step, gain))
    return rows


def _compare_pool(shape: ModelShape, device: Device, case: _Case, block_size: int) -> list[Comparison]:
    """Requests at once, and gains of tokens per second over plain, in a pool that holds few plain requests."""
    load = case.load
    requests, prompt, output = load["num_requests"], load["prompt_tokens"], load["output_tokens"]
    rows: list[Comparison] = []
    rates: dict[str, dict[str, float]] = {}
    for name, setup in case.ours.items():
        setting = _setting(name, setup, block_size)
        # One block is vLLM's null block.
        room = room_for(setting, Workload(prompt, generated=output), load["num_blocks"] - 1)
        batch = min(requests, room.requests_steady)
        decode = batch / predict(shape, device, setting, case.workload(batch=batch)).tpot_s
        total_s = requests * (predict(shape, device, setting, Workload(prompt)).ttft_s + output / decode)
        rates[name] = {"tokens_per_s": requests * (prompt + output) / total_s, "decode_tokens_per_s": decode}
        at_once = case.value(name, "peak_running")
        if at_once is not None:
            rows.append(Comparison(f"pool: requests at once, {name}", batch, at_once))
        for figure, rate in rates[name].items():
            what, gain = f"pool: {figure.removesuffix('_per_s').replace('_', ' ')}/s", case.gain(name, figure)
            if name == PLAIN:
                rows.append(Comparison(f"{what}, plain", rate, _measured(case, figure)))
            elif gain is not None:
                rows.append(Comparison(f"{what}, {name} / plain", rate / rates[PLAIN][figure], gain))
    return rows


def _setting(name: str, setup: dict[str, Any], block_size: int) -> Setting:
    method = setup["method"]
    compression = None if method is None else CompressionConfig.from_mapping(method, setup["config"])
    return Setting(name, compression, block_size=block_size)
