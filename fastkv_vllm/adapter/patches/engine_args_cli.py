"""`EngineArgs.add_cli_args`."""

import json
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.methods import method_names


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="FastKV", description="KV-cache compression and token-selective prefill (fastkv-vllm)."
        )
        group.add_argument(
            "--kv-compression",
            choices=method_names(),
            default=None,
            help="Method that compresses the KV cache of each prompt when its prefill ends. Off by default.",
        )
        group.add_argument(
            "--kv-compression-config",
            type=_json_object,
            default=None,
            metavar="JSON",
            help='Settings of the method as a JSON object, such as \'{"retention_ratio": 0.1, "tsp_layer": 15}\'.',
        )
        return parser

    return add_cli_args


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {value!r}")
    return value


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
