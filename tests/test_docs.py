"""README and docs say what the code does."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastkv_vllm.adapter.conflicts import CONFLICTS
from fastkv_vllm.adapter.metrics import BLOCK_TOKENS, COUNTERS, POOL_TOKENS, STASH_BYTES
from fastkv_vllm.codecs import CODECS
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import CUT_BUDGETS, MODEL_BUDGETS, UNIFORM, method_class, method_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def conflict_table() -> str:
    """The README's table of conflicts, from the code's."""
    rows = [f"| {conflict.needs} | {conflict.remedy} |" for conflict in CONFLICTS]
    return "\n".join(["| it needs | otherwise |", "|---|---|", *rows])


def composition_table() -> str:
    """What each method allows, from what its class declares and what the configuration refuses."""
    heads = "method", "who votes", "cuts rows", "head budgets", "`value_norms`", "evicts", "codec", "prefix caching"
    head = f"| {' | '.join((*heads, 'ranks', 'calibration'))} |"
    rows = []
    for name in method_names():
        cls = method_class(name)
        votes = {"queries": "last queries", "column_sums": "all queries"}
        config = CompressionConfig(name)
        is_even = config.head_budgets == UNIFORM
        cells = [
            f"`{name}`",
            "queries after the last image"
            if cls.most_voters_after_image
            else next((votes[need] for need in cls.needs if need in votes), "nobody"),
            "its own schedule"
            if cls.layer_budgets in CUT_BUDGETS
            else "where ranks settle"
            if cls.default_rank_variance is not None
            else "reads the best again"
            if cls.reads_again
            else "yes"
            if cls.propagates
            else "no",
            "one choice for all heads"
            if cls.one_choice
            else "even"
            if cls.default_merge_layers is not None
            else "any"
            if is_even
            else f"any, its own: {config.head_budgets}",
            "its own" if cls.default_value_norms else "yes" if cls.votes() and not cls.reads_again else "no",
            "no"
            if cls.reads_again
            or cls.default_codec is not None
            or cls.shares_layers
            or cls.revives
            or cls.default_merge_layers is not None
            else "yes"
            if config.evict_while_decoding
            else "if asked to",
            "yes" if takes_a_codec(name) else "no",
            "no" if config.uses_tsp or config.all_queries_vote else "yes",
            "any" if is_even else "up to the KV heads",
            "needed"
            if cls.head_budgets in MODEL_BUDGETS
            or cls.shares_layers
            or cls.default_merge_layers is not None
            or (cls.default_codec is not None and CODECS[cls.default_codec].artefact is not None)
            else "TSP layer"
            if cls.propagates and cls.layer_budgets not in CUT_BUDGETS and cls.default_rank_variance is None
            else "no",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, "|---" * 10 + "|", *rows])


def takes_a_codec(method: str) -> bool:
    try:
        return CompressionConfig(method, codec="int4").codec == "int4"
    except ValueError:
        return False


def test_composition_table_is_the_codes() -> None:
    assert composition_table() in (ROOT / "docs/methods.md").read_text(), composition_table()


def test_conflict_table_is_the_codes() -> None:
    assert conflict_table() in (ROOT / "README.md").read_text(), conflict_table()


def test_settings_table_has_each_field() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(CompressionConfig) if field.name != "method"]
    assert sorted(keys) == sorted(fields)


def test_settings_in_samples_are_valid() -> None:
    samples = [
        sample
        for page in PAGES
        for sample in re.findall(r"--kv-compression (\w+) --kv-compression-config '([^']+)'", page.read_text())
    ]
    assert samples
    for method, text in samples:
        CompressionConfig.from_mapping(method, json.loads(text))


@pytest.mark.parametrize("name", method_names())
def test_each_method_has_its_section_with_what_it_must_say(name: str) -> None:
    section = (ROOT / "docs/methods.md").read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert method_class(name).source in section
    assert re.search(r"^- Defaults?: ", section, flags=re.MULTILINE)
    assert re.search(r"^- When: ", section, flags=re.MULTILINE)


def test_each_metric_is_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    for name in [*(f"{counter}_total" for counter in COUNTERS), STASH_BYTES, POOL_TOKENS, BLOCK_TOKENS]:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
