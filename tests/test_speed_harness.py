"""The speed harness: figures, the file that grows, tables, and what it refuses."""

import json

import pytest

from benchmarks.models import LlamaShape, make_random_llama
from benchmarks.speed.exactness import ExactnessFailed, check_exactness
from benchmarks.speed.load import (
    BLOCK_SIZE,
    EVEN_HEADS,
    FASTKV,
    FP8,
    PLAIN,
    PLAIN_REQUESTS,
    RETAINING,
    SNAPKV,
    Counters,
    Load,
    require_done,
)
from benchmarks.speed.report import merge, read_report, tables, write_report
from benchmarks.speed.scenarios import (
    SCENARIOS,
    SHAPE,
    Case,
    chosen_cases,
    measure_engine,
    measure_in_turn,
    scenario_of,
)
from benchmarks.speed.summary import FIGURES, summarise
from fastkv_vllm.config import CompressionConfig

SMALL = LlamaShape(hidden_size=128, head_dim=32, num_attention_heads=4, intermediate_size=256)
LOAD = {"num_requests": 4, "prompt_tokens": 8192, "step_tokens": 2048, "concurrency": None}
STEPS = {"plain": (30.0, 36.0, 31.0), "fastkv": (15.0, 12.0, 31.0)}


def decode_rounds(**steps):
    return {name: [{"step_ms": ms, "peak_running": 4} for ms in values] for name, values in steps.items()}


def decode_entry(**steps):
    setups = summarise(("step_ms", "peak_running"), LOAD, (PLAIN, FASTKV), decode_rounds(**steps))
    return {"label": "4 x 8192", "load": LOAD, "rounds": 3, "setups": setups}


def report_of(**entries):
    fixed = {"benchmark": "speed", "quick": False, "model": {"layers": 16}, "block_size": 32}
    return fixed | {"command": [], "environment": {}, "scenarios": entries}


def test_ratios_are_paired_by_round():
    figure = decode_entry(**STEPS)["setups"]["fastkv"]["figures"]["step_ms"]
    assert figure["values"] == [15.0, 12.0, 31.0]
    assert (figure["median"], figure["range"]) == (15.0, [12.0, 31.0])
    assert figure["ratio_to_plain"]["values"] == [2.0, 3.0, 1.0]
    assert (figure["ratio_to_plain"]["median"], figure["ratio_to_plain"]["range"]) == (2.0, [1.0, 3.0])


def test_a_ratio_above_one_is_better_where_more_is_better():
    rounds = {"plain": [{"cpu_s": 20.0}], "snapkv": [{"cpu_s": 10.0}]}
    load = {"num_requests": 2, "prompt_tokens": 90, "output_tokens": 10}
    figure = summarise(("tokens_per_s",), load, (PLAIN, SNAPKV), rounds)["snapkv"]["figures"]["tokens_per_s"]
    assert (figure["median"], figure["ratio_to_plain"]["median"]) == (20.0, 2.0)


def test_an_entry_has_its_configuration_and_all_raw_rounds():
    setup = decode_entry(**STEPS)["setups"]["fastkv"]
    assert (setup["method"], setup["config"], setup["engine"]) == ("fastkv", FASTKV.config, {})
    assert [raw["step_ms"] for raw in setup["rounds"]] == list(STEPS["fastkv"])


def test_a_figure_without_a_value_is_left_out():
    figures = decode_entry(plain=(30.0,), fastkv=(None,))["setups"]["fastkv"]["figures"]
    assert list(figures) == ["peak_running"]


def test_a_refused_rival_keeps_its_row():
    rounds = {"plain": [{"step_ms": 30.0}], "fp8": [{"refused": "ValueError: no such type"}]}
    setups = summarise(("step_ms",), LOAD, (PLAIN, FP8), rounds)
    assert "figures" not in setups["fp8"]
    ((_, table),) = tables(report_of(decode={"label": "", "load": LOAD, "setups": setups}))
    assert "refused: ValueError: no such type" in table


def test_tables_come_from_the_json_alone():
    report = json.loads(json.dumps(report_of(decode=decode_entry(**STEPS))))
    ((title, table),) = tables(report)
    assert title == SCENARIOS["decode"].title
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert cells[2] == ["4 x 8192", "plain", "31.00 (30.00..36.00)", "1.000"]
    assert cells[3] == ["", "fastkv", "15.00 (12.00..31.00)", "2.000 (1.000..3.000)"]
    assert "differ by up to 20.0%" in table


def test_scoring_and_selecting_are_told_apart_where_they_were_measured():
    raw = {"first_token_wall_s": 2.0, "score_s": 0.2, "select_s": 0.1, "compact_s": 0.5}
    shares = ("choice_share", "score_share", "select_share", "compact_share")
    new = summarise(shares, LOAD, (SNAPKV,), {"snapkv": [raw]})
    figures = new["snapkv"]["figures"]
    old = {"snapkv": {"figures": {name: figures[name] for name in ("choice_share", "compact_share")}}}
    cases = {"ttft-2048": {"label": "old", "setups": old}, "ttft-4096": {"label": "new", "setups": new}}

    def cells(*names):
        ((_, table),) = tables(report_of(**{name: cases[name] | {"load": LOAD} for name in names}))
        return [[cell.strip() for cell in line.split("|")[3:-1]] for line in table.splitlines() if "---" not in line]

    both = ["scoring and selecting", "moving"]
    assert cells("ttft-2048") == [both, ["15.00%", "25.00%"]]
    apart = ["scoring and selecting", "scoring", "selecting", "moving"]
    assert cells("ttft-2048", "ttft-4096") == [
        apart,
        ["15.00%", "", "", "25.00%"],
        ["15.00%", "10.00%", "5.00%", "25.00%"],
    ]


def test_decode_stands_in_the_table_of_tpot():
    entry = decode_entry(**STEPS)
    smaller = entry | {"label": "4 x 2048", "load": LOAD | {"prompt_tokens": 2048}}
    found = dict(tables(report_of(decode=entry, **{"tpot-4x2048": smaller})))
    table = found[SCENARIOS["tpot"].title]
    assert table.index("4 x 2048") < table.index("4 x 8192")


def test_a_file_grows_case_by_case(tmp_path):
    path = tmp_path / "speed.json"
    assert read_report(path) is None
    write_report(path, merge(None, report_of(pool={"old": 1}, decode={"old": 1})))
    write_report(path, merge(read_report(path), report_of(decode={"new": 1})))
    assert read_report(path)["scenarios"] == {"pool": {"old": 1}, "decode": {"new": 1}}


def test_reports_of_other_models_do_not_merge():
    with pytest.raises(ValueError, match=r"model is .*name another file"):
        merge(report_of(), report_of() | {"model": {"layers": 8}})


def test_another_programs_file_is_refused(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text('{"benchmark": "speed", "steps": {}}')
    with pytest.raises(ValueError, match="it has no quick, model"):
        read_report(path)


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "kv-dtypes"])  # that one asks vLLM for its choices
@pytest.mark.parametrize("quick", [True, False])
def test_scenarios_are_whole(name, quick):
    parts = SCENARIOS[name]
    assert set(parts.figures) | {column.removesuffix(" ratio") for column in parts.columns} <= set(FIGURES)
    assert {column.removesuffix(" ratio") for column in parts.columns} <= set(parts.figures)
    for case, details in parts.cases(quick).items():
        assert scenario_of(case) == name
        assert details.setups[0] == (PLAIN_REQUESTS if details.in_turn else PLAIN)
        assert details.load.prompt_tokens + details.load.output_tokens <= SHAPE.max_position_embeddings


def test_cases_are_chosen_by_either_name():
    assert list(chosen_cases(["decode", "ttft-8192"], quick=False)) == ["ttft-8192", "decode"]
    with pytest.raises(ValueError, match="ttft-3: no scenario and no case"):
        chosen_cases(["ttft-3"], quick=False)


def test_a_fixed_pool_has_the_same_bytes_for_all():
    load = Load(1, 1024, 1, num_blocks=80)
    assert (load.blocks_of(PLAIN), load.blocks_of(FP8)) == (80, 160)


DONE = Counters(compressed=3, left_alone=0, tsp_rows_in=300, tsp_rows_out=60)


@pytest.mark.parametrize(
    ("setup", "counters", "num_preemptions"),
    [
        pytest.param(PLAIN, None, 0, id="plain"),
        pytest.param(FASTKV, DONE, 0, id="fastkv"),
        pytest.param(FASTKV, Counters(4, 0, 400, 80), 1, id="fastkv-preempted"),
        pytest.param(SNAPKV, Counters(3, 0, 0, 0), 0, id="snapkv"),
        pytest.param(RETAINING, Counters(0, 3, 0, 0), 0, id="retention-1"),
    ],
)
def test_what_was_asked_for_is_accepted(setup, counters, num_preemptions):
    require_done(setup, counters, num_prompts=3, num_preemptions=num_preemptions)


@pytest.mark.parametrize(
    ("setup", "counters", "message"),
    [
        pytest.param(PLAIN, DONE, "runs a compressing scheduler", id="plain-compresses"),
        pytest.param(FP8, DONE, "runs a compressing scheduler", id="rival-compresses"),
        pytest.param(FASTKV, None, "has no compressing scheduler", id="no-scheduler"),
        pytest.param(FASTKV, Counters(2, 1, 200, 40), "3 prompts to compress", id="one-left-alone"),
        pytest.param(FASTKV, Counters(2, 0, 200, 40), "3 prompts to compress", id="one-missing"),
        pytest.param(FASTKV, Counters(4, 0, 400, 80), "3 prompts to compress", id="one-too-many"),
        pytest.param(FASTKV, Counters(3, 0, 300, 300), "rows that went on", id="nothing-cut"),
        pytest.param(SNAPKV, DONE, "rows that went on", id="snapkv-cuts"),
        pytest.param(RETAINING, Counters(3, 0, 0, 0), "3 prompts to leave alone", id="retention-1-compresses"),
    ],
)
def test_another_engine_than_asked_for_is_refused(setup, counters, message):
    with pytest.raises(RuntimeError, match=message):
        require_done(setup, counters, num_prompts=3, num_preemptions=0)


@pytest.fixture
def fake_tests(tmp_path):
    """A test file of which snapkv's test passes, fastkv's fails and streamingllm has none."""
    path = tmp_path / "test_fake.py"
    path.write_text("def test_snapkv(): pass\ndef test_fastkv(): assert 'rows' == 'other rows'\n")
    return (str(path),)


def test_exactness_counts_passed_tests(fake_tests):
    assert check_exactness(["snapkv"], fake_tests) == {"snapkv": 1}


def test_failing_exactness_stops_with_its_output(fake_tests):
    with pytest.raises(ExactnessFailed, match=r"(?s)fastkv do not pass.*other rows"):
        check_exactness(["snapkv", "fastkv"], fake_tests)


def test_a_method_without_exactness_tests_is_not_measured(fake_tests):
    with pytest.raises(ExactnessFailed, match="streamingllm do not pass"):
        check_exactness(["streamingllm"], fake_tests)


@pytest.mark.slow
@pytest.mark.engine
def test_the_smallest_real_processes(tmp_path):
    model = make_random_llama(tmp_path, SMALL)
    load = Load(1, 1024, 4, 512)
    plain, fastkv = (measure_engine(model, setup, load) for setup in (PLAIN, FASTKV))
    plan = CompressionConfig.from_mapping(FASTKV.method, FASTKV.config).plan(load.prompt_tokens, BLOCK_SIZE)
    whole = load.prompt_tokens // BLOCK_SIZE
    assert (plain["peak_blocks"], plain["blocks_after"]) == (whole, whole)
    assert (fastkv["peak_blocks"], fastkv["blocks_after"]) == (whole, plan.num_pages + (plan.num_tail > 0))
    shares = ("score_s", "select_s", "compact_s")
    assert min(fastkv[share] for share in shares) > 0 == max(plain[share] for share in shares)


@pytest.mark.slow
@pytest.mark.engine
def test_setups_that_take_turns_in_one_engine(tmp_path):
    """Each holds what it alone would hold, though all share one engine and what it counts."""
    load = Load(2, 1024, 4, 512)
    case = Case("", load, (PLAIN_REQUESTS, SNAPKV, EVEN_HEADS), in_turn=True)
    said = measure_in_turn(make_random_llama(tmp_path, SMALL), case, num_rounds=2)
    plan = CompressionConfig.from_mapping(SNAPKV.method, SNAPKV.config).plan(load.prompt_tokens, BLOCK_SIZE)
    kept = plan.num_pages + (plan.num_tail > 0)
    blocks = {name: {raw["blocks_after"] for raw in rounds} for name, rounds in said.items()}
    assert list(blocks) == ["plain", "snapkv", "snapkv, head by head"]
    assert blocks["snapkv"] == blocks["snapkv, head by head"]
    assert max(blocks["snapkv"]) < min(blocks["plain"])
    assert all(kept <= count for count in blocks["snapkv"])
    assert {len(rounds) for rounds in said.values()} == {2}
