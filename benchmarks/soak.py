"""Thousands of requests of all kinds to one real server: nothing lost, nothing wrong, memory grows like plain vLLM's.

python -m benchmarks.soak [--requests 5000] [--seed 0] [--json FILE]

Half of the requests go to a server with prefix caching (snapkv), half to one that sends fewer rows on (fastkv); the
former also go to plain vLLM, whose worker keeps something for each number of rows it meets first. Their
lengths, methods, settings and answers' lengths are drawn from the seed; some clients go away before the first token or
in the middle of the answer; prompts come again; the pool is so small that requests are preempted. After each part of
the requests the server is left idle, when it must hold no block (it ends itself where it lost one); at the end it gets
some of the requests again, one at a time, and must give the same tokens.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmarks.environment import describe_command, describe_environment
from benchmarks.questions import CHECKPOINT, TSP_LAYER
from benchmarks.server import Server, sample_value, serve
from benchmarks.tiny_model.language import TASKS, make_example

CONCURRENCY = 12
NUM_PARTS = 10
NUM_AGAIN = 50  # requests of a server that are sent again at its end
LONGEST_PROMPT, LONGEST_ANSWER = 1700, 250
# More of the prompts than of the pool: 12 requests want about 400 blocks.
FLAGS = (
    *("--max-model-len", "2048", "--max-num-seqs", "12", "--max-num-batched-tokens", "700", "--enforce-eager"),
    *("--num-gpu-blocks-override", "160", "--dtype", "float32", "--disable-uvicorn-access-log"),
)
PLAIN = "none"
SERVERS = {
    PLAIN: "--enable-prefix-caching",  # the first: the others' memory is held against it
    "snapkv": "--enable-prefix-caching",
    "fastkv": "--no-enable-prefix-caching",
}
SETTINGS: dict[str, Any] = {"retention_ratio": 0.1, "min_tokens": 256}
# Of a server whose requests may ask for lazyllm: rows of its three cuts.
PROPAGATING = SETTINGS | {"tsp_layer": TSP_LAYER, "max_tsp_tokens": 3 * 2048}
# Method and settings a request may ask for; those in fastkv's list send fewer rows on.
CHOICES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "snapkv": [
        ("none", {}),
        ("snapkv", {"retention_ratio": 0.3}),
        ("snapkv", {"retention_ratio": 0.05, "min_attention_recall": 0.9}),
        ("snapkv", {"codec": "int8"}),
        ("adakv", {}),
        ("pyramidkv", {"retention_ratio": 0.2}),
        ("tova", {}),
        ("streamingllm", {}),
        ("dbudgetkv", {"retention_ratio": 0.8}),
    ],
    "fastkv": [
        ("none", {}),
        ("fastkv", {"tsp_layer": TSP_LAYER, "tsp_ratio": 0.3}),
        ("fastkv", {"tsp_layer": [2, 5], "tsp_ratio": [0.5, 0.3]}),
        ("gemfilter", {"tsp_layer": TSP_LAYER}),
        ("lazyllm", {"retention_ratio": 0.5}),
        ("pyramidinfer", {"retention_ratio": 0.6}),
        ("snapkv", {}),
        ("h2o", {}),
        ("a2sf", {}),
    ],
}
MOST_GROWTH = 1.05  # of the server's memory, from the second part to the last, against plain vLLM's
TOLERANCE = 0.02  # of a logprob in float32, which may differ by this between batches


@dataclass(frozen=True)
class Ask:
    """One request and what its client does.

    Fields:
        task, length, seed: of the example that is the prompt.
        max_tokens: of the answer, which no token ends.
        method: what the request asks for; None: the server's own.
        settings: of the method.
        leaves_after: chunks after which the client goes away; 0: at once; None: it stays.
    """

    task: str
    length: int
    seed: int
    max_tokens: int
    method: str | None
    settings: dict[str, Any]
    leaves_after: int | None


@dataclass(frozen=True)
class Told:
    """Tokens and their logprobs; best: the logprob of the best other token at each place."""

    tokens: list[str]
    logprobs: list[float]
    best: list[float]


def draw(seed: int, number: int, server: str) -> Ask:
    """The request of a number; a function of the arguments alone."""
    rng = random.Random(f"{seed} {server} {number}")
    # Few prompts, so that many come again; every sixth length is any.
    length = rng.choice([128, 500, 900, 1472, LONGEST_PROMPT, rng.randint(64, LONGEST_PROMPT)])
    method, settings = rng.choice([(None, {}), *CHOICES[server]])
    max_tokens = rng.randint(1, LONGEST_ANSWER if rng.random() < 0.3 else 24)
    leaves = rng.choice([None] * 7 + [0, rng.randrange(4), rng.randrange(60)])
    return Ask(rng.choice([*TASKS]), length, rng.randrange(4), max_tokens, method, settings, leaves)


def send(client: openai.OpenAI, model: str, ask: Ask) -> Told | None:
    """Send a request and read the answer; None: its client went away before the end.

    Raises:
        RuntimeError: the answer has not the tokens it was to have.
        openai.APIError: the server refused it or broke.
    """
    extra: dict[str, Any] = {} if ask.method is None else {"kv_compression": ask.method}
    if ask.settings:
        extra["kv_compression_config"] = json.dumps(ask.settings)
    told = Told([], [], [])
    stream = client.completions.create(
        model=model,
        prompt=make_example(ask.task, ask.length, ask.seed).prompt,
        max_tokens=ask.max_tokens,
        temperature=0,
        logprobs=2,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": extra},
    )
    with stream:
        if ask.leaves_after == 0:
            return None
        for number, chunk in enumerate(stream, 1):
            for choice in chunk.choices:
                _read(choice.logprobs, told)
            if number == ask.leaves_after:
                return None
    if len(told.tokens) != ask.max_tokens:
        raise RuntimeError(f"{len(told.tokens)} tokens of {ask.max_tokens} came back: {ask}")
    return told


def _read(logprobs: Any, told: Told) -> None:
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        told.tokens.append(token)
        told.logprobs.append(logprob)
        told.best.append(max((value for name, value in top.items() if name != token), default=float("-inf")))


def differs(told: Told, again: Told, tolerance: float = TOLERANCE) -> str | None:
    """Where two answers to one request are not the same; None: they are, or part where two tokens were as good."""
    for i, (token, other) in enumerate(zip(told.tokens, again.tokens, strict=True)):
        if abs(told.logprobs[i] - again.logprobs[i]) > tolerance:
            return f"token {i}: {token!r} at {told.logprobs[i]:.4f}, then {other!r} at {again.logprobs[i]:.4f}"
        if token != other:
            tie = told.logprobs[i] - told.best[i] <= tolerance
            return None if tie else f"token {i}: {token!r}, then {other!r}"
    return None


def growth(memory: Sequence[float], plain: Sequence[float]) -> str | None:
    """Where memory after the parts grows more than plain vLLM's under the same load; None: it does not."""
    ours, theirs = (of[-1] / of[min(1, len(of) - 1)] for of in (memory, plain))
    return f"memory: {ours:.3f} times what it was, plain vLLM {theirs:.3f}" if ours > MOST_GROWTH * theirs else None


def memory_mib(server: Server) -> float:
    """Memory of the server's processes that no other process has, MiB."""
    root = psutil.Process(server.pid)
    return sum(process.memory_full_info().uss for process in (root, *root.children(recursive=True))) / 2**20


def wait_until_idle(server: Server, patience_s: float = 120) -> None:
    """Return when no request and no block is held.

    Raises:
        RuntimeError: something still is after `patience_s` seconds.
    """
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        samples = server.metrics()
        held = {name: sample_value(samples, name) for name in names}
        if not any(held.values()):
            return
        time.sleep(0.2)
    raise RuntimeError(f"not idle after {patience_s:.0f} s: {held}")


def soak(
    server: Server, asks: Sequence[Ask], num_again: int = NUM_AGAIN, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Send all, in parts with an idle server between them, and some of them again.

    Returns:
        Counts, the memory after each part in MiB, and what went wrong, a sentence each.
    """
    acts: Counter[str] = Counter()
    wrong: list[str] = []
    told: list[tuple[Ask, Told]] = []
    memory: list[float] = []
    size = -(-len(asks) // NUM_PARTS)
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        for start in range(0, len(asks), size):
            part = asks[start : start + size]
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                answers = list(pool.map(lambda ask: send(client, server.model, ask), part))
            wait_until_idle(server)
            memory.append(round(memory_mib(server), 1))
            print(f"{start + len(part)} requests, {memory[-1]} MiB", file=sys.stderr, flush=True)
            for ask, answer in zip(part, answers, strict=True):
                acts["left" if answer is None else "read to the end"] += 1
                if answer is not None:
                    told.append((ask, answer))
        step = max(1, len(told) // num_again)
        for ask, answer in told[::step]:
            again = send(client, server.model, ask)
            acts["sent again"] += 1
            if again is not None and (difference := differs(answer, again, tolerance)):
                wrong.append(f"{ask}: {difference}")
    wait_until_idle(server)
    return {"acts": dict(acts), "memory_mib": memory, "wrong": wrong, "metrics": _figures(server)}


def _figures(server: Server) -> dict[str, float]:
    samples = server.metrics()
    names = ("num_preemptions", "prefix_cache_hits", "generation_tokens")
    by_method = samples.get("vllm:fastkv_requests_compressed_total", [])
    compressed = {sample.labels["method"]: sample.value for sample in by_method}
    return {name: sample_value(samples, f"vllm:{name}_total") for name in names} | {
        f"compressed by {name}": value for name, value in compressed.items()
    }


def _asks(name: str, seed: int, count: int) -> list[Ask]:
    """Requests of a server; plain vLLM's are the first one's, without a method."""
    if name == PLAIN:
        return [replace(draw(seed, number, "snapkv"), method=None, settings={}) for number in range(count)]
    return [draw(seed, number, name) for number in range(count)]


def _served(name: str) -> dict[str, Any]:
    """Method and settings of a server."""
    if name == PLAIN:
        return {}
    return {"method": name, "config": PROPAGATING if name == "fastkv" else SETTINGS}


def main() -> None:
    """Command line; ends with status 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    report = {
        "benchmark": "soak",
        "command": describe_command(),
        "environment": describe_environment(),
        "requests": args.requests,
        "seed": args.seed,
        "servers": {},
    }
    for name, caching in SERVERS.items():
        asks = _asks(name, args.seed, args.requests // len(CHOICES))
        with serve(CHECKPOINT, **_served(name), extra=(*FLAGS, caching)) as server:
            entry = report["servers"][name] = soak(server, asks)
        if grown := growth(entry["memory_mib"], report["servers"][PLAIN]["memory_mib"]):
            entry["wrong"].append(grown)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if any(entry["wrong"] for entry in report["servers"].values()):
        sys.exit("tokens or memory are not as they should be: see wrong")


if __name__ == "__main__":
    main()
