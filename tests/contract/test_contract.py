"""The installed vLLM is the one the adapter was written against, and the record says what the next one changes."""

import ast
import functools
import json
import zipfile
from pathlib import Path

import pytest

from tests.contract.record import HEADING, PAGE, RECORD, installed, signatures, supported, table
from tests.contract.source import Source
from tests.contract.touched import ADAPTER, MEMBERS

FOUND = signatures(installed())
COMMAND = "python -m tests.contract.record"


def record() -> dict[str, dict[str, dict[str, str | None]]]:
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("how", FOUND)
def test_installed_signatures_are_the_recorded_ones(how: str) -> None:
    """A symbol on one side only: newly touched and not recorded, or no longer found upstream."""
    recorded, found = record()[supported()][how], FOUND[how]
    changed = {s: (recorded.get(s), found.get(s)) for s in recorded.keys() | found if recorded.get(s) != found.get(s)}
    assert changed == {}, f"(recorded, found); {COMMAND} records what is found"


@pytest.mark.parametrize("how", FOUND)
def test_everything_touched_is_there(how: str) -> None:
    assert [symbol for symbol, signature in FOUND[how].items() if signature is None] == []


def test_next_release_is_in_the_docs() -> None:
    page = PAGE.read_text().split(HEADING)[1]
    assert page.strip() == table(record()).strip(), f"{COMMAND} writes it"
    assert "_get_local_prefix_cache_hit" in page, "0.33.0 changed it, so the table is not empty by mistake"


@pytest.mark.parametrize("owner", MEMBERS)
def test_members_are_touched(owner: str) -> None:
    """The one list kept by hand names nothing the adapter has left behind."""
    assert [name for name in MEMBERS[owner].split() if name not in names_in_the_adapter()] == []


@functools.cache
def names_in_the_adapter() -> set[str]:
    names = set()
    for path in ADAPTER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
    return names


def test_the_adapter_s_seams_are_found() -> None:
    """One of each way a symbol is found; were a way lost, the record would shrink with it."""
    scheduler, attention = "vllm.v1.core.sched.scheduler:Scheduler", "vllm.v1.attention.backends.cpu_attn"
    assert f"{scheduler}._update_after_schedule" in FOUND["overridden"]
    assert "vllm.engine.arg_utils:EngineArgs.add_cli_args" in FOUND["overridden"], "patched"
    assert f"{scheduler}.requests" in FOUND["used"], "taken from self"
    assert f"{attention}:CPUAttentionBackendImpl.forward" in FOUND["used"], "named by hand"
    assert "vllm._custom_ops:cpu_attn_reshape_and_cache" in FOUND["used"], "attribute of an imported module"
    assert "vllm.v1.request:Request.num_prompt_tokens" in FOUND["used"], "attribute of an annotated parameter"
    assert "vllm.distributed:tensor_model_parallel_all_reduce" in FOUND["used"], "an imported function"


FILES = {
    "vllm/__init__.py": "from .api import *\nfrom vllm import sub\n",
    "vllm/api.py": "from .sub.base import Base as Renamed\n__all__ = ['Renamed']\nif 1:\n    flag: bool = True\n",
    "vllm/sub/__init__.py": "from .base import Base, late\ntry:\n    import torch\nexcept ImportError:\n    pass\n",
    "vllm/sub/base.py": """
class Root:
    size: int = 3
    def __init__(self, a: int, *, b: str = "x") -> None:
        self.a, self.b = a, b
        if a:
            self.c: list[int] = []
    @property
    def half(self) -> int: return 1
class Base(Root):
    @classmethod
    def make(cls, x: int = 1, *args: int, **kwargs: str) -> "Base": ...
def late(x, /, y=None): ...
""",
}
SIGNATURES = {
    "vllm:Renamed": "class",
    "vllm:sub": "module",
    "vllm:flag": ": bool",
    "vllm.sub:late": "(x, /, y=None)",
    "vllm.sub:Base.make": "@classmethod (cls, x=1, *args, **kwargs)",
    "vllm:Renamed.__init__": "(self, a, *, b='x')",
    "vllm.sub:Base.size": ": int",
    "vllm.sub:Base.half": "@property (self)",
    "vllm.sub:Base.b": "variable",
    "vllm.sub:Base.c": ": list[int]",
    "vllm.sub:Base.d": None,
    "vllm.sub:late.x": None,
    "vllm.sub:absent": None,
    "vllm.absent:late": None,
}


@pytest.mark.parametrize("kind", ["folder", "wheel"])
def test_signatures_are_read_through_imports_and_bases(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "vllm-0.0.0-py3-none-any.whl" if kind == "wheel" else tmp_path
    for name, text in FILES.items():
        if kind == "wheel":
            with zipfile.ZipFile(path, "a") as wheel:
                wheel.writestr(name, text)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    source = Source(path)
    assert {symbol: source.signature(symbol) for symbol in SIGNATURES} == SIGNATURES


def test_table_shows_what_changed_went_and_was_not_looked_up() -> None:
    ours = {"overridden": {"m:C.f": "(self)", "m:C.g": "(self)"}, "used": {"m:x": ": int | None", "m:y": "class"}}
    theirs = {"overridden": {"m:C.f": "(self, a)", "m:C.g": "(self)"}, "used": {"m:x": None}}
    assert table({supported(): ours, "9.9": theirs}).splitlines() == [
        f"| symbol | we | {supported()} | 9.9 |",
        "|---|---|---|---|",
        "| `m:C.f` | override | `(self)` | `(self, a)` |",
        "| `m:x` | use | `: int \\| None` | not there |",
        "",
        "Not looked up in 9.9 yet: `m:y`.",
    ]
