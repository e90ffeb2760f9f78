"""Servers of the tiny trained model, each started once."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from benchmarks.server import Server, serve

CHECKPOINT = Path(__file__).parents[2] / "benchmarks/tiny_model/checkpoint"
MODEL = "tiny"
SETTINGS = {"retention_ratio": 0.1, "tsp_layer": 5, "tsp_ratio": 0.2, "min_tokens": 512, "max_tsp_tokens": 3 * 2048}
FLAGS = ("--served-model-name", MODEL, "--max-model-len", "2048", "--max-num-batched-tokens", "600", "--enforce-eager")
# The checkpoint has none: without one all chats are refused.
CHAT = ("--chat-template", "{% for message in messages %}{{ message.content }}{% endfor %}")
# Engine tests of the same session set other values for their own process.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_USE_V2_MODEL_RUNNER": "0"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def compressing_server() -> Iterator[Server]:
    environment = ENVIRONMENT | {"VLLM_PLUGINS": "fastkv,fastkv_status"}
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=(*FLAGS, *CHAT), env=environment) as server:
        yield server


@pytest.fixture(scope="session")
def plain_server() -> Iterator[Server]:
    with serve(CHECKPOINT, extra=(*FLAGS, *CHAT), env=ENVIRONMENT) as server:
        yield server


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120, max_retries=0)
