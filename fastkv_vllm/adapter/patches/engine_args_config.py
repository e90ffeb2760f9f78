"""`EngineArgs.create_engine_config`."""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from fastkv_vllm.adapter.patches.base import Patch
from fastkv_vllm.adapter.wiring import prepare_engine_args, wire_compression


def _wrap(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config = prepare_engine_args(self)
        vllm_config = original(self, *args, **kwargs)
        if config is not None:
            wire_compression(vllm_config, config)
        return vllm_config

    return create_engine_config


PATCH = Patch(
    owner=EngineArgs,
    name="create_engine_config",
    parameters=("self", "usage_context", "headless"),
    wrap=_wrap,
    reason=(
        "Only after this call are the scheduler and worker classes final. Names ours and puts the configuration into "
        "`additional_config`, which travels to every process. Goes when a plugin can take part in building the config."
    ),
)
