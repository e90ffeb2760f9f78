"""`Platform.validate_request`."""

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms.interface import Platform

from fastkv_vllm.adapter.patches.base import Patch


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        if getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(
                "prompt_logprobs cannot be had from a server with token-selective propagation (--kv-compression "
                "fastkv): late layers do not see all prompt tokens; leave prompt_logprobs out of the request or "
                "serve with --kv-compression-config '{\"tsp_ratio\": 1.0}'"
            )

    return validate_request


PATCH = Patch(
    owner=Platform,
    name="validate_request",
    parameters=("cls", "processed_inputs", "params"),
    wrap=_wrap,
    reason=(
        "A request for prompt logprobs must be answered with an error before it is scheduled: rows that were not "
        "propagated have no logits. Installed only where TSP is on. Goes when plugins can validate requests."
    ),
)
