"""Hooks that a vLLM built with the series in patches/ has: where one is there, nothing is patched in its place.

vLLM itself is imported late: the first question is asked while it is half imported.
"""

from importlib import import_module
from importlib.util import find_spec

from fastkv_vllm.adapter.arguments import CompressionArgs

_ENGINE_ARGUMENTS = "vllm.plugins.engine_arguments"
VALIDATOR_FIELD = "request_validator_cls"
DETOUR_FIELD = "layer_detour"


def register_arguments() -> bool:
    """0001: make our arguments vLLM's own; False where vLLM has no such hook. Goes before `vllm.engine.arg_utils`."""
    if find_spec(_ENGINE_ARGUMENTS) is None:
        return False
    import_module(_ENGINE_ARGUMENTS).register_engine_arguments(CompressionArgs)
    return True


def names_request_validators() -> bool:
    """0002: a configuration names the class that validates requests."""
    from vllm.config import VllmConfig

    return VALIDATOR_FIELD in VllmConfig.__dataclass_fields__


def detours_layers() -> bool:
    """0004: a forward context says what is called in a decoder layer's place."""
    from vllm.forward_context import ForwardContext

    return DETOUR_FIELD in ForwardContext.__dataclass_fields__


def streams_have_our_field() -> bool:
    """0005: the chunk that ends a stream has the field in which whole answers say what was done."""
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    return "kv_transfer_params" in CompletionStreamResponse.model_fields
