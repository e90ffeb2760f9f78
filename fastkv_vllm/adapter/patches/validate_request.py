"""`Platform.validate_request`, and `AsyncLLM.generate`, which calls it too late for a stream."""

from collections.abc import Callable
from typing import Any

from vllm.platforms.interface import Platform
from vllm.v1.engine.async_llm import AsyncLLM

from fastkv_vllm.adapter.choice import Choice
from fastkv_vllm.adapter.patches.base import Patch

_choices: list[Choice] = []  # of the engine configured last in this process, at most one


def ask(choice: Choice) -> None:
    """Let the patches ask this engine's choice, and no other's."""
    _choices[:] = [choice]


def require_servable(prompt: Any, params: Any) -> None:
    """Refuse a prompt that is in the engine's form already, before anything of it is scheduled.

    Raises:
        VLLMValidationError: it asks for what this server cannot do.
    """
    if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
        _choices[0].require_servable(prompt, params)


def _wrap_validate(original: Callable[..., None]) -> Callable[..., None]:
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        _choices[0].require_servable(processed_inputs, params)

    return validate_request


def _wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        require_servable(prompt, sampling_params)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


PATCHES = (
    Patch(
        owner=Platform,
        name="validate_request",
        parameters=("cls", "processed_inputs", "params"),
        wrap=_wrap_validate,
        reason=(
            "What a compressing server cannot do for a request must be answered with an error before anything is "
            "scheduled: a method or setting it cannot serve, prompt logprobs with TSP (rows that were not propagated "
            "have no logits). Goes when plugins can validate requests."
        ),
    ),
    Patch(
        owner=AsyncLLM,
        name="generate",
        parameters=("self", "prompt", "sampling_params"),
        wrap=_wrap_generate,
        reason=(
            "A streamed request that cannot be served gets status 200 and an error as its first event, as a generator "
            "runs nothing until it is read: it is checked when the generator is made, so that it gets status 400 like "
            "any other. Goes when vLLM validates requests before it answers."
        ),
    ),
)
