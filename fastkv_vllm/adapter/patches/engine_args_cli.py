"""`EngineArgs.add_cli_args`."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.config import CompressionConfig
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
            action=_CheckTogether,
            default=None,
            help="Method that compresses the KV cache of each prompt when its prefill ends. Off by default.",
        )
        group.add_argument(
            "--kv-compression-config",
            type=_json_object,
            action=_CheckTogether,
            default=None,
            metavar="JSON",
            help='Settings of the method as a JSON object, such as \'{"retention_ratio": 0.1, "tsp_layer": 15}\'.',
        )
        return parser

    return add_cli_args


class _CheckTogether(argparse.Action):
    """Stores a value; once method and settings are both there, checks them, so that a mistake is a usage error."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if namespace.kv_compression is not None and namespace.kv_compression_config is not None:
            try:
                CompressionConfig.from_mapping(namespace.kv_compression, namespace.kv_compression_config)
            except ValueError as error:
                parser.error(str(error))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object and is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object; got {text}")
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
