"""`EngineArgs.add_cli_args`."""

from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from fastkv_vllm.adapter.arguments import CompressionArgs
from fastkv_vllm.adapter.patches.base import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        CompressionArgs.add_plugin_cli_args(parser)
        return parser

    return add_cli_args


PATCH = Patch(
    owner=EngineArgs,
    name="add_cli_args",
    parameters=("parser",),
    wrap=_wrap,
    reason=(
        "vLLM has no registry for engine arguments; it loads plugins right before this call so that they can add "
        "theirs. Goes when there is one."
    ),
)
