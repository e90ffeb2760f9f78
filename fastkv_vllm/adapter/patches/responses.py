"""`OpenAIServingResponses._generate_with_builtin_tools`, which asks the engine too late for a stream."""

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.adapter.patches.validate_request import require_servable


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def _generate_with_builtin_tools(
        self: Any, request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        require_servable(engine_input, sampling_params)
        return original(self, request_id, engine_input, sampling_params, *args, **kwargs)

    return _generate_with_builtin_tools


PATCH = Patch(
    owner=OpenAIServingResponses,
    name="_generate_with_builtin_tools",
    parameters=("self", "request_id", "engine_input", "sampling_params"),
    wrap=_wrap,
    reason=(
        "A generator around the engine's, which is made only when this one is first read: a streamed response has sent "
        "status 200 by then, and its connection would end without an answer. Checked when this one is made. Goes when "
        "vLLM validates requests before it answers."
    ),
)
