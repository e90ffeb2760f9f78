"""The series in patches/: it applies to the installed vLLM; on the result nothing is patched and all is the same."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engine.child import run

ROOT = Path(__file__).parents[2]
SERIES = [ROOT / "patches" / line for line in (ROOT / "patches/series").read_text().split()]
NAME = "fastkv"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to put first on the path: vLLM with the series. What it changes are copies, all else are links."""
    tree = tmp_path_factory.mktemp("patched")
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vLLM is installed"
    overlay(Path(spec.origin).parent, tree / "vllm", {name.removeprefix("vllm/") for name in changed()})
    for patch in SERIES:
        done = subprocess.run(["git", "apply", "--verbose", patch], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0 and "Skipped" not in done.stderr, f"{patch.name}: {done.stderr}"
    return tree


def changed() -> set[str]:
    """Files that the series changes or adds."""
    return {name for patch in SERIES for name in re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)}


def overlay(source: Path, target: Path, copied: set[str]) -> None:
    """Links to what lies in a directory, but copies of these files, and directories on the way to them."""
    target.mkdir()
    for entry in source.iterdir():
        inside = {name.removeprefix(f"{entry.name}/") for name in copied if name.split("/")[0] == entry.name}
        if not inside:
            (target / entry.name).symlink_to(entry)
        elif entry.is_dir():
            overlay(entry, target / entry.name, inside)
        else:
            shutil.copyfile(entry, target / entry.name)


@pytest.fixture(scope="module")
def patched(tree: Path, checkpoint: Path) -> dict:
    # A cache of its own: what vLLM remembers of a model goes by the file it is written in.
    own = {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)]), "VLLM_CACHE_ROOT": str(tree / "cache")}
    return run("tests.engine.patch_series_run", str(checkpoint), NAME, env=os.environ | own)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> dict:
    """The same of the installed vLLM, in a process as fresh: what ran before in one may change a last bit."""
    return run("tests.engine.patch_series_run", str(checkpoint), NAME, env=os.environ)


def test_the_series_lists_every_patch() -> None:
    assert sorted((ROOT / "patches").glob("*.patch")) == SERIES


def test_tokens_and_block_counts_are_those_of_the_plugin(patched: dict, plain: dict, tree: Path) -> None:
    assert Path(patched["vllm"]).is_relative_to(tree) and not Path(plain["vllm"]).is_relative_to(tree)
    ours = plain["runs"]
    assert [(tokens, free) for tokens, _, free in patched["runs"]] == [(tokens, free) for tokens, _, free in ours]
    assert patched["runs"] == ours, "and every logprob to the last bit"


def test_nothing_is_patched(patched: dict, plain: dict) -> None:
    assert plain["patched"] and plain["asked_for_its_runner"] == []
    assert patched["patched"] == [] and patched["import_hooks"] == []
    assert patched["asked_for_its_runner"] == [True]
    assert patched["calls_of_layers"] > 0 and patched["shadowed"] == 0


def test_arguments_and_requests_are_checked_alike(patched: dict, plain: dict) -> None:
    for what in ("flags", "positional", "typo", "refusal"):
        assert patched[what] == plain[what], what
    assert patched["flags"] == ["snapkv", {"budget": 64}] and patched["positional"]
    assert "unexpected keyword argument 'kv_compresion'" in patched["typo"]
    assert patched["refusal"].startswith("prompt_logprobs cannot be had with token-selective propagation")
    assert patched["refusal_of_a_response"] == plain["refusal_of_a_response"] == patched["refusal"]


def test_streams_end_with_what_was_done(patched: dict, plain: dict) -> None:
    streams = patched["accounts_in_streams"]
    assert streams == plain["accounts_in_streams"]
    for *before, last in (streams[0], streams[1], streams[2][:-1]):  # messages end with an event without content
        assert last == {"fastkv": {"method": "of p"}}
        assert len(before) > 2 and not any(before)
