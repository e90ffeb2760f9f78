"""The class that checks requests in a vLLM with patches/0002."""

from typing import Any

from vllm.config import VllmConfig

from fastkv_vllm.adapter.choice import Choice
from fastkv_vllm.adapter.wiring import compression_config


class RequestValidator:
    """Made for an engine's configuration; called with each request."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._choice = Choice(vllm_config, compression_config(vllm_config))

    def __call__(self, processed_inputs: Any, params: Any) -> None:
        self._choice.require_servable(processed_inputs, params)
