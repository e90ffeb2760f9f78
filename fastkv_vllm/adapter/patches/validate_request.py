"""`Platform.validate_request`."""

from collections.abc import Callable
from typing import Any

from vllm.platforms.interface import Platform

from fastkv_vllm.adapter.choice import Choice
from fastkv_vllm.adapter.patches.base import Patch

_choices: list[Choice] = []  # of the engine configured last in this process, at most one


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        _choices[0].require_servable(processed_inputs, params)

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
