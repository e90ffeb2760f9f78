"""The plugin in fresh processes: our arguments are there whatever is imported first, and mistakes are usage errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkv_vllm.methods import method_names

VLLM = Path(sys.executable).with_name("vllm")

# Each script runs in its own process and prints what it found as one line of JSON, its last. `.` is a directory.
LLM_FIRST = """
from vllm import LLM
import dataclasses, json, os, pickle
from vllm import AsyncEngineArgs, EngineArgs
from fastkv_vllm.adapter.wiring import prepare_engine_args

OURS = ("kv_compression", "kv_compression_config")
given = dict(model=".", kv_compression="fastkv", kv_compression_config={"budget": 64})
found = {}
for cls in (EngineArgs, AsyncEngineArgs):
    args = cls(**given)
    views = {
        "built": vars(args),
        "asdict": dataclasses.asdict(args),
        "replace": vars(dataclasses.replace(args, seed=7)),
        "replaced": vars(dataclasses.replace(args, kv_compression="snapkv")),
        "pickle": vars(pickle.loads(pickle.dumps(args))),
        "without": vars(cls(model=".")),
    }
    found[cls.__name__] = {view: [values[name] for name in OURS] for view, values in views.items()}
    found[cls.__name__]["fields"] = [f.name for f in dataclasses.fields(cls) if f.name in OURS]
    found[cls.__name__]["seed"] = dataclasses.replace(args, seed=7).seed
plain = EngineArgs(model=".")
before = (dict(vars(plain)), dict(os.environ))
found["prepared"] = prepare_engine_args(plain)
found["untouched"] = before == (vars(plain), dict(os.environ))
try:
    EngineArgs(model=".", kv_compresion="fastkv")
except TypeError as error:
    found["typo"] = str(error)
print(json.dumps(found))
"""
ENGINE_ARGS_FIRST = """
from vllm.engine.arg_utils import EngineArgs
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

args = EngineArgs(model=".", kv_compression="snapkv", kv_compression_config={"budget": 64})
found = {"built": [args.kv_compression, args.kv_compression_config]}
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
flags = ["--model", ".", "--kv-compression", "fastkv", "--kv-compression-config", '{"tsp_layer": 3}']
for name, argv in {"flags": flags, "no_flags": flags[:2]}.items():
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(argv))
    found[name] = [args.kv_compression, args.kv_compression_config]
found["hooks"] = [type(f).__name__ for f in sys.meta_path if type(f).__module__.startswith("fastkv")]
found["stand_in"] = sys.modules["vllm.engine.arg_utils"].dataclass.__module__.startswith("fastkv")
print(json.dumps(found))
"""
WITHOUT_US = """
import json, sys
from vllm import EngineArgs
found = {"kv_compression": hasattr(EngineArgs(model="."), "kv_compression")}
try:
    EngineArgs(model=".", kv_compression="fastkv")
except TypeError as error:
    found["error"] = str(error)
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "serve", ".", "--kv-compression", "fastkv"]
try:
    main()
except SystemExit as exit:
    found["exit"] = exit.code
found["imported"] = [name for name in sys.modules if name.startswith("fastkv_vllm")]
print(json.dumps(found))
"""
# name -> (arguments after `vllm serve .`, what the error line says after its prefix)
MISTAKES = {
    "method": (
        ["--kv-compression", "h3o"],
        f"argument --kv-compression: invalid choice: 'h3o' (choose from {', '.join(map(repr, method_names()))})",
    ),
    "json": (
        ["--kv-compression", "fastkv", "--kv-compression-config", "{budget: 4}"],
        "argument --kv-compression-config: must be a JSON object and is not valid JSON: Expecting property name",
    ),
    "not_an_object": (
        ["--kv-compression", "fastkv", "--kv-compression-config", "[4]"],
        "argument --kv-compression-config: must be a JSON object; got [4]",
    ),
    "value": (
        ["--kv-compression", "fastkv", "--kv-compression-config", '{"retention_ratio": 1.5}'],
        "kv_compression_config: retention_ratio must be in (0, 1]; got 1.5",
    ),
    "value_first": (
        ["--kv-compression-config", '{"kernel_size": 4}', "--kv-compression", "fastkv"],
        "kv_compression_config: kernel_size must be odd; got 4",
    ),
    "key": (
        ["--kv-compression", "snapkv", "--kv-compression-config", '{"retention": 0.1}'],
        "kv_compression_config: unknown key retention; known keys: retention_ratio, budget, ",
    ),
    "tsp_key": (
        ["--kv-compression", "snapkv", "--kv-compression-config", '{"tsp_layer": 3}'],
        "kv_compression_config: tsp_layer must be left out: snapkv does not propagate rows; got 3",
    ),
}
COMMANDS = """
import contextlib, io, json, sys
from vllm.entrypoints.cli.main import main
found = {}
for name, flags in json.loads(sys.argv[1]).items():
    sys.argv = ["vllm", "serve", ".", *flags]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
    found[name] = [code, out.getvalue(), errors.getvalue()]
print(json.dumps(found))
"""


def run(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", **environment}
    # Engine tests of the same session have chosen a model runner for this process.
    chosen = ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER")
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.run(
        command, cwd=directory, env=inherited | ours, capture_output=True, text=True, timeout=300, check=False
    )


def run_script(directory: Path, script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = run([sys.executable, "-c", script, *arguments], directory, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory; given as the model, nothing is looked up in a hub."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def llm_first(directory: Path) -> dict[str, Any]:
    return run_script(directory, LLM_FIRST)


@pytest.fixture(scope="module")
def commands(directory: Path) -> dict[str, Any]:
    """Name -> exit code, output and errors of `vllm serve . ...`, in one process."""
    flags = {name: flags for name, (flags, _) in MISTAKES.items()}
    return run_script(directory, COMMANDS, json.dumps({"help": ["--help=FastKV"], **flags}))


@pytest.mark.parametrize("cls", ["EngineArgs", "AsyncEngineArgs"])
def test_arguments_survive_copies(llm_first: dict[str, Any], cls: str) -> None:
    given = ["fastkv", {"budget": 64}]
    assert llm_first[cls] == {
        "built": given,
        "asdict": given,
        "replace": given,
        "replaced": ["snapkv", {"budget": 64}],
        "pickle": given,
        "without": [None, None],
        "fields": ["kv_compression", "kv_compression_config"],
        "seed": 7,
    }


def test_without_the_argument_nothing_changes(llm_first: dict[str, Any]) -> None:
    assert llm_first["prepared"] is None and llm_first["untouched"] is True


def test_a_misspelt_argument_is_still_a_type_error(llm_first: dict[str, Any]) -> None:
    assert "unexpected keyword argument 'kv_compresion'" in llm_first["typo"]


def test_engine_args_as_the_very_first_import(directory: Path) -> None:
    assert run_script(directory, ENGINE_ARGS_FIRST) == {
        "built": ["snapkv", {"budget": 64}],
        "flags": ["fastkv", {"tsp_layer": 3}],
        "no_flags": [None, None],
        "hooks": [],  # what waited for the import is gone
        "stand_in": False,
    }


def test_a_process_that_excludes_us_knows_nothing_of_us(directory: Path) -> None:
    found = run_script(directory, WITHOUT_US, VLLM_PLUGINS="another_plugin")
    assert found.pop("error").endswith("unexpected keyword argument 'kv_compression'")
    assert found == {"kv_compression": False, "exit": 2, "imported": []}


def test_help_shows_both_flags(commands: dict[str, Any]) -> None:
    code, out, errors = commands["help"]
    assert code in (0, None), errors
    assert f"--kv-compression {{{','.join(method_names())}}}" in out
    assert "--kv-compression-config JSON" in out


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_rule(commands: dict[str, Any], name: str) -> None:
    code, _, errors = commands[name]
    assert code == 2
    lines = [line for line in errors.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, errors
    assert lines[0].startswith("vllm serve: error: " + MISTAKES[name][1])
    assert "Traceback" not in errors


def test_settings_without_a_method_are_refused(directory: Path) -> None:
    done = run([str(VLLM), "serve", ".", "--kv-compression-config", '{"budget": 4}'], directory)
    assert done.returncode != 0
    words = "--kv-compression-config is given without --kv-compression; name a method too"
    lines = [line for line in done.stderr.splitlines() if line.endswith(words)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(("ValueError: ", "vllm serve: error: "))
