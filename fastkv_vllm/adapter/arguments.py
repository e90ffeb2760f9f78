"""The two arguments we add to vLLM's: fields, flags, check. Imports no vLLM: it may not be there yet."""

import argparse
import dataclasses
import json
from typing import Any

from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import method_names


@dataclasses.dataclass(kw_only=True)
class CompressionArgs:
    """Base of the engine arguments in a vLLM with patches/0001, which calls the methods; elsewhere patches/ does."""

    kv_compression: str | None = None
    kv_compression_config: dict[str, Any] | None = None

    @staticmethod
    def add_plugin_cli_args(parser: Any) -> None:
        """Add our flags to a parser."""
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

    def check_engine_args(self) -> None:
        """Tell a mistake before vLLM looks at anything."""
        configured(self)

    def prepare_engine_config(self) -> None:
        """Before vLLM builds its configuration."""
        from fastkv_vllm.adapter.wiring import prepare_engine_args

        prepare_engine_args(self)

    def finish_engine_config(self, vllm_config: Any) -> None:
        """After vLLM has built it."""
        from fastkv_vllm.adapter.wiring import wire_compression

        config = configured(self)
        if config is not None:
            wire_compression(vllm_config, config)


def configured(args: Any) -> CompressionConfig | None:
    """Configuration the engine arguments ask for; None: no compression.

    Raises:
        ValueError: the settings do not fit, or come without a method.
    """
    if args.kv_compression is not None:
        return CompressionConfig.from_mapping(args.kv_compression, args.kv_compression_config or {})
    if args.kv_compression_config is not None:
        raise ValueError("--kv-compression-config is given without --kv-compression; name a method too")
    return None


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
    except (ValueError, RecursionError) as error:  # a number or brackets without end are none
        raise argparse.ArgumentTypeError(f"must be a JSON object and is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object; got {text}")
    return value
