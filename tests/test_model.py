"""The roofline's arithmetic, against values worked out by hand."""

import dataclasses
import json
import re
import shlex
from math import inf
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model
from benchmarks.roofline import (
    DEVICES,
    MODELS,
    Comparison,
    Device,
    Kind,
    ModelShape,
    Operation,
    Setting,
    Workload,
    block_bytes,
    compare_measured,
    compare_published,
    decode_operations,
    pool_blocks,
    predict,
    prefill_operations,
    room_for,
    setting_of,
)
from fastkv_vllm.config import CompressionConfig

PAGE = Path(__file__).parents[1] / "docs/planning.md"
TINY = ModelShape(
    num_layers=4,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    intermediate_size=16,
    vocab_size=32,
)
LLAMA = MODELS["llama-3.1-8b"]
PLAIN = Setting("plain")
COMPUTE_ONLY = Device(
    "compute only",
    bf16_flops=1e12,
    fp8_flops=None,
    memory_bytes=0,
    memory_bytes_per_s=inf,
    link_bytes_per_s=inf,
    linear_fraction=1,
    attention_fraction=1,
)


def compressing(name: str = "fastkv", retention_ratio: float = 0.1, tsp_ratio: float = 0.2) -> Setting:
    return setting_of(name, retention_ratio=retention_ratio, tsp_ratio=tsp_ratio)


def only(operations: list[Operation], name: str) -> Operation:
    (found,) = [operation for operation in operations if operation.name == name]
    return found


def total(operations: list[Operation], name: str) -> float:
    return sum(operation.count * operation.flops for operation in operations if operation.name == name)


def test_parameters_of_a_tiny_shape() -> None:
    assert TINY.layer_weights(1) == 192 + 384  # 8 * 2 * (2 * 4 + 2 * 2) and 3 * 8 * 16
    assert TINY.num_parameters == 4 * (576 + 2 * 8) + 8 + 2 * 32 * 8
    assert dataclasses.replace(TINY, tied=True).num_parameters == TINY.num_parameters - 32 * 8


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.6e9), ("qwen3-8b", 8.2e9), ("qwen3-32b", 32.8e9)],
)
def test_parameters_of_public_models(name: str, published: float) -> None:
    assert MODELS[name].num_parameters == pytest.approx(published, rel=0.01)


def test_parameters_of_llama_are_exact() -> None:
    assert LLAMA.num_parameters == 8_030_261_248


def test_shape_from_config() -> None:
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    assert ModelShape.from_config(config) == TINY
    assert ModelShape.from_config({**config, "quantization_config": {"quant_method": "fp8"}}).weight_bytes == 1
    assert ModelShape.from_config({**config, "head_dim": 16}).head_dim == 16
    with pytest.raises(ValueError, match="vocab_size missing"):
        ModelShape.from_config({name: value for name, value in config.items() if name != "vocab_size"})
    with pytest.raises(NotImplementedError, match="num_experts"):
        ModelShape.from_config({**config, "num_experts": 8})
    with pytest.raises(NotImplementedError, match="sliding window"):
        ModelShape.from_config({**config, "sliding_window": 4096})
    with pytest.raises(NotImplementedError, match="'awq'"):
        ModelShape.from_config({**config, "quantization_config": {"quant_method": "awq"}})


def test_prefill_of_a_tiny_shape() -> None:
    operations = prefill_operations(TINY, PLAIN, Workload(10))
    linear, attention, output = (only(operations, name) for name in ("linear", "attention", "output"))
    assert (linear.count, linear.flops) == (4, 2 * 576 * 10)
    assert linear.memory_bytes == 576 * 2 + 10 * (32 + 24 + 48) * 2
    assert (attention.count, attention.flops) == (4, 4 * 4 * 2 * 55)  # 55 of 10 x 10 pairs are causal
    assert attention.memory_bytes == 2 * 10 * 2 * (4 * 2 + 2 * 2)
    assert (output.flops, output.memory_bytes) == (2 * 8 * 32, 8 * 32 * 2)


def test_decode_of_a_tiny_shape() -> None:
    operations = decode_operations(TINY, PLAIN, Workload(7, batch=3, generated=3))
    attention = only(operations, "attention")
    assert (attention.count, attention.flops) == (4, 4 * 4 * 2 * 10 * 3)
    assert attention.memory_bytes == 2 * 2 * 2 * 10 * 3 * 2  # keys and values, 2 heads of 2, 10 entries, 3 requests
    assert only(operations, "linear").memory_bytes == 576 * 2 + 3 * (32 + 24 + 48) * 2
    halved = decode_operations(TINY, Setting("fp8", kv_bytes=1), Workload(7, batch=3, generated=3))
    assert 2 * only(halved, "attention").memory_bytes == attention.memory_bytes


def test_costs_of_compressing_a_tiny_shape() -> None:
    setting = compressing()
    operations = prefill_operations(TINY, setting, Workload(1024))
    early, late = (operation for operation in operations if operation.name == "scoring")
    assert (early.count, late.count) == (2, 2)
    assert early.flops == 2 * 8 * 4 * 2 * 1024  # a window of 8
    assert early.memory_bytes == 1024 * 2 * (2 * 2 + 8)
    assert late.flops == 2 * 8 * 4 * 2 * 204
    assert only(operations, "moving").memory_bytes == 4 * 2 * 2 * 2 * 112  # 102 entries are 7 blocks of 16
    assert only(operations, "stash").memory_bytes == 2 * (1024 + 204) * 8 * 2
    assert only(decode_operations(TINY, setting, Workload(1024)), "attention").flops == 4 * 4 * 2 * 112


def test_cuts_of_a_tiny_shape() -> None:
    config = CompressionConfig("fastkv", retention_ratio=0.1, tsp_layer=(0, 2), tsp_ratio=(0.5, 0.25))
    setting = Setting("cuts", config)
    assert setting.rows_of_layers(TINY, 1024) == {1024: 1, 512: 2, 256: 1}
    operations = prefill_operations(TINY, setting, Workload(1024, tensor_parallel=2))
    assert only(operations, "stash").memory_bytes == 2 * (1024 + 512 + 256) * 8 * 2
    assert [o.link_bytes for o in operations if o.name == "sum of scores"] == [1024 * 4, 512 * 4]


def test_what_is_read_again_passes_all_layers() -> None:
    """The long prompt three layers of four, as many tokens as stay all of them; the last query looks in one layer."""
    setting = setting_of("gemfilter", retention_ratio=0.25, tsp_ratio=0.5, tsp_layer=2)
    assert setting.rows_of_layers(TINY, 1024) == {1024: 3, 256: 4}
    operations = prefill_operations(TINY, setting, Workload(1024, tensor_parallel=2))
    names = {"linear", "sums over ranks", "attention", "scoring", "sum of scores", "output"}
    assert {operation.name for operation in operations} == names
    scoring = only(operations, "scoring")
    assert (scoring.count, scoring.flops) == (1, 2 * 2 * 2 * 1024)
    assert only(operations, "sum of scores").link_bytes == 1024 * 4


def test_streamingllm_scores_nothing() -> None:
    names = {operation.name for operation in prefill_operations(TINY, compressing("streamingllm"), Workload(1024))}
    assert names == {"linear", "sums over ranks", "attention", "moving", "output"}


def test_an_operation_takes_its_slowest_part() -> None:
    device = Device(
        "round figures",
        bf16_flops=1000,
        fp8_flops=2000,
        memory_bytes=0,
        memory_bytes_per_s=100,
        link_bytes_per_s=10,
        linear_fraction=0.5,
        fp8_fraction=0.5,
        attention_fraction=0.25,
        memory_fraction=0.8,
        link_fraction=0.5,
    )
    assert device.seconds(Operation("compute", flops=1000, memory_bytes=80, count=3)) == 3 * 2
    assert device.seconds(Operation("fp8", Kind.LINEAR_FP8, flops=1000)) == 1
    assert device.seconds(Operation("attention", Kind.ATTENTION, flops=1000)) == 4
    assert device.seconds(Operation("memory", flops=1000, memory_bytes=400)) == 5
    assert device.seconds(Operation("link", flops=1000, memory_bytes=400, link_bytes=50)) == 10
    without = dataclasses.replace(device, fp8_flops=None)
    assert without.seconds(Operation("fp8 as bf16", Kind.LINEAR_FP8, flops=1000)) == 2


def test_tsp_gain_has_its_two_limits() -> None:
    """Half of the layers at t = 0.2: 1 / 0.6 where products dominate, 1 / 0.52 where attention does."""
    plain, fastkv = (prefill_operations(LLAMA, s, Workload(10**6)) for s in (PLAIN, compressing()))
    assert total(plain, "linear") / total(fastkv, "linear") == pytest.approx(1 / 0.6, rel=1e-3)
    assert total(plain, "attention") / total(fastkv, "attention") == pytest.approx(1 / 0.52, rel=1e-3)


@pytest.mark.parametrize(("context", "gain"), [(1024, 1 / 0.6), (10**8, 1 / 0.52)])
def test_ttft_reaches_the_limits(context: int, gain: float) -> None:
    plain, fastkv = (predict(LLAMA, COMPUTE_ONLY, s, Workload(context)).ttft_s for s in (PLAIN, compressing()))
    assert plain / fastkv == pytest.approx(gain, rel=0.01)


def test_nothing_dropped_is_plain() -> None:
    workload = Workload(8192, batch=2, generated=5)
    kept = predict(LLAMA, DEVICES["h100"], compressing(retention_ratio=1.0, tsp_ratio=1.0), workload)
    assert kept == predict(LLAMA, DEVICES["h100"], PLAIN, workload)


def test_prompts_left_alone_cost_what_plain_costs() -> None:
    workload = Workload(500)
    kept, plain = (predict(LLAMA, DEVICES["h100"], setting, workload) for setting in (compressing(), PLAIN))
    assert (kept.ttft_s, kept.tpot_s) == (plain.ttft_s, plain.tpot_s)


def test_two_ranks_halve_work_and_cache() -> None:
    for operations_of in (prefill_operations, decode_operations):
        one, two = (operations_of(LLAMA, PLAIN, Workload(4096, tensor_parallel=p)) for p in (1, 2))
        for name in ("linear", "attention", "output"):
            assert only(one, name).flops == 2 * only(two, name).flops
        assert only(one, "attention").memory_bytes == 2 * only(two, "attention").memory_bytes
        assert only(one, "sums over ranks").link_bytes == 0
        assert only(two, "sums over ranks").count == 2 * 32
    rows = 4096 * 4096 * 2
    assert (
        only(prefill_operations(LLAMA, PLAIN, Workload(4096, tensor_parallel=2)), "sums over ranks").link_bytes == rows
    )
    assert block_bytes(LLAMA, PLAIN, 1) == 2 * block_bytes(LLAMA, PLAIN, 2) == 2 * 2**20
    assert block_bytes(LLAMA, PLAIN, 8) == block_bytes(LLAMA, PLAIN, 16)  # more ranks than KV heads: copies
    with pytest.raises(ValueError, match="evenly"):
        predict(LLAMA, DEVICES["h100"], PLAIN, Workload(4096, tensor_parallel=3))


@pytest.mark.parametrize("name", ["snapkv", "fastkv"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_more_requests_fit_the_less_is_kept(name: str, block_size: int) -> None:
    ratios = (0.05, 0.1, 0.2, 0.5, 0.9, 1.0)
    rooms = []
    for ratio in ratios:
        setting = setting_of(name, retention_ratio=ratio, tsp_ratio=max(ratio, 0.2), block_size=block_size)
        workload = Workload(8192, generated=100)
        rooms.append(room_for(setting, workload, 10_000))
    steady = [room.requests_steady for room in rooms]
    assert steady == sorted(steady, reverse=True)
    assert steady[-1] == room_for(Setting("plain", block_size=block_size), workload, 10_000).requests_steady


@pytest.mark.parametrize("context", [1, 513, 8192, 100_003])
@pytest.mark.parametrize("setting", [PLAIN, compressing("snapkv"), compressing()], ids=lambda setting: setting.name)
def test_requests_that_fit_fit(setting: Setting, context: int) -> None:
    workload = Workload(context, generated=77)
    room = room_for(setting, workload, pool_blocks(LLAMA, DEVICES["h100"], setting, workload))
    assert room.requests_steady * room.blocks_steady <= room.pool_blocks
    assert (room.requests_peak - 1) * room.blocks_steady + room.blocks_peak <= room.pool_blocks
    assert room.requests_peak <= room.requests_steady
    assert room.longest_prompt // setting.block_size <= room.pool_blocks


def test_a_prompt_that_does_not_fit_alone_is_not_served() -> None:
    room = room_for(compressing("snapkv"), Workload(8192), 511)  # 512 blocks while it is computed, 52 afterwards
    assert (room.blocks_peak, room.blocks_steady) == (512, 52)
    assert (room.requests_peak, room.requests_steady) == (0, 9)


def test_pool_by_hand() -> None:
    device = dataclasses.replace(COMPUTE_ONLY, memory_bytes=2e9)
    weights, reserve = 2888 * 2, 1e9 + 8192 * (2 * 8 + 3 * 16) * 2
    per_block = 2 * 4 * 2 * 2 * 2 * 16
    expected = int((2e9 * 0.92 - weights - reserve) // per_block) - 1
    assert pool_blocks(TINY, device, PLAIN, Workload(1024)) == expected
    stash = int((2e9 * 0.92 - weights - reserve - 1024 * 8 * 2) // per_block) - 1
    assert pool_blocks(TINY, device, compressing(), Workload(1024)) == stash
    assert pool_blocks(TINY, COMPUTE_ONLY, PLAIN, Workload(1024)) == 0


def test_error_is_relative_to_what_came_out() -> None:
    assert Comparison("", 3, 2).error == 0.5
    table = model.comparison_table(
        [Comparison("a", 3, 2), Comparison("b", 2, 2), Comparison("c", 9, 2, True)], "actual"
    )
    assert re.findall(r"\+\d+% \| +(\w*) \|", table) == ["far", "", "fitted"]


def test_published_ratios_of_ttft_are_met() -> None:
    ratios = [row for row in compare_published() if row.what.startswith("TTFT full / FastKV")]
    assert len(ratios) == 5
    assert all(abs(row.error) < 0.1 for row in ratios)


def report_of_speed() -> dict[str, Any]:
    """A speed.json whose plain prompt took a second and whose plain decode step of four requests 8 ms."""
    config = {"retention_ratio": 0.1, "tsp_layer": 1, "tsp_ratio": 0.2}
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    setups = {"plain": (None, {}), "fastkv": ("fastkv", config), "fp8": (None, {})}

    def case(requests: int, prompt: int, output: int, figures: dict[str, float]) -> dict[str, Any]:
        measured = {name: {"median": value, "ratio_to_plain": {"median": 1.0}} for name, value in figures.items()}
        load = {"num_requests": requests, "prompt_tokens": prompt, "output_tokens": output, "num_blocks": None}
        entries = {n: {"method": m, "config": c, "figures": measured} for n, (m, c) in setups.items()}
        return {"load": load, "setups": entries}

    return {
        "model": {**sizes, "intermediate_size": 128, "vocab_size": 32},
        "block_size": 32,
        "scenarios": {
            "ttft-8192": case(1, 8192, 4, {"first_token_cpu_s": 1.0, "choice_share": 0.0, "compact_share": 0.0}),
            "decode": case(4, 8192, 48, {"step_ms": 8.0}),
        },
    }


def test_missing_measurements_are_named(tmp_path: Path) -> None:
    note = "speed.json: {} not measured, nothing to calibrate with"
    assert compare_measured(tmp_path) == ([], [note.format("ttft-8192, decode")])
    report = report_of_speed()
    del report["scenarios"]["decode"]
    (tmp_path / "speed.json").write_text(json.dumps(report))
    assert compare_measured(tmp_path) == ([], [note.format("decode")])


def test_constants_are_taken_from_plain(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps(report_of_speed()))
    rows, _ = compare_measured(tmp_path)
    fitted = {row.what: row for row in rows if row.calibrated}
    assert set(fitted) == {"TTFT s, plain, 8192 tokens", "decode step ms, plain, 4 x 8192"}
    assert all(row.predicted == pytest.approx(row.actual, rel=0.01) for row in fitted.values())
    gains = {row.what: row.predicted for row in rows if not row.calibrated}
    assert set(gains) == {"TTFT plain / fastkv, 8192 tokens", "decode step of plain / fastkv, 4 x 8192"}
    assert all(1.5 < gain < 10 for gain in gains.values()), gains


def commands_of_page() -> list[str]:
    return re.findall(r"^\.venv/bin/python -m benchmarks\.model (.+)$", PAGE.read_text(), flags=re.MULTILINE)


def test_page_shows_commands() -> None:
    assert any("--compare" in command for command in commands_of_page())


@pytest.mark.parametrize("command", [c for c in commands_of_page() if "--compare" not in c])
def test_tables_of_the_page_are_the_commands(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model", *shlex.split(command)])
    model.main()
    table = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert table in PAGE.read_text(), table


def test_published_table_of_the_page() -> None:
    assert model.comparison_table(compare_published(), "published") in PAGE.read_text()
