"""Needle questions to the tiny model, asked through the OpenAI API of a running server."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from benchmarks.server import Server, sample_value
from benchmarks.tiny_model.language import Example
from fastkv_vllm.codecs import CODECS
from fastkv_vllm.methods import CUT_BUDGETS, method_class

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
TSP_LAYER = 5  # where this model has resolved the question; of 0..7
# Head budgets -> what calibration saw this model's heads do (each file names its command), and what goes with it.
# Paths from the project's root, where benchmarks run: they are reported with the results.
HEAD_SETTINGS = {
    "importance": {"head_weights": "benchmarks/tiny_model/heads.json"},
    "retrieval": {"head_weights": "benchmarks/tiny_model/duo.json", "num_sink": 4, "streaming_tokens": 68},
}
CHANNELS = "benchmarks/tiny_model/channels.json"  # which channels of this model's heads are alike
SHARING = Path(__file__).parent / "tiny_model" / "sharing.json"  # which layers can read another's entries
MERGING = Path(__file__).parent / "tiny_model" / "merging.json"  # pairs of layers, and what merging them does
MAX_ANSWER_TOKENS = 20
LONG_ANSWER_TOKENS = 1536  # seconds of decoding, of which only the first are waited for
PLAIN = "none"  # stands for vLLM without --kv-compression wherever methods are listed


@dataclass(frozen=True)
class Reply:
    """An answer, and the wall seconds from the request to its first token."""

    text: str
    is_finished: bool
    first_token_s: float

    def is_right(self, example: Example) -> bool:
        """Exact match: the right words and then the end mark."""
        return self.is_finished and self.text.split() == example.answer.split()


def tiny_model_config(method: str) -> dict[str, Any]:
    """The method's defaults, except for what depends on the model."""
    cls = method_class(method)
    finds_its_layer = cls.layer_budgets in CUT_BUDGETS or cls.default_rank_variance is not None
    return {
        **({"tsp_layer": TSP_LAYER} if cls.propagates and not finds_its_layer else {}),
        **HEAD_SETTINGS.get(cls.head_budgets, {}),
        **({"channel_groups": CHANNELS} if cls.default_codec and CODECS[cls.default_codec].artefact else {}),
        **({"layer_owners": _owners(SHARING)} if cls.shares_layers else {}),
        **({"layer_owners": _owners(MERGING), "merge_limit": 1.0} if cls.default_merge_layers else {}),
    }


def _owners(report: Path) -> list[int]:
    """Layer whose entries each layer reads, or with which it is merged."""
    owners: list[int] = json.loads(report.read_text())["data"]["owners"]
    return owners


def ask(server: Server, examples: list[Example], *, concurrency: int = 1) -> list[Reply]:
    """Answer the first question of each example, at temperature 0, in order.

    Args:
        concurrency: requests under way at once.
    """
    with _client(server) as client, ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda example: _ask(client, server.model, example), examples))


def prompt_blocks_held(server: Server, example: Example) -> int:
    """Blocks the server holds for one prompt while it decodes, those that hold only answer tokens not counted.

    Read from `/metrics` in the middle of a long answer: `vllm:kv_cache_usage_perc` times the pool's size
    (`vllm:cache_config_info`; one block is vLLM's null block). The server must have no other request, and must have
    answered one before: its very first answer may be over before it finds time for a reading. On few cores only the
    reading at the first token comes in time (while the engine decodes the server waits for a core), so the prompt
    should end inside a block, not at its border.

    Raises:
        RuntimeError: the answer ended before a reading; blocks would be counted as free.
    """
    before = sample_value(server.metrics(), "vllm:generation_tokens_total")
    with _client(server) as client:
        stream = client.completions.create(
            model=server.model,
            prompt=example.prompt,
            temperature=0,
            max_tokens=LONG_ANSWER_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            for _ in stream:
                samples = server.metrics()
                config = samples["vllm:cache_config_info"][0].labels
                block_size = int(config["block_size"])
                num_prompt = len(example.prompt_ids)
                num_tokens = num_prompt + int(sample_value(samples, "vllm:generation_tokens_total") - before)
                usage = sample_value(samples, "vllm:kv_cache_usage_perc")
                if usage == 0:
                    break
                if num_tokens == num_prompt or num_tokens % block_size in (0, 1, block_size - 1):
                    continue  # the block of the next token may or may not be there yet
                held = round(usage * (int(config["num_gpu_blocks"]) - 1))
                return held - (-(-num_tokens // block_size) - -(-num_prompt // block_size))
    raise RuntimeError("the answer ended before the blocks could be read")


def _ask(client: openai.OpenAI, model: str, example: Example) -> Reply:
    start = time.perf_counter()
    first_token_s, finish = 0.0, None
    parts = []
    stream = client.completions.create(
        model=model, prompt=example.prompt, temperature=0, max_tokens=MAX_ANSWER_TOKENS, stream=True
    )
    for chunk in stream:
        first_token_s = first_token_s or time.perf_counter() - start
        parts.append(chunk.choices[0].text)
        finish = chunk.choices[0].finish_reason or finish
    return Reply("".join(parts), finish == "stop", first_token_s)


@contextmanager
def _client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        yield client
