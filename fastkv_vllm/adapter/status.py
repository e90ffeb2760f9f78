"""A read-only status page beside vLLM's own routes: what is on, live figures, what stayed of the last prompt."""

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterable

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from prometheus_client import Metric
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.v1.metrics.prometheus import get_prometheus_registry

from fastkv_vllm.adapter.kept import merged
from fastkv_vllm.adapter.status_page import Status, render
from fastkv_vllm.adapter.wiring import CONFIG_KEY, STATUS_PLUGIN, overview

PATH = "/fastkv"

_LAST_KEPT = "last_kept"  # of our worker
_ENGINE_TIMEOUT_S = 5.0
FRESH_S = 1.0  # however many look, the engine is asked once in this time
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class StatusPage(EndpointPlugin):
    """`vllm.endpoint_plugins`: GET /fastkv; vLLM loads it only where VLLM_PLUGINS names it."""

    name = STATUS_PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, _page, methods=["GET"], response_class=HTMLResponse, summary="Status of compression")

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        assert engine_client is not None, "a server that generates has an engine"
        setattr(state, STATUS_PLUGIN, _Watch(engine_client))


async def _page(request: Request) -> HTMLResponse:
    status = await getattr(request.app.state, STATUS_PLUGIN).status()
    return HTMLResponse(render(status), headers=_HEADERS)


class _Watch:
    """Asks the engine when someone looks, and at no other time.

    Args:
        engine: of the server; of several replicas the first is asked for the map.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self._status: Status | None = None
        self._asked_s = 0.0

    async def status(self) -> Status:
        async with self._lock:
            if self._status is None or time.monotonic() - self._asked_s > FRESH_S:
                self._status = await self._ask()
                self._asked_s = time.monotonic()
            return self._status

    async def _ask(self) -> Status:
        config = self._engine.vllm_config
        is_on = CONFIG_KEY in config.additional_config
        last, answers = None, True
        if is_on:
            try:
                async with asyncio.timeout(_ENGINE_TIMEOUT_S):
                    ranks = await self._engine.collective_rpc(_LAST_KEPT)
                last = merged(ranks, config.model_config.get_total_num_kv_heads())
            except TimeoutError:
                answers = False  # it is in the middle of a long step
        return Status(
            model=config.model_config.served_model_name,
            settings=overview(config) if is_on else None,
            figures=figures(get_prometheus_registry().collect()),
            engine_answers=answers,
            num_engines=config.parallel_config.data_parallel_size,
            last=last,
        )


def figures(families: Iterable[Metric]) -> dict[str, dict[str, float]]:
    """vLLM's and our metrics, added up over models and engines: name -> value by the label of its own ("" if none)."""
    found: dict[str, dict[str, float]] = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                own = [value for label, value in sample.labels.items() if label in ("method", "reason", "layer")]
                values = found.setdefault(sample.name.removeprefix("vllm:").removesuffix("_total"), {})
                values["".join(own)] = values.get("".join(own), 0.0) + sample.value
    return found
