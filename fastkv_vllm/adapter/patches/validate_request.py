"""`Platform.validate_request`."""

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms.interface import Platform

from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.adapter.request import context_tokens


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        context_tokens(params, len(processed_inputs.get("prompt_token_ids") or ()))

    return validate_request


def _wrap_tsp(original: Callable[..., None]) -> Callable[..., None]:
    check = _wrap(original)

    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        check(cls, processed_inputs, params)
        if getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(
                "prompt_logprobs cannot be had from a server with token-selective propagation (--kv-compression "
                "fastkv): late layers do not see all prompt tokens; leave prompt_logprobs out of the request or "
                "serve with --kv-compression-config '{\"tsp_ratio\": 1.0}'"
            )

    return validate_request


def _patch(wrap: Callable[..., Callable[..., None]]) -> Patch:
    return Patch(
        owner=Platform,
        name="validate_request",
        parameters=("cls", "processed_inputs", "params"),
        wrap=wrap,
        reason=(
            "What a compressing server cannot do for a request must be answered with an error before anything is "
            "scheduled. With TSP that includes prompt logprobs: rows that were not propagated have no logits. Goes "
            "when plugins can validate requests."
        ),
    )


PATCH, TSP_PATCH = _patch(_wrap), _patch(_wrap_tsp)


def install(*, uses_tsp: bool) -> None:
    """Put the checks for this kind of server in place of any others of ours."""
    uninstall()
    (TSP_PATCH if uses_tsp else PATCH).install()


def uninstall() -> None:
    """Take our checks away."""
    PATCH.uninstall()
