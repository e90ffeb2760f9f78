"""`Platform.validate_request`."""

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms.interface import Platform

from fastkv_vllm.adapter.choice import Choice
from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.adapter.request import context_tokens

_choices: list[Choice] = []  # of the engine configured last in this process, at most one


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        context_tokens(params, len(processed_inputs.get("prompt_token_ids") or ()))
        config = _choices[0].of(params)
        if config is not None and config.uses_tsp and getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(
                f"prompt_logprobs cannot be had with token-selective propagation ({config.method}): late layers do not "
                "see all prompt tokens; leave prompt_logprobs out of the request, or let it ask for kv_compression "
                '"none" or (fastkv, asl) set "tsp_ratio": 1.0'
            )

    return validate_request


PATCH = Patch(
    owner=Platform,
    name="validate_request",
    parameters=("cls", "processed_inputs", "params"),
    wrap=_wrap,
    reason=(
        "What a compressing server cannot do for a request must be answered with an error before anything is "
        "scheduled: a method or setting it cannot serve, prompt logprobs with TSP (rows that were not propagated "
        "have no logits). Goes when plugins can validate requests."
    ),
)


def install(choice: Choice) -> None:
    """Put the checks of this server in place of any others of ours."""
    uninstall()
    _choices.append(choice)
    PATCH.install()


def uninstall() -> None:
    """Take our checks away."""
    PATCH.uninstall()
    _choices.clear()
