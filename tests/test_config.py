"""The configuration tree: defaults, what it refuses and how, and what it derives."""

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv_vllm.cache import LeftAlone, PromptPlan
from fastkv_vllm.codecs import EntryShape
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import CUT_BUDGETS, MODEL_BUDGETS, BudgetOptions, method_class, method_names

KEYS = [field.name for field in dataclasses.fields(CompressionConfig) if field.name != "method"]
TSP_KEYS = {
    "tsp_layer": 3,
    "tsp_ratio": 0.5,
    "tsp_tokens": 100,
    "rank_variance": 0.3,
    "min_tsp_layer": 4,
    "max_tsp_tokens": 8192,
}
ENTRY = EntryShape(64, torch.bfloat16)
EACH_METHOD = pytest.mark.parametrize("method", method_names())


def make(**mapping: Any) -> CompressionConfig:
    return CompressionConfig.from_mapping("fastkv", mapping)


def test_defaults_are_those_of_fastkv_v3() -> None:
    assert make().to_mapping() == {
        "method": "fastkv",
        "retention_ratio": 0.1,
        "budget": None,
        "tsp_layer": None,
        "tsp_ratio": 0.2,
        "tsp_tokens": None,
        "rank_variance": None,
        "min_tsp_layer": None,
        "layer_shares": None,
        "window_size": 8,
        "num_sink": 0,
        "recent_share": 0.0,
        "value_norms": False,
        "decay": None,
        "halting_loss": None,
        "min_attention_recall": None,
        "max_retention_ratio": None,
        "evict_while_decoding": False,
        "codec": "none",
        "channel_ratio": None,
        "value_channel_ratio": None,
        "channel_groups": None,
        "residual_window": None,
        "encode_generated": False,
        "draft_tokens": 0,
        "kernel_size": 7,
        "pooling": "max",
        "layer_budgets": "uniform",
        "head_budgets": "uniform",
        "head_weights": None,
        "head_beta": 1.5,
        "streaming_tokens": 320,
        "pyramid_beta": 20,
        "head_floor": 0.2,
        "min_tokens": 512,
        "allow_request_override": True,
        "min_retention_ratio": 0.0,
        "max_tsp_tokens": None,
        "layer_owners": None,
        "merge_layers": None,
        "merge_t": None,
        "merge_gamma": None,
        "merge_limit": None,
    }


@pytest.mark.parametrize(("num_layers", "expected"), [(32, 15), (36, 17), (40, 19), (8, 3), (3, 0), (2, 0)])
def test_default_tsp_layer(num_layers: int, expected: int) -> None:
    assert make().for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=4096).tsp_layer == expected


@EACH_METHOD
def test_defaults_of_a_method_are_its_own(method: str) -> None:
    config, cls = CompressionConfig(method), method_class(method)
    for name in ("num_sink", "recent_share", "value_norms", "decay", "evict_while_decoding"):
        assert getattr(config, name) == getattr(cls, f"default_{name}")
    assert CompressionConfig(method, num_sink=9).num_sink == 9
    assert CompressionConfig(method, recent_share=0.25).recent_share == 0.25


def test_defaults_that_differ() -> None:
    assert CompressionConfig("h2o").recent_share == CompressionConfig("a2sf").recent_share == 0.5
    assert [CompressionConfig(name).decay for name in ("h2o", "a2sf", "snapkv")] == [1.0, 0.95, None]
    evicting = [name for name in method_names() if CompressionConfig(name).evict_while_decoding]
    assert sorted(evicting) == ["a2sf", "h2o", "pyramidinfer", "streamingllm", "tova"]
    assert CompressionConfig("vatp").value_norms and CompressionConfig("vatp").num_sink == 20
    assert [CompressionConfig(name).all_queries_vote for name in ("h2o", "a2sf", "snapkv")] == [True, True, False]


WEIGHTS_RULE = "the path of a file of `fastkv-vllm calibrate`, or a list of numbers >= 0 for each layer, not all 0"


@pytest.mark.parametrize("weights", [3, [], [1.0], [[0.0, 0.0]], [[1.0, -1.0]], [[1.0, "2"]], [[math.nan]], [[True]]])
def test_weights_must_be_numbers_of_each_layer(weights: object) -> None:
    with pytest.raises(ValueError, match=WEIGHTS_RULE + ", for head_budgets 'importance'; got"):
        CompressionConfig.from_mapping("headkv", {"head_weights": weights})


def test_weights_come_back_from_json() -> None:
    config = CompressionConfig("headkv", head_weights=[[1, 0.5], [0, 2]])  # type: ignore[arg-type]
    assert config.head_weights == ((1.0, 0.5), (0.0, 2.0))
    assert CompressionConfig(**json.loads(json.dumps(config.to_mapping()))) == config
    assert config.for_model(num_layers=2, num_kv_heads=2, max_model_len=512) == config
    with pytest.raises(ValueError, match="must be of 3 layers with 2 KV heads each, as the model has; got 2 "):
        config.for_model(num_layers=3, num_kv_heads=2, max_model_len=512)
    with pytest.raises(ValueError, match="must be of 2 layers with 4 KV heads each, as the model has; got 2 "):
        config.for_model(num_layers=2, num_kv_heads=4, max_model_len=512)
    with pytest.raises(ValueError, match="head_weights must be given for head_budgets 'importance': the path of"):
        CompressionConfig("headkv").for_model(num_layers=2, num_kv_heads=4, max_model_len=512)


@pytest.mark.parametrize("owners", [3, [], [0, 1, 2], [0, 1, 1, 2], [0, 2, 2], [1, 1], [0, -1], [0, 0.0], [0, True]])
def test_owners_must_be_layers_that_read_their_own(owners: object) -> None:
    with pytest.raises(ValueError, match=r"layer_owners must be the path of .* for one layer at least; got"):
        CompressionConfig.from_mapping("snapkv", {"layer_owners": owners})


def test_owners_are_of_each_layer_and_see_the_same_rows() -> None:
    config = CompressionConfig("fastkv", layer_owners=[0, 1, 0, 3, 4, 4])  # type: ignore[arg-type]
    assert CompressionConfig(**json.loads(json.dumps(config.to_mapping()))) == config
    assert config.for_model(num_layers=6, num_kv_heads=2, max_model_len=512).tsp_layer == 2
    with pytest.raises(ValueError, match="layer_owners must be 8, one for each of the model's layers; got 6"):
        config.for_model(num_layers=8, num_kv_heads=2, max_model_len=512)
    early = dataclasses.replace(config, tsp_layer=1)
    with pytest.raises(ValueError, match="layer 2 reads the entries of layer 0 and rows are cut after layer 1"):
        early.for_model(num_layers=6, num_kv_heads=2, max_model_len=512)
    dataclasses.replace(early, tsp_ratio=1.0).for_model(num_layers=6, num_kv_heads=2, max_model_len=512)
    with pytest.raises(ValueError, match="layer_owners must be given for kvsharer: the path of"):
        CompressionConfig("kvsharer").for_model(num_layers=6, num_kv_heads=2, max_model_len=512)


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("pyramidkv", {}, "layer_budgets"),
        ("headkv", {}, "head_budgets"),
        ("snapkv", {"codec": "int8"}, "codec"),
        ("snapkv", {"evict_while_decoding": True}, "evict_while_decoding"),
        ("dbudgetkv", {}, "halting_loss"),
        ("asl", {}, "rank_variance"),
        ("gemfilter", {}, "layer_owners"),
        ("lazyllm", {}, "layer_owners"),
        ("pyramidinfer", {}, "layer_owners"),
    ],
)
def test_what_excludes_layers_that_read_others(method: str, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"kv_compression_config: {name} must be "):
        CompressionConfig.from_mapping(method, {"layer_owners": [0, 0, 2], **settings})


def test_owners_switch_off_eviction_and_hold_fewer_blocks() -> None:
    config = CompressionConfig("h2o", layer_owners=[0, 0, 2], budget=100)  # type: ignore[arg-type]
    assert config.evict_while_decoding is False
    plan = config.plan(1000, 32)
    assert isinstance(plan, PromptPlan) and plan.num_pages == 3 and plan.num_stored_blocks == 2
    whole = CompressionConfig("snapkv", retention_ratio=1.0, layer_owners=[0, 0, 2]).plan(1000, 32)  # type: ignore[arg-type]
    assert isinstance(whole, PromptPlan) and whole.num_pages == 31 and whole.num_freed_blocks == 10


def test_minicache_drops_nothing_and_merges_values() -> None:
    config = CompressionConfig("minicache")
    assert (config.retention_ratio, config.evict_while_decoding, config.layer_owners) == (1.0, False, None)
    assert (config.merge_layers, config.merge_t, config.merge_gamma, config.merge_limit) == ("values", 0.6, 0.05, 0.05)
    assert CompressionConfig("minicache", merge_layers="keys_and_values").merge_layers == "keys_and_values"
    for name, unfit in (
        ("codec", {"codec": "kivi4"}),
        ("channel_ratio", {"codec": "int8", "channel_ratio": 0.5}),
        ("value_channel_ratio", {"codec": "int8", "value_channel_ratio": 0.5}),
        ("encode_generated", {"codec": "int4", "encode_generated": True}),
        ("layer_budgets", {"layer_budgets": "pyramid"}),
        ("halting_loss", {"halting_loss": 0.1}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .* where layers read the entries of others"):
            CompressionConfig.from_mapping("minicache", unfit)


def test_pairs_to_merge_are_neighbours_from_the_middle_on() -> None:
    merging = CompressionConfig("streamingllm", merge_layers="values")
    for num_layers, owners in ((8, (0, 1, 2, 3, 4, 4, 6, 6)), (7, (0, 1, 2, 3, 3, 5, 5)), (5, (0, 1, 2, 2, 4))):
        filled = merging.for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=512)
        assert filled.layer_owners == owners
        assert CompressionConfig(**json.loads(json.dumps(filled.to_mapping()))) == filled
    with pytest.raises(ValueError, match="layer_owners must be a layer's own number or that of the one before it"):
        dataclasses.replace(merging, layer_owners=(0, 1, 0))
    with pytest.raises(ValueError, match="head_budgets must be uniform where layers read"):
        dataclasses.replace(merging, head_budgets="adaptive")
    for method in ("snapkv", "lazyllm"):
        with pytest.raises(ValueError, match=f"merge_layers must be left out: in {method} each layer chooses entries"):
            CompressionConfig(method, merge_layers="values")
    for name, value in (("merge_t", 1.1), ("merge_gamma", "0.1"), ("merge_limit", -0.1), ("merge_layers", "keys")):
        with pytest.raises(ValueError, match=f"{name} must be "):
            dataclasses.replace(merging, **{name: value})


@pytest.mark.parametrize(
    ("codec", "merging", "pages"),
    [
        ("none", "keys_and_values", [31, 31, 32, 2]),
        ("none", "values", [31, 31, 48, 2]),
        ("int8", "values", [17, 17, 26, 2]),
        ("int4", "keys_and_values", [9, 9, 10, 1]),
        ("int4", "values", [9, 9, 14, 1]),
    ],
)
def test_merged_layers_hold_fewer_blocks(codec: str, merging: str, pages: list[int]) -> None:
    """Of four layers two are merged: pages of 31 blocks of each other one, some of records, one or two retained."""
    given = {"retention_ratio": 1.0, "layer_owners": (0, 1, 2, 2), "merge_layers": merging, "codec": codec}
    plan = CompressionConfig("streamingllm", **given).plan(1000, 32, entry=EntryShape(64, torch.bfloat16))
    assert isinstance(plan, PromptPlan) and plan.pages_of_layers(31) == pages
    assert plan.num_stored_blocks == -(-sum(pages) // 4)


@pytest.mark.parametrize(
    ("merging", "factors"), [("keys_and_values", (4.3, 4.4)), ("values", (3.8, 3.9))], ids=["keys_and_values", "values"]
)
def test_pairs_of_codes_take_a_quarter_of_the_blocks(merging: str, factors: tuple[float, float]) -> None:
    """4096 tokens beside the residual window, the deeper half of 8 layers merged: 37 pages of each layer, 43 or 59."""
    given = {"merge_layers": merging, "codec": "int4", "layer_owners": (0, 1, 2, 3, 4, 4, 6, 6)}
    plan = CompressionConfig("minicache", **given).plan(4104, 32, entry=EntryShape(64, torch.bfloat16))
    assert isinstance(plan, PromptPlan) and plan.num_whole_blocks == 128
    assert factors[0] < 128 * 8 / sum(plan.pages_of_layers(128)) < factors[1]


def test_weights_share_the_pages_of_all_layers() -> None:
    with pytest.raises(ValueError, match="layer_budgets must be uniform: head_budgets 'retrieval' shares the"):
        CompressionConfig("duoattention", head_weights="duo.json", layer_budgets="pyramid")
    assert CompressionConfig("duoattention", head_weights="duo.json").retention_ratio == 0.5


def test_heads_stream_where_their_budgets_are_known_in_advance() -> None:
    assert CompressionConfig("duoattention", head_weights=[[1, 0]]).streams  # type: ignore[arg-type]
    assert not CompressionConfig("duoattention", head_budgets="uniform", halting_loss=0.1).streams
    assert not CompressionConfig("snapkv", head_budgets="retrieval", head_weights="duo.json").streams
    file = CompressionConfig("duoattention", head_weights="duo.json").plan(2000, 32)
    assert isinstance(file, PromptPlan) and file.streaming is None, "not known yet"
    with pytest.raises(ValueError, match="halting_loss must be left out: heads of duoattention let go of entries bef"):
        CompressionConfig("duoattention", halting_loss=0.1)


def test_a_guard_has_a_ceiling() -> None:
    """What late layers see, or everything; blocks and rows are planned for it, the budget says where it begins."""
    guard = {"min_attention_recall": 0.9}
    assert CompressionConfig("snapkv", **guard).max_retention_ratio == 1.0  # type: ignore[arg-type]
    assert make(**guard).max_retention_ratio == 0.2
    assert make(**guard, tsp_layer=[2, 4], tsp_ratio=[0.6, 0.5]).max_retention_ratio == 0.5
    plan = make(**guard, tsp_layer=3, max_retention_ratio=0.15).plan(2000, 32)
    assert isinstance(plan, PromptPlan) and plan.is_ragged and plan.planned_pages == 6 and plan.num_pages == 9
    bare = make(tsp_layer=3).plan(2000, 32)
    assert isinstance(bare, PromptPlan) and (bare.num_pages, bare.planned_pages, bare.cuts) == (6, None, plan.cuts)
    whole = CompressionConfig("snapkv", **guard).plan(2000, 32)  # type: ignore[arg-type]
    assert isinstance(whole, PromptPlan) and whole.num_pages == 62 and whole.num_freed_blocks == 0
    assert CompressionConfig("snapkv", **guard, retention_ratio=1.0).plan(2000, 32) is LeftAlone.BUDGET_COVERS_PROMPT  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("snapkv", {"max_retention_ratio": 0}, r"max_retention_ratio must be in \(0, 1\]; got 0"),
        (
            "snapkv",
            {"max_retention_ratio": 0.05},
            "max_retention_ratio must be at least retention_ratio = 0.1; got 0.05",
        ),
        (
            "fastkv",
            {"max_retention_ratio": 0.3},
            "max_retention_ratio must be at most tsp_ratio = 0.2: late layers cannot keep more than they see; got 0.3",
        ),
        ("snapkv", {"budget": 100}, "budget must be left out with min_attention_recall; got 100"),
        ("fastkv", {"tsp_tokens": 100}, "tsp_tokens must be left out with min_attention_recall; got 100"),
        ("adakv", {}, "head_budgets must be uniform with min_attention_recall; got 'adaptive'"),
        ("pyramidkv", {}, "layer_budgets must be uniform with min_attention_recall; got 'pyramid'"),
        ("snapkv", {"codec": "int8"}, "codec must be none with min_attention_recall; got 'int8'"),
        ("dbudgetkv", {}, "halting_loss must be left out with min_attention_recall; got 0.01"),
        (
            "snapkv",
            {"layer_owners": [0, 0]},
            r"layer_owners must be left out with min_attention_recall; got \(0, 0\)",
        ),
        (
            "streamingllm",
            {"merge_layers": "values"},
            "merge_layers must be left out with min_attention_recall; got 'values'",
        ),
        *[
            (method, {}, f"min_attention_recall must be left out: {method} {reason}; got 0.9")
            for method, reason in {
                "gemfilter": "reads tokens again, whose entries all stay",
                "pyramidinfer": "keeps in each layer what follows from its own cuts",
                "lazyllm": "keeps in each layer what follows from its own cuts",
                "kvsharer": "lets layers read the entries of others",
                "duoattention": "lets heads let go of entries before the last queries look at them",
            }.items()
        ],
    ],
)
def test_what_excludes_the_guard(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kv_compression_config: {message}$"):
        CompressionConfig.from_mapping(method, {"min_attention_recall": 0.9, **settings})


def test_recent_tokens_are_a_share_of_the_budget() -> None:
    plan = CompressionConfig("h2o", retention_ratio=0.2).plan(2000, 32)
    assert isinstance(plan, PromptPlan) and plan.num_recent == 200
    window = CompressionConfig("h2o", retention_ratio=0.2, window_size=250).plan(2000, 32)
    assert isinstance(window, PromptPlan) and window.num_recent == 250


@pytest.mark.parametrize(
    ("method", "mapping", "message"),
    [
        ("snapkv", {"decay": 0.9}, "decay must be left out: in snapkv not all queries vote; got 0.9"),
        ("a2sf", {"decay": 0}, r"decay must be in \(0, 1\]; got 0"),
        ("h2o", {"decay": 1.1}, r"decay must be in \(0, 1\]; got 1.1"),
        ("h2o", {"recent_share": 1}, r"recent_share must be in \[0, 1\); got 1"),
        ("h2o", {"recent_share": True}, r"recent_share must be in \[0, 1\); got True"),
        ("snapkv", {"value_norms": 1}, "value_norms must be true or false; got 1"),
        ("streamingllm", {"value_norms": True}, "value_norms must be false: in streamingllm nobody votes; got True"),
        (
            "tova",
            {"head_budgets": "adaptive"},
            "head_budgets must be uniform: in tova all heads keep the same entries; got 'adaptive'",
        ),
        (
            "lazyllm",
            {"evict_while_decoding": True},
            "evict_while_decoding must be false: in lazyllm what a layer holds of the prompt is chosen anew with each "
            "token; got True",
        ),
    ],
)
def test_settings_that_do_not_fit_the_method(method: str, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kv_compression_config: {message}$"):
        CompressionConfig.from_mapping(method, mapping)


def test_default_tsp_ratio_never_undercuts_retention() -> None:
    assert [make(retention_ratio=r).tsp_ratio for r in (0.05, 0.2, 0.35, 1.0)] == [0.2, 0.2, 0.35, 1.0]
    assert make(budget=64).tsp_ratio == 0.2
    assert make(tsp_tokens=300).tsp_ratio is None


def test_unknown_keys_are_refused_and_known_ones_listed() -> None:
    with pytest.raises(ValueError, match="unknown key colour, retention;") as error:
        make(retention=0.1, colour=1, budget=4)
    listed = str(error.value).partition("known keys: ")[2]
    assert listed.split(", ") == KEYS
    with pytest.raises(ValueError, match="unknown key method"):
        make(method="snapkv")


@pytest.mark.parametrize("mapping", [[], "fastkv", 3, None, [["budget", 4]]], ids=repr)
def test_only_a_mapping_is_taken(mapping: object) -> None:
    with pytest.raises(ValueError, match="must be a JSON object; got ") as error:
        CompressionConfig.from_mapping("fastkv", mapping)  # type: ignore[arg-type]
    assert str(error.value).endswith(repr(mapping))


def test_unknown_method_lists_names() -> None:
    with pytest.raises(ValueError, match=f"'h3o'; known: {', '.join(method_names())}"):
        CompressionConfig("h3o")


RATIOS = [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, "0.1", True, [0.1]]
NOT_INTEGERS = [1.0, "8", True, math.nan, [8]]
SHARES = r"in \(0, 1\] or a list of such that"
LAYERS, ROWS = "an integer >= 0 or a list of such that", "an integer >= 1 or a list of such that"
BAD = [
    *[("retention_ratio", value, r"in \(0, 1\]") for value in RATIOS],
    *[("tsp_ratio", value, f"{SHARES} never rises") for value in RATIOS[:-1]],
    *[("tsp_ratio", [0.9, value, 0.1], f"{SHARES} never rises") for value in RATIOS],
    *[("tsp_ratio", value, f"{SHARES} never rises") for value in ([], (), {}, [0.2, 0.3], [0.5, 0.2, 0.3])],
    *[("tsp_layer", value, f"{LAYERS} rises") for value in [-1, -7, *NOT_INTEGERS[:-1]]],
    *[("tsp_layer", [0, 1, value], f"{LAYERS} rises") for value in [-1, *NOT_INTEGERS]],
    *[("tsp_layer", value, f"{LAYERS} rises") for value in ([], [4, 2], [2, 2], [1, 5, 3])],
    *[("tsp_tokens", value, f"{ROWS} never rises") for value in [0, -7, *NOT_INTEGERS[:-1]]],
    *[("tsp_tokens", [90, value], f"{ROWS} never rises") for value in [0, *NOT_INTEGERS]],
    *[("tsp_tokens", value, f"{ROWS} never rises") for value in ([], [200, 300], [500, 200, 300])],
    *[
        (name, value, f"an integer >= {low}")
        for name, low in {
            "budget": 1,
            "window_size": 1,
            "num_sink": 0,
            "kernel_size": 1,
            "min_tokens": 1,
            "max_tsp_tokens": 1,
        }.items()
        for value in [low - 1, -7, *NOT_INTEGERS]
    ],
    *[(name, None, "an integer >= 1") for name in ("window_size", "kernel_size", "min_tokens")],
    *[("kernel_size", value, "odd") for value in (2, 8)],
    *[("pooling", value, "one of max, avg") for value in ("sum", "MAX", "", None, 1, ["max"])],
    *[("layer_budgets", value, "one of uniform, pyramid, density") for value in ("square", "", 1)],
    *[("head_budgets", value, "one of uniform, adaptive, retrieval, importance") for value in ("pyramid", 1.0)],
    *[("head_beta", value, "a number >= 1") for value in (0.99, "2", None, True, math.inf)],
    *[("streaming_tokens", value, "an integer >= 1") for value in (0, 1.5, None)],
    *[("head_weights", value, "left out: head_budgets 'uniform' does not use it") for value in ("heads.json", [[1.0]])],
    ("layer_shares", [0.5], "left out: fastkv has no schedule that calibration could find"),
    *[("layer_owners", value, "the path of .* for one layer at least") for value in (0, [], [0, 1], [1, 0], [0, 0.0])],
    *[("merge_layers", value, "one of values, keys_and_values, or left out") for value in ("keys", "", 1, True)],
    *[(name, 0.5, "left out without merge_layers") for name in ("merge_t", "merge_gamma", "merge_limit")],
    *[("pyramid_beta", value, "an integer >= 1") for value in (0, 1.5, True, None)],
    *[("head_floor", value, r"in \[0, 1\]") for value in (-0.1, 1.1, "0.2", None, True)],
    *[("recent_share", value, r"in \[0, 1\)") for value in (-0.1, 1, "0.2", True)],
    *[("value_norms", value, "true or false") for value in (0, 1, "true")],
    *[("decay", value, "left out: in fastkv not all queries vote") for value in (1.0, "1")],
    *[("allow_request_override", value, "true or false") for value in (0, 1, "true", None)],
    *[("min_retention_ratio", value, r"in \[0, 1\]") for value in (-0.1, 1.1, "0.2", None, True)],
    *[("evict_while_decoding", value, "true or false") for value in (0, 1, "true")],
    *[
        ("codec", value, "one of none, fp8, int8, int4, int2, kivi4, kivi2, int4x2, skvq, exact")
        for value in ("int3", 4, True)
    ],
    *[(name, 0.6, "left out without a codec") for name in ("channel_ratio", "value_channel_ratio")],
    *[("channel_groups", value, "the path of a file of .* or 'none'") for value in ("", 1, [[1]], True)],
    *[("residual_window", value, "an integer >= 0") for value in (-1, *NOT_INTEGERS)],
    ("residual_window", 8, "left out without a codec"),
    *[("encode_generated", value, "true or false") for value in (0, 1, "true")],
    ("encode_generated", True, "false without a codec"),
    *[("draft_tokens", value, "an integer >= 0") for value in (-1, *NOT_INTEGERS)],
    ("draft_tokens", 1, "0 with codec 'none', which has no coarser view"),
    *[
        (name, value, r"in \(0, 1\)")
        for name in ("halting_loss", "rank_variance", "min_attention_recall")
        for value in (0, 1, -0.1, "0.1", True)
    ],
    ("max_retention_ratio", 0.5, "left out without min_attention_recall"),
    *[("min_tsp_layer", value, "an integer >= 0") for value in (-1, *NOT_INTEGERS)],
    ("min_tsp_layer", 4, "left out without rank_variance"),
    *[("min_tokens", value, "more than window_size = 8") for value in (1, 7, 8)],
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD, ids=[f"{name}-{value!r}" for name, value, _ in BAD])
def test_bad_value_is_refused_naming_key_rule_and_value(name: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"kv_compression_config: {name} must be {rule}; got ") as error:
        make(**{name: value})
    assert str(error.value).endswith(f"; got {value!r}")


def test_every_key_has_a_bad_value() -> None:
    assert {name for name, _, _ in BAD} == set(KEYS)


def test_a_codec_leaves_the_window_and_excludes_what_would_choose_again() -> None:
    assert CompressionConfig("snapkv", codec="int4").residual_window == 8
    assert CompressionConfig("snapkv", codec="int4", residual_window=100).residual_window == 100
    for size in (7, 512):
        with pytest.raises(ValueError, match="residual_window must be at least window_size = 8 and less than min_tok"):
            CompressionConfig("snapkv", codec="int4", residual_window=size)
    assert CompressionConfig("tova").evict_while_decoding
    assert not CompressionConfig("tova", codec="int4").evict_while_decoding
    with pytest.raises(ValueError, match="evict_while_decoding must be false: entries stored with codec 'int4'"):
        CompressionConfig("tova", codec="int4", evict_while_decoding=True)
    for method in ("duoattention", "gemfilter"):
        with pytest.raises(ValueError, match=f"codec must be 'none': {method} moves its entries"):
            CompressionConfig(method, codec="fp8")
    with pytest.raises(ValueError, match="codec must be 'none': in lazyllm rows come back into the places of entries"):
        CompressionConfig("lazyllm", codec="fp8")


def test_a_plan_with_a_codec() -> None:
    """By hand: 2048 tokens, a fifth kept, 409; the last block is the tail, 12 of 32 are encoded in 384 / 113 pages."""
    plan = CompressionConfig("snapkv", retention_ratio=0.2, codec="int4").plan(2048, 32, entry=ENTRY)
    assert isinstance(plan, PromptPlan)
    assert (plan.num_tail, plan.num_whole_blocks, plan.num_pages, plan.num_kept) == (32, 63, 12, 416)
    assert (plan.page_entries, plan.num_stored_blocks, plan.num_freed_blocks) == (113, 4, 59)
    ragged = CompressionConfig("adakv", retention_ratio=0.2, codec="int4").plan(2048, 32, entry=ENTRY)
    assert isinstance(ragged, PromptPlan) and ragged.num_stored_blocks == 5
    whole = CompressionConfig("snapkv", retention_ratio=1.0, codec="int8").plan(2048, 32, entry=ENTRY)
    assert isinstance(whole, PromptPlan) and (whole.num_kept, whole.num_freed_blocks) == (2048, 63 - 34)
    wide = CompressionConfig("snapkv", codec="int4", residual_window=100).plan(2001, 32, entry=ENTRY)
    assert isinstance(wide, PromptPlan) and (wide.num_whole_blocks, wide.num_tail) == (59, 113)


def test_room_for_what_is_encoded_later_is_in_the_plan() -> None:
    """By hand: 2048 tokens, 100 of them in the window and 28 beside them in four blocks; 160 codes to a page.

    The four blocks' codes have room from the prompt's end on; the first generated block needs none of its own before
    2080 entries are encoded.
    """
    config = CompressionConfig("kivi", residual_window=100)
    assert (config.codec, config.retention_ratio, config.encode_generated) == ("kivi4", 1.0, True)
    config = CompressionConfig("kivi", codec="kivi2", residual_window=100)
    plan = config.plan(2048, 32, entry=ENTRY)
    assert isinstance(plan, PromptPlan)
    assert (plan.num_pages, plan.num_tail, plan.num_awaited) == (60, 128, 128)
    assert (plan.num_stored_blocks, plan.num_freed_blocks) == (13, 47)
    lengths = [n for n in range(2048, 2400) if plan.until_next_block(n) == 32]
    assert lengths == [2052 + 32 * i for i in range(11)]
    assert [plan.num_code_blocks(n) for n in lengths] == [13, 13, 13, 13, 13, 14, 14, 14, 14, 14, 15]
    assert plan.peak_tokens(2200) == 2048
    # 1251 blocks are encoded in 251, the last one at the end of its step.
    assert plan.peak_tokens(40132) == 40132 - (1251 - 251 - 1) * 32


def test_sinks_that_stay_as_they_are_have_room_in_the_plan() -> None:
    """By hand: an entry is 20 + 17 bytes, 221 to a page; five sinks of 256 bytes take 35 places, 30 beside their own.

    Of 4096 tokens 124 blocks are encoded and four wait in the window: (30 + 3968 + 128) / 221 pages.
    """
    config = CompressionConfig("skvq")
    assert (config.codec, config.retention_ratio, config.num_sink, config.residual_window) == ("skvq", 1.0, 5, 128)
    assert config.encode_generated
    plan = config.plan(4096, 32, entry=ENTRY)
    assert isinstance(plan, PromptPlan)
    assert (plan.page_entries, plan.sink_places, plan.num_pages, plan.num_awaited) == (221, 30, 124, 128)
    assert (plan.num_stored_blocks, plan.num_freed_blocks) == (19, 105)
    # 19 pages have 4199 places: for 30 and 130 blocks of codes.
    lengths = [n for n in range(4096, 4400) if plan.until_next_block(n) == 32]
    assert [plan.num_code_blocks(n) for n in lengths] == [19, 19, 19, 19, 19, 19, 19, 20, 20, 20]
    none = CompressionConfig("kivi", codec="skvq").plan(4096, 32, entry=ENTRY)
    assert isinstance(none, PromptPlan) and (none.sink_places, none.num_stored_blocks) == (0, 19)
    ragged = CompressionConfig("adakv", codec="skvq", num_sink=5).plan(4096, 32, entry=ENTRY)
    assert isinstance(ragged, PromptPlan) and ragged.num_stored_blocks == -(-(30 + ragged.num_moved) // 221) + 1
    assert CompressionConfig("kivi", codec="skvq", num_sink=31).page_entries(32, ENTRY) == 221
    with pytest.raises(ValueError, match=r"num_sink must leave room in a page of 32 entries, .*; got 32"):
        CompressionConfig("kivi", codec="skvq", num_sink=32).page_entries(32, ENTRY)
    for name in ("channel_ratio", "value_channel_ratio"):
        with pytest.raises(ValueError, match=f" {name} must be 1 with codec 'skvq', which groups all channels"):
            CompressionConfig.from_mapping("kivi", {"codec": "skvq", name: 0.6})


def test_channels_are_measured_unless_the_user_says_otherwise() -> None:
    model = {"num_layers": 8, "num_kv_heads": 2, "max_model_len": 2048}
    for config in (CompressionConfig("kivi", codec="skvq"), CompressionConfig("snapkv", codec="skvq")):
        with pytest.raises(ValueError, match="channel_groups must be given for codec 'skvq': the path of a file of"):
            config.for_model(**model)
        for groups in ("none", "channels.json"):
            filled = dataclasses.replace(config, channel_groups=groups).for_model(**model)
            assert filled.channel_groups == groups
    assert CompressionConfig("kivi").for_model(**model).channel_groups is None


def test_tokens_are_drafted_where_entries_read_two_ways() -> None:
    config = CompressionConfig("quantspec")
    assert (config.codec, config.retention_ratio, config.encode_generated) == ("int4x2", 1.0, False)
    assert (config.draft_tokens, config.residual_window) == (5, 128)
    assert CompressionConfig("quantspec", codec="int8").draft_tokens == 0
    assert CompressionConfig("quantspec", encode_generated=True).draft_tokens == 0
    assert CompressionConfig("adakv", codec="int4x2").draft_tokens == 0, "only where it is asked for"
    assert CompressionConfig("adakv", codec="int4x2", draft_tokens=3).draft_tokens == 3
    for wished, rule in (
        ({"codec": "int8", "draft_tokens": 2}, "0 with codec 'int8', which has no coarser view"),
        ({"encode_generated": True, "draft_tokens": 2}, "0 where what is generated is encoded"),
        ({"draft_tokens": 65}, "at most 64"),
    ):
        with pytest.raises(ValueError, match=f"draft_tokens must be {rule}"):
            CompressionConfig("quantspec", **wished)


def test_what_is_generated_is_encoded_where_all_heads_keep_as_many() -> None:
    assert not CompressionConfig("kivi", head_budgets="adaptive").encode_generated
    assert not CompressionConfig("kivi", codec="none").encode_generated
    for method in ("adakv", "dbudgetkv"):
        with pytest.raises(ValueError, match="encode_generated must be false where layers or heads keep differently"):
            CompressionConfig(method, codec="int4", encode_generated=True)


def test_an_entry_without_some_channels_of_its_key() -> None:
    """By hand: 40 of 64 channels and the value are 208 of 256 bytes, so that a page of 32 holds 39."""
    assert CompressionConfig("snapkv", codec="int4").channel_ratio == 1.0
    think = CompressionConfig("think")
    assert (think.codec, think.channel_ratio, think.residual_window) == ("exact", 0.6, 32)
    assert think.page_entries(32, ENTRY) == 39
    assert CompressionConfig("think", codec="none").channel_ratio is None
    for codec, num_entries in (("exact", 39), ("kivi2", 192), ("int8", 8192 // (44 + 68))):
        config = CompressionConfig("snapkv", codec=codec, channel_ratio=0.6)
        assert config.page_entries(32, ENTRY) == num_entries
    for name, share in itertools.product(("channel_ratio", "value_channel_ratio"), (0, 1.1, "0.5", True)):
        with pytest.raises(ValueError, match=rf" {name} must be in \(0, 1\]; got"):
            CompressionConfig.from_mapping("snapkv", {"codec": "exact", name: share})
    with pytest.raises(ValueError, match="codec 'exact': a page of 32 entries must have room for more; 32 of head"):
        CompressionConfig("snapkv", codec="exact").page_entries(32, ENTRY)


def test_an_entry_without_some_channels_of_its_value() -> None:
    """By hand: of 64 numbers of two bytes 40 of the key and 40 of the value are stored, 160 of 256 bytes."""
    think = CompressionConfig("think", value_channel_ratio=0.6)
    assert (think.channel_ratio, think.page_entries(32, ENTRY)) == (0.6, 51)
    assert CompressionConfig("think").value_channel_ratio == 1.0
    for codec, num_entries in (("exact", 42), ("int8", 8192 // (68 + 36)), ("kivi2", 224)):
        config = CompressionConfig("snapkv", codec=codec, value_channel_ratio=0.5)
        assert config.drops_channels and config.page_entries(32, ENTRY) == num_entries
    plans = [config.plan(4096, 32, entry=ENTRY) for config in (CompressionConfig("think"), think)]
    held = [(plan.num_moved, plan.num_stored_blocks) for plan in plans if isinstance(plan, PromptPlan)]
    assert held == [(384, 10), (384, 8)], "ceil(384 / 39) and ceil(384 / 51) blocks"
    rule = "codec 'kivi2': heads must store their values in a multiple of 32 channels; got 40"
    with pytest.raises(ValueError, match=rule):
        CompressionConfig("think", codec="kivi2", value_channel_ratio=0.6).page_entries(32, ENTRY)


def test_a_codec_that_does_not_fit_is_refused() -> None:
    config = CompressionConfig("snapkv", codec="kivi2")
    with pytest.raises(ValueError, match="kv_compression_config: codec 'kivi2': --block-size must be a multiple of 32"):
        config.page_entries(16, ENTRY)


LIMITS: list[dict[str, Any]] = [
    {"retention_ratio": 1},
    {"retention_ratio": 1e-9},
    {"retention_ratio": 0.5, "tsp_ratio": 0.5},
    {"budget": 1},
    {"tsp_ratio": 1.0},
    {"tsp_tokens": 1, "tsp_layer": 0},
    {"window_size": 1, "kernel_size": 1, "min_tokens": 2},
    {"window_size": 511, "num_sink": 0},
    {"pooling": "avg", "max_tsp_tokens": 1},
]


@pytest.mark.parametrize("mapping", LIMITS, ids=str)
def test_values_at_their_limits_are_taken(mapping: dict[str, Any]) -> None:
    config = make(**mapping)
    assert {name: getattr(config, name) for name in mapping} == mapping


@pytest.mark.parametrize("pair", [("retention_ratio", "budget"), ("tsp_ratio", "tsp_tokens")], ids="-".join)
def test_keys_that_exclude_each_other(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"give {pair[0]} or {pair[1]}, not both"):
        make(**{pair[0]: 0.5, pair[1]: 64})


def test_late_layers_see_at_least_what_they_keep() -> None:
    with pytest.raises(ValueError, match=r"tsp_ratio must be at least retention_ratio = 0\.3: .*; got 0\.25"):
        make(retention_ratio=0.3, tsp_ratio=0.25)
    with pytest.raises(ValueError, match=r"tsp_ratio must be at least retention_ratio = 0\.3: .*; got \[0\.5, 0\.25\]"):
        make(retention_ratio=0.3, tsp_layer=[3, 5], tsp_ratio=[0.5, 0.25])
    with pytest.raises(ValueError, match=r"tsp_tokens must be at least budget = 64: .*; got \[90, 63\]"):
        make(budget=64, tsp_layer=[3, 5], tsp_tokens=[90, 63])


CUTS: list[dict[str, Any]] = [
    {"tsp_layer": [2, 4, 5], "tsp_ratio": [0.5, 0.3, 0.2]},
    {"tsp_layer": [2, 4, 5], "tsp_ratio": [1, 0.3, 0.3]},
    {"tsp_layer": [0, 6], "tsp_tokens": [300, 300]},
    {"tsp_layer": [3], "tsp_ratio": [0.2]},
]


@pytest.mark.parametrize("mapping", CUTS, ids=str)
def test_several_cuts_are_taken_and_survive_json(mapping: dict[str, Any]) -> None:
    config = make(**mapping)
    assert {name: getattr(config, name) for name in mapping} == {name: tuple(mapping[name]) for name in mapping}
    assert config.uses_tsp and config.tsp_layers == tuple(mapping["tsp_layer"])
    filled = config.for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)
    assert filled.tsp_layers == config.tsp_layers
    written = json.dumps(filled.to_mapping())
    assert CompressionConfig(**json.loads(written)) == filled
    assert json.loads(written) == filled.to_mapping(), "plain JSON types"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"tsp_layer": [2, 4]}, r"tsp_ratio must be a list as long as tsp_layer = \[2, 4\]; got None"),
        ({"tsp_layer": [2, 4], "tsp_ratio": 0.2}, r"tsp_ratio must be a list as long as .*; got 0\.2"),
        ({"tsp_layer": [2, 4], "tsp_tokens": 90}, r"tsp_tokens must be a list as long as .*; got 90"),
        ({"tsp_layer": [2], "tsp_ratio": [0.5, 0.2]}, r"tsp_ratio must be a list as long as .*; got \[0\.5, 0\.2\]"),
        ({"tsp_layer": 2, "tsp_ratio": [0.2]}, r"tsp_layer must be a list as long as tsp_ratio = \[0\.2\]; got 2"),
        ({"tsp_ratio": [0.5, 0.2]}, r"tsp_layer must be a list as long as tsp_ratio = .*; got None"),
        ({"tsp_tokens": [90, 80]}, r"tsp_layer must be a list as long as tsp_tokens = \[90, 80\]; got None"),
    ],
    ids=str,
)
def test_there_are_as_many_layers_as_shares(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**mapping)


@pytest.mark.parametrize("name", TSP_KEYS)
@pytest.mark.parametrize("method", [m for m in method_names() if not method_class(m).propagates])
def test_tsp_keys_need_a_method_that_propagates(method: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be left out: {method} does not propagate rows; got") as error:
        CompressionConfig.from_mapping(method, {name: TSP_KEYS[name]})
    assert str(error.value).endswith(repr(TSP_KEYS[name]))
    assert not CompressionConfig(method).uses_tsp


@EACH_METHOD
@pytest.mark.parametrize("mapping", [{}, {"budget": 77}, {"retention_ratio": 0.25, "num_sink": 2}, {"pooling": "avg"}])
def test_round_trip_through_json(method: str, mapping: dict[str, Any]) -> None:
    if method_class(method).layer_budgets in CUT_BUDGETS and mapping:
        mapping = {"retention_ratio": 0.7, "num_sink": 2}  # of these, budgets are refused and few rows cannot be had
    config = CompressionConfig.from_mapping(method, mapping)
    assert CompressionConfig(**json.loads(json.dumps(config.to_mapping()))) == config
    if config.head_budgets in MODEL_BUDGETS:
        config = dataclasses.replace(config, head_weights=((0.0, 1.0),) * 8)
    if method_class(method).shares_layers:
        config = dataclasses.replace(config, layer_owners=(0, 1, 2, 3, 4, 5, 6, 2))
    if method == "skvq":
        config = dataclasses.replace(config, channel_groups="none")
    filled = config.for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)
    assert CompressionConfig(**json.loads(json.dumps(filled.to_mapping()))) == filled


MEASURED = (1.0, 0.8, 0.8, 0.5)


def test_measured_shares_stand_in_for_the_ratio() -> None:
    config = CompressionConfig("pyramidinfer", layer_shares=list(MEASURED))  # type: ignore[arg-type]
    assert config.retention_ratio == pytest.approx((1.0 + 0.8 + 0.8 + 0.5 + 0.5) / 5)
    filled = config.for_model(num_layers=5, num_kv_heads=2, max_model_len=2048)
    assert (filled.tsp_layers, filled.tsp_ratio) == ((0, 1, 2, 3), MEASURED)
    assert CompressionConfig(**json.loads(json.dumps(filled.to_mapping()))) == filled
    assert filled.for_model(num_layers=5, num_kv_heads=2, max_model_len=2048) == filled
    plan = filled.plan(1600, 16)
    assert isinstance(plan, PromptPlan) and plan.cuts == ((1, 1280), (3, 800))
    with pytest.raises(ValueError, match=r"layer_shares must be 7, one for each of the model's 8 layers but the last"):
        config.for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)


@pytest.mark.parametrize("shares", [3, [], [0.0], [1.5], ["1"], [True], [0.5, 0.6]])
def test_measured_shares_never_rise(shares: object) -> None:
    with pytest.raises(ValueError, match=r"layer_shares must be the path of .* never rising; got"):
        CompressionConfig.from_mapping("pyramidinfer", {"layer_shares": shares})


@pytest.mark.parametrize("shares", ["decays.json", [0.5, 0.5]])
def test_measured_shares_exclude_a_ratio_and_other_methods(shares: object) -> None:
    with pytest.raises(ValueError, match="retention_ratio must be left out: it follows from layer_shares"):
        CompressionConfig.from_mapping("pyramidinfer", {"layer_shares": shares, "retention_ratio": 0.9})
    for method in ("snapkv", "lazyllm"):
        with pytest.raises(ValueError, match=f"layer_shares must be left out: {method} has no schedule"):
            CompressionConfig.from_mapping(method, {"layer_shares": shares})


@pytest.mark.parametrize("num_layers", [8, 16, 33])
@pytest.mark.parametrize("method", [m for m in method_names() if method_class(m).layer_budgets in CUT_BUDGETS])
def test_own_cuts_make_up_the_ratio(method: str, num_layers: int) -> None:
    """Shares fall, and what layers keep of the rows has the mean asked for."""
    ratio = 0.7
    config = CompressionConfig(method, retention_ratio=ratio).for_model(
        num_layers=num_layers, num_kv_heads=2, max_model_len=2048
    )
    shares = config.tsp_ratio
    assert isinstance(shares, tuple) and list(shares) == sorted(shares, reverse=True)
    plan = config.plan(2000, 16)
    assert isinstance(plan, PromptPlan)
    wished = CUT_BUDGETS[config.layer_budgets](plan, num_layers, BudgetOptions())
    assert ratio - 0.01 <= sum(wished) / num_layers / 2000 <= ratio
    assert plan.num_moved - 32 <= sum(wished) / num_layers <= plan.num_moved, "there is room, and little to give back"
    for name, value in {"tsp_layer": 1, "tsp_ratio": 0.8}.items():
        given = dataclasses.replace(CompressionConfig(method), **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be left out: where {method} cuts rows follows from"):
            given.for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=2048)
    for ratio, share in ((0.7, 1.0), (1.0, 0.5)):
        given = CompressionConfig(method, retention_ratio=ratio, tsp_ratio=share)
        with pytest.raises(ValueError, match=f"tsp_ratio must be left out: where {method} cuts rows follows from"):
            given.for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=2048)
    for name in ("budget", "tsp_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be left out: where {method} cuts rows"):
            CompressionConfig.from_mapping(method, {name: 700})
    with pytest.raises(ValueError, match="layer_budgets must be one of"):
        CompressionConfig(method, layer_budgets="pyramid")


@pytest.mark.parametrize(("num_layers", "earliest"), [(32, 10), (40, 12), (16, 5), (8, 2), (5, 2)])
def test_a_cut_that_is_found_lies_within_its_bounds(num_layers: int, earliest: int) -> None:
    shape = {"num_layers": num_layers, "num_kv_heads": 2, "max_model_len": 2048}
    config = CompressionConfig("asl").for_model(**shape)
    assert (config.rank_variance, config.min_tsp_layer, config.tsp_layer) == (0.3, earliest, num_layers - 2)
    assert CompressionConfig("fastkv", rank_variance=0.3).for_model(**shape).tsp_layers == config.tsp_layers
    plan = config.plan(2000, 32)
    assert isinstance(plan, PromptPlan)
    assert (plan.first_cut, plan.cuts) == (earliest + 1, ((num_layers - 2, 400),))
    assert plan.rows_after(num_layers) == [2000] * (num_layers - 2) + [400, 400], "the most there may be"
    for wrong in (1, num_layers - 2):
        with pytest.raises(ValueError, match=rf"min_tsp_layer must be in 2\.\.{num_layers - 3}, .*; got {wrong}"):
            CompressionConfig("asl", min_tsp_layer=wrong).for_model(**shape)


def test_only_one_cut_is_found() -> None:
    with pytest.raises(ValueError, match="tsp_layer must be one layer, the latest, with rank_variance"):
        CompressionConfig("asl", tsp_layer=(4, 6), tsp_ratio=(0.5, 0.2))
    with pytest.raises(ValueError, match="rank_variance must be left out: where lazyllm cuts rows follows from"):
        CompressionConfig("lazyllm", rank_variance=0.3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("tsp_ratio", 0.3),
            ("tsp_tokens", 300),
            ("rank_variance", 0.3),
            ("halting_loss", 0.1),
            ("tsp_layer", [1, 2]),
            ("max_tsp_tokens", 4096),
            ("evict_while_decoding", True),
            ("value_norms", True),
        ],
        *[("layer_budgets", "pyramid"), ("head_budgets", "adaptive")],
    ],
)
def test_tokens_read_again_are_those_that_stay(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^kv_compression_config: {name} must be .*gemfilter"):
        CompressionConfig.from_mapping("gemfilter", {name: value})
    config = CompressionConfig("gemfilter").for_model(num_layers=32, num_kv_heads=2, max_model_len=4096)
    assert config.uses_tsp and not config.has_stash and config.max_tsp_tokens is None
    for num_tokens in (2000, 2016, 2047):
        plan = config.plan(num_tokens, 32)
        assert isinstance(plan, PromptPlan) and plan.reads_again and not plan.has_stash
        assert plan.cuts == ((15, plan.num_kept),) and plan.num_freed_blocks * 32 == num_tokens - plan.num_kept


def test_a_halting_rule_makes_budgets_uneven() -> None:
    assert CompressionConfig("dbudgetkv").halting_loss == 0.01 and CompressionConfig("snapkv").halting_loss is None
    for config in (CompressionConfig("dbudgetkv"), CompressionConfig("snapkv", halting_loss=0.05)):
        plan = config.plan(2000, 32)
        assert isinstance(plan, PromptPlan) and plan.is_ragged


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("method", [m for m in method_names() if method_class(m).layer_budgets in CUT_BUDGETS])
def test_own_cuts_of_shallow_models(method: str, num_layers: int) -> None:
    """A cut is followed by a layer, or there is none and the ratio is refused."""
    shape = {"num_layers": num_layers, "num_kv_heads": 2, "max_model_len": 2048}
    config = CompressionConfig(method, retention_ratio=0.9)
    if (method, num_layers) != ("lazyllm", 2):  # the first layers of a pyramid hand everything on
        with pytest.raises(ValueError, match=r"must be at least 1.000 here; got 0.9"):
            config.for_model(**shape)
    else:
        assert config.for_model(**shape).tsp_layers == (0,)


def test_too_little_for_a_schedule_is_refused() -> None:
    config = CompressionConfig("pyramidinfer", retention_ratio=0.1)
    with pytest.raises(ValueError, match=r"retention_ratio of pyramidinfer: it must be at least 0\.\d+ here; got 0.1"):
        config.for_model(num_layers=16, num_kv_heads=2, max_model_len=2048)


OFF: list[dict[str, Any]] = [
    {"retention_ratio": 1.0},
    {"tsp_ratio": 1.0},
    {"tsp_ratio": 1},
    {"tsp_layer": [2, 4], "tsp_ratio": [1.0, 1.0]},
]


@pytest.mark.parametrize("mapping", OFF, ids=str)
def test_ratio_one_switches_tsp_off(mapping: dict[str, Any]) -> None:
    config = make(**mapping)
    assert not config.uses_tsp
    assert config.for_model(num_layers=2, num_kv_heads=2, max_model_len=10**6) == config
    plan = config.plan(1000, 32)
    if config.retention_ratio == 1.0:
        assert plan is LeftAlone.BUDGET_COVERS_PROMPT
    else:
        assert isinstance(plan, PromptPlan) and plan.cuts == ()


def test_a_model_of_one_layer_is_refused_for_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"tsp_layer .*the model has 1"):
        make().for_model(num_layers=1, num_kv_heads=2, max_model_len=512)


@pytest.mark.parametrize(("num_layers", "layer"), [(8, 7), (8, 8), (2, 1)])
def test_tsp_layer_is_followed_by_another(num_layers: int, layer: int) -> None:
    with pytest.raises(
        ValueError, match=rf"tsp_layer must be in 0\.\.{num_layers - 2}, the model has {num_layers} layers; got"
    ):
        make(tsp_layer=layer).for_model(num_layers=num_layers, num_kv_heads=2, max_model_len=512)
    assert make(tsp_layer=6).for_model(num_layers=8, num_kv_heads=2, max_model_len=512).tsp_layer == 6
    with pytest.raises(ValueError, match=rf"tsp_layer must be in .*; got \[0, {layer}\]"):
        make(tsp_layer=[0, layer], tsp_ratio=[0.5, 0.2]).for_model(
            num_layers=num_layers, num_kv_heads=2, max_model_len=512
        )


def test_stash_takes_the_longest_prompt() -> None:
    assert make().for_model(num_layers=8, num_kv_heads=2, max_model_len=2048).max_tsp_tokens == 2048
    assert make(max_tsp_tokens=2048).for_model(num_layers=8, num_kv_heads=2, max_model_len=2048).max_tsp_tokens == 2048
    with pytest.raises(ValueError, match=r"max_tsp_tokens must be at least .* 2048; got 2047; .*--max-model-len"):
        make(max_tsp_tokens=2047).for_model(num_layers=8, num_kv_heads=2, max_model_len=2048)


def test_frozen() -> None:
    config = make()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@EACH_METHOD
def test_method_gets_its_fields(method: str) -> None:
    made = CompressionConfig(method, window_size=4, kernel_size=3, pooling="avg").make_method()
    assert type(made) is method_class(method)
    assert (made.window_size, made.kernel_size, made.pooling) == (4, 3, "avg")


def test_tokens_after_the_last_image_vote_where_the_method_asks_for_them() -> None:
    voters = [CompressionConfig("vl_cache").plan(1280, 32, n).num_voters for n in (0, 3, 40, 400)]
    assert voters == [8, 3, 40, 50]
    assert CompressionConfig("snapkv").plan(1280, 32, 40) == CompressionConfig("snapkv").plan(1280, 32)


def test_density_needs_votes_of_the_last_queries() -> None:
    assert CompressionConfig("tova", layer_budgets="density").layer_budgets == "density"
    for method in ("h2o", "streamingllm"):
        with pytest.raises(ValueError, match="layer_budgets must be one of uniform, pyramid; got 'density'"):
            CompressionConfig(method, layer_budgets="density")


def test_plan_turns_ratios_and_counts_into_entries() -> None:
    ratio = make(retention_ratio=0.1, tsp_layer=3, tsp_ratio=0.5).plan(1280, 32)
    counts = make(budget=128, tsp_layer=3, tsp_tokens=640).plan(1280, 32)
    assert (
        ratio
        == counts
        == PromptPlan(1280, 32, num_pages=4, cuts=((3, 640),), window_size=8, num_voters=8, num_sink=0, num_recent=8)
    )
    several = make(tsp_layer=[2, 4, 5], tsp_ratio=[0.5, 0.3, 0.2]).plan(1280, 32)
    assert several == make(budget=128, tsp_layer=[2, 4, 5], tsp_tokens=[640, 384, 256]).plan(1280, 32)
    assert isinstance(several, PromptPlan) and several.cuts == ((2, 640), (4, 384), (5, 256))
    assert CompressionConfig("streamingllm").plan(1280, 32) == PromptPlan(1280, 32, 4, (), 8, 8, 4, 8, evicts=True)
    assert make().plan(511, 32) is LeftAlone.SHORT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel_size": 1025}, "kernel_size must be at most 1023; got 1025"),
        ({"budget": 2**31}, r"budget must be less than 2\^31; got"),
        ({"head_beta": 10**400}, r"head_beta must be less than 2\^31; got"),
        ({"tsp_layer": 3, "tsp_tokens": [10**400]}, "tsp_tokens must be an integer >= 1"),
        ({"head_budgets": "importance", "head_weights": [[10**400]]}, "head_weights must be the path"),
    ],
)
def test_numbers_too_large_to_work_with_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**given)


EDGES = st.sampled_from(
    [0, 1, -1, 7, 256, 1023, 2**31, 10**400, 0.1, 0.5, 1e-300, math.nan, math.inf, True, "", "\ud800"]
)
SCALARS = st.none() | EDGES | st.integers() | st.floats() | st.text(max_size=5)
CHOICES = st.sampled_from(["uniform", "pyramid", "density", "adaptive", "importance", "retrieval", "max", "avg"])
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(method_names()), st.dictionaries(st.sampled_from(KEYS), ANY_JSON | CHOICES, max_size=4) | ANY_JSON
)
def test_any_json_is_a_configuration_or_one_clear_error(method: str, mapping: Any) -> None:
    """What is accepted can be used: for a model, for a prompt of any length, and on its way to another process."""
    try:
        config = CompressionConfig.from_mapping(method, mapping)
        for num_tokens in (1, 31, 600, 4000):
            config.plan(num_tokens, 32, entry=ENTRY)
        assert CompressionConfig(**config.to_mapping()) == config
        if not any(isinstance(value, str) for value in (config.head_weights, config.layer_shares, config.layer_owners)):
            filled = config.for_model(num_layers=8, num_kv_heads=2, max_model_len=4096)
            filled.plan(4000, 32, entry=ENTRY)
    except ValueError as error:
        assert str(error).startswith("kv_compression_config") and "\n" not in str(error)
