"""Dependencies point one way: adapter -> methods, cache, kernels, config; only the adapter knows vLLM."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import fastkv_vllm

ROOT = Path(fastkv_vllm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Part of the package -> parts of it that may be imported there, beside the part itself.
ALLOWED = {
    "__init__": set(),
    "cache": set(),
    "kernels": set(),
    "codecs": {"kernels"},
    "methods": {"cache", "kernels"},
    "calibrate": {"codecs", "kernels", "methods"},
    "config": {"cache", "codecs", "kernels", "methods"},
    "adapter": {"cache", "calibrate", "codecs", "config", "kernels", "methods"},
}
FAST_FORMS = ("triton", "cuda")  # files of an op
FORMS = ("reference", *FAST_FORMS)


def imports_of(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import, nested ones too; names are empty for `import module`."""
    return imports_among(ast.walk(ast.parse(source)))


def imports_among(nodes: Iterable[ast.AST]) -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found.append((node.module or "", tuple(alias.name for alias in node.names)))
    return found


def part_of(module: str) -> str:
    """ "methods" for "fastkv_vllm.methods.base", "__init__" for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" or len(parts) == 2 else parts[:-1])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def own_imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(m, names) for m, names in imports_of(path.read_text()) if within(m, "fastkv_vllm")]


each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])


def test_reader_sees_nested_imports() -> None:
    source = "import torch, vllm.config\ndef f():\n    if True:\n        from vllm.x import (a, b as c)\n"
    assert imports_of(source) == [("torch", ()), ("vllm.config", ()), ("vllm.x", ("a", "b"))]
    with pytest.raises(AssertionError, match="line 1: imports are absolute"):
        imports_of("from . import base")


def test_every_part_is_known() -> None:
    assert {part_of(module_of(path)) for path in FILES} == set(ALLOWED)


@each_file
def test_only_the_adapter_imports_vllm(path: Path) -> None:
    if part_of(module_of(path)) != "adapter":
        assert [module for module, _ in imports_of(path.read_text()) if within(module, "vllm")] == []


@each_file
def test_arrows_between_parts(path: Path) -> None:
    part = part_of(module_of(path))
    wrong = [m for m, _ in own_imports(path) if part_of(m) not in ALLOWED[part] | {part}]
    assert wrong == [], f"{part} may import only {sorted(ALLOWED[part])} and itself"


@each_file
def test_no_import_of_the_whole_package(path: Path) -> None:
    assert [m for m, _ in own_imports(path) if m == "fastkv_vllm"] == [], "name the part: fastkv_vllm.PART"


@each_file
def test_bookkeeping_has_no_torch(path: Path) -> None:
    if part_of(module_of(path)) == "cache":
        modules = [module.split(".")[0] for module, _ in imports_of(path.read_text())]
        assert {"torch", "numpy", "triton"} & set(modules) == set()


@each_file
def test_kernels_are_used_through_their_public_function(path: Path) -> None:
    """Outside its folder an op is `fastkv_vllm.kernels.<op>`, and what is taken from it has no underscore."""
    for module, names in own_imports(path):
        op = ".".join(module.split(".")[:3])
        if part_of(module) == "kernels" and not within(module_of(path), op):
            assert module == op and op.count(".") == 2, f"{module} is not the public module of an op"
            assert [n for n in names if n.startswith("_") or n in FORMS] == []


@each_file
def test_an_op_imports_no_other_op(path: Path) -> None:
    module = module_of(path)
    if part_of(module) == "kernels":
        op = ".".join(module.split(".")[:3])
        shared = {"fastkv_vllm.kernels", "fastkv_vllm.kernels.implementations"}
        assert [m for m, _ in own_imports(path) if not within(m, op) and m not in shared] == []


@each_file
def test_fast_forms_are_imported_when_they_run(path: Path) -> None:
    """An op can be imported where Triton is missing or must not be touched; the forms do not know the reference."""
    module, op = module_of(path), ".".join(module_of(path).split(".")[:3])
    form = module.removeprefix(op + ".") if part_of(module) == "kernels" else ""
    at_import = [m for m, _ in imports_among(ast.parse(path.read_text()).body)]
    if form in FAST_FORMS:
        assert [m for m in at_import if within(m, f"{op}.reference")] == []
    else:
        assert [m for m in at_import if within(m, "triton") or m.split(".")[-1] in FAST_FORMS] == []


def test_a_gpu_never_meets_the_cpu_worker() -> None:
    """vLLM's replaces torch's streams, events and memory figures of GPUs where it is imported; ours is only named."""
    theirs, ours = "vllm.v1.worker.cpu_worker", "fastkv_vllm.adapter.cpu_worker"
    imports = {module_of(path): {module for module, _ in imports_of(path.read_text())} for path in FILES}
    assert [module for module, names in imports.items() if theirs in names] == [ours]
    assert [module for module, names in imports.items() if ours in names] == []
