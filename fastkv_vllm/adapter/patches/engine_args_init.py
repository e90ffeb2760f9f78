"""`EngineArgs.__init__` and its fields."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from fastkv_vllm.adapter.arguments import CompressionArgs, configured
from fastkv_vllm.adapter.patches.base import Patch

FIELDS = tuple(field.name for field in dataclasses.fields(CompressionArgs))


def add_fields() -> None:
    """Make our arguments dataclass fields of vLLM's, so that copies and `from_cli_args` carry them."""
    for owner in (EngineArgs, AsyncEngineArgs):
        for field in dataclasses.fields(CompressionArgs):
            owner.__dataclass_fields__.setdefault(field.name, field)


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: EngineArgs, *args: Any, **kwargs: Any) -> None:
        for name in FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        configured(self)  # a mistake is told before vLLM looks at anything
        original(self, *args, **kwargs)

    return __init__


PATCHES = tuple(
    Patch(
        owner=owner,
        name="__init__",
        parameters=("self", "model"),
        wrap=_wrap,
        reason=(
            "`LLM(model, kv_compression=...)` is a TypeError: keyword arguments reach EngineArgs unread. Takes our "
            "two arguments off before the generated initialiser sees them. Goes when vLLM lets a plugin add fields."
        ),
    )
    for owner in (EngineArgs, AsyncEngineArgs)
)
