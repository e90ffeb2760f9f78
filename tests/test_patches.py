"""The seam: what a `Patch` does to its target, and that overrides take what upstream passes.

What upstream's signatures are is tests/contract's matter.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

import fastkv_vllm.adapter
from fastkv_vllm.adapter import patches
from fastkv_vllm.adapter.patches import Patch
from tests.contract.record import installed
from tests.contract.touched import touched

DATACLASS_METHODS = {"__init__", "__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__", "__replace__"}


# Patch on toy classes


def make_toy() -> type:
    class Base:
        def inherited(self, x):
            return x

    class Toy(Base):
        def method(self, x, y=1):
            """Doc."""
            return ("method", x, y)

        @staticmethod
        def static(x):
            return ("static", x)

        @classmethod
        def cls_method(cls, x):
            return ("class", cls.__name__, x)

    return Toy


def marking(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: ("patched", original(*args, **kwargs))


def make_patch(owner: type, name: str, *parameters: str) -> Patch:
    return Patch(owner, name, parameters, marking, "a test")


TOY_METHODS = [
    ("method", ("self", "x", "y"), ("method", 3, 1)),
    ("static", ("x",), ("static", 3)),
    ("cls_method", ("cls", "x"), ("class", "Toy", 3)),
]


@pytest.mark.parametrize(("name", "parameters", "result"), TOY_METHODS, ids=[name for name, *_ in TOY_METHODS])
def test_patch_wraps_once_and_is_undone(name: str, parameters: tuple[str, ...], result: Any) -> None:
    owner = make_toy()
    original = owner.__dict__[name]
    patch = make_patch(owner, name, *parameters)
    for _ in range(2):
        patch.install()
        assert getattr(owner(), name)(3) == ("patched", result)
    assert type(owner.__dict__[name]) is type(original)
    assert getattr(owner, name).__name__ == name
    for _ in range(2):
        patch.uninstall()
        assert owner.__dict__[name] is original
    patch.install()
    assert getattr(owner(), name)(3) == ("patched", result)


def test_patch_keeps_name_and_docstring_and_other_methods() -> None:
    owner = make_toy()
    make_patch(owner, "method", "self", "x").install()
    assert (owner.method.__doc__, owner.method.__qualname__) == ("Doc.", "make_toy.<locals>.Toy.method")
    assert owner.static(1) == ("static", 1) and owner().inherited(1) == 1


@pytest.mark.parametrize("name", ["absent", "inherited"])
def test_patch_refuses_a_missing_method(name: str) -> None:
    owner = make_toy()
    before = dict(owner.__dict__)
    with pytest.raises(RuntimeError, match=rf"Toy\.{name} does not exist"):
        make_patch(owner, name, "self", "x").install()
    assert dict(owner.__dict__) == before


@pytest.mark.parametrize("parameters", [("self", "y"), ("x", "self"), ("self", "x", "y", "z"), ("x",)], ids=str)
def test_patch_refuses_another_signature(parameters: tuple[str, ...]) -> None:
    owner = make_toy()
    before = dict(owner.__dict__)
    with pytest.raises(RuntimeError, match=r"Toy\.method has parameters") as error:
        make_patch(owner, "method", *parameters).install()
    assert str(("self", "x", "y")) in str(error.value) and str(parameters) in str(error.value), "names both"
    assert dict(owner.__dict__) == before


def test_patches_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_patch(make_toy(), "method", "self").name = "static"  # type: ignore[misc]


# The adapter's patches


def adapter_patches() -> list[Patch]:
    found = []
    for info in pkgutil.iter_modules(patches.__path__):
        module = importlib.import_module(f"{patches.__name__}.{info.name}")
        named = [getattr(module, "PATCH", None), *getattr(module, "PATCHES", ())]
        found += [patch for patch in named if patch is not None]
        assert info.name == "base" or any(named), f"patches/{info.name}.py holds no patch"
    return found


def patch_id(patch: Patch) -> str:
    return f"{patch.owner.__qualname__}.{patch.name}"


EACH_PATCH = pytest.mark.parametrize("patch", adapter_patches(), ids=patch_id)


def test_no_symbol_is_patched_twice() -> None:
    names = [patch_id(patch) for patch in adapter_patches()]
    assert len(names) == len(set(names)) == 10


@EACH_PATCH
def test_a_patch_gives_its_reason(patch: Patch) -> None:
    assert len(patch.reason.split()) >= 10
    assert "Goes when" in patch.reason, "when to delete it"


@EACH_PATCH
def test_a_patch_is_in_the_contract_and_fits(patch: Patch) -> None:
    if patch.name != "__init__":  # a dataclass generates it
        assert f"{patch.owner.__module__}:{patch_id(patch)}" in touched(installed()).overridden
    was_installed = hasattr(getattr(patch.owner, patch.name), "__fastkv_original__")
    patch.install()
    assert getattr(patch.owner, patch.name).__fastkv_original__ is not None
    patch.uninstall()
    assert not hasattr(getattr(patch.owner, patch.name), "__fastkv_original__")
    if was_installed:
        patch.install()


# Overrides


def adapter_classes() -> dict[str, type]:
    """Our subclasses of vLLM's classes: "module:Class" -> class."""
    found = {}
    for info in pkgutil.iter_modules(fastkv_vllm.adapter.__path__):
        module = importlib.import_module(f"{fastkv_vllm.adapter.__name__}.{info.name}")
        for name, cls in vars(module).items():
            ours = inspect.isclass(cls) and cls.__module__ == module.__name__
            if ours and any(base.__module__.startswith("vllm.") for base in cls.__mro__):
                found[f"{info.name}:{name}"] = cls
    return found


def functions_of(cls: type) -> dict[str, FunctionType]:
    plain = {name: getattr(value, "__func__", value) for name, value in cls.__dict__.items()}
    return {name: value for name, value in plain.items() if isinstance(value, FunctionType)}


def upstream_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


def overrides_of(cls: type) -> set[str]:
    """Methods of ours that stand in for one of vLLM's, but for those a dataclass generates."""
    generated = DATACLASS_METHODS if "__dataclass_params__" in cls.__dict__ else set()
    return {f for f in functions_of(cls) if any(f in base.__dict__ for base in upstream_bases(cls))} - generated


CLASSES = adapter_classes()
PAIRS = [(name, method) for name, cls in CLASSES.items() for method in sorted(overrides_of(cls))]


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=[f"{name}.{method}" for name, method in PAIRS])
def test_an_override_takes_upstreams_leading_parameters(name: str, method: str) -> None:
    """And all others through *args and **kwargs, or by name."""
    cls = CLASSES[name]
    base = next(base for base in upstream_bases(cls) if method in base.__dict__)
    theirs = list(inspect.signature(getattr(base, method)).parameters.values())
    ours = list(inspect.signature(getattr(cls, method)).parameters.values())
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(theirs)] == [p.name for p in theirs][: len(positional)]
    kinds = {p.kind for p in ours}
    taken = {p.name for p in ours}
    for p in theirs:
        passes = inspect.Parameter.VAR_KEYWORD in kinds and (
            p.kind is p.KEYWORD_ONLY or p.default is not p.empty or inspect.Parameter.VAR_POSITIONAL in kinds
        )
        assert p.name in taken or passes, f"{method} does not take {p.name}"
    for p in ours[len(theirs) :]:
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        assert not required, f"{method} requires {p.name}, which vLLM does not pass"
