"""What a server does when a client, a signal or a dead process gets in its way (docs/operations.md)."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from benchmarks.server import Server, sample_value, serve
from benchmarks.tiny_model.language import make_example
from tests.server.conftest import CHECKPOINT, ENVIRONMENT, FLAGS, MODEL, SETTINGS, client_of

LONG = [make_example("niah", 1024, seed) for seed in range(8)]
PATIENCE_S = 60  # with a step, or with an end, on a busy machine
# Answers so long that a test that waits for its turn on a busy machine still finds them under way.
ROOM = ("--max-model-len", "4608")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """There is no room for what it prints; ended by the last test that uses it."""
    extra, full = (*FLAGS, *ROOM, "--shutdown-timeout", str(PATIENCE_S)), Path("/dev/full")
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=extra, env=ENVIRONMENT, stdout=full) as server:
        yield server


@pytest.fixture(scope="module")
def single() -> Iterator[Server]:
    """One engine of one rank; ended by the test that uses it."""
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=(*FLAGS, *ROOM), env=ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="module")
def replicas() -> Iterator[Server]:
    """Two engines behind one address; ended by the last test that uses it."""
    extra = (*FLAGS, *ROOM, "--data-parallel-size", "2")
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=extra, env=ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="module")
def ranks() -> Iterator[Server]:
    """Two ranks of one engine; ended by the test that uses it."""
    extra, env = (*FLAGS, *ROOM, "--tensor-parallel-size", "2"), ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=extra, env=env) as server:
        yield server


def answer(server: Server, example) -> str:
    reply = client_of(server).completions.create(model=MODEL, prompt=example.prompt, max_tokens=8, temperature=0)
    return reply.choices[0].text.strip()


class Stream(threading.Thread):
    """A long answer, read as it comes.

    Fields:
        begun: whether a token has come.
        num_tokens: of the whole answer, once it has ended.
        end: the answer's finish reason, or the exception that cut it off.
    """

    def __init__(self, server: Server, example, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.begun, self.num_tokens, self.end = False, None, None
        self._ask = lambda: client_of(server).completions.create(
            model=MODEL,
            prompt=example.prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        self.start()

    def run(self) -> None:
        try:
            for chunk in self._ask():
                self.begun = True
                if chunk.choices:
                    self.end = chunk.choices[0].finish_reason
                if chunk.usage:
                    self.num_tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            self.end = error


def wait_until(holds, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not after {PATIENCE_S} s: {what}"
        time.sleep(0.1)


def generated(server: Server) -> float:
    return sample_value(server.metrics(), "vllm:generation_tokens_total")


def is_idle(server: Server) -> bool:
    samples = server.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(sample_value(samples, name) == 0 for name in names)


def processes_of(server: Server) -> list[psutil.Process]:
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def exit_status(processes: list[psutil.Process]) -> int:
    """Of the first; none of the others outlives it for long."""
    status = processes[0].wait(PATIENCE_S)
    _, alive = psutil.wait_procs(processes[1:], PATIENCE_S)
    assert not alive, "left behind"
    return status


def test_a_full_disk_loses_logs_and_no_answers(server: Server) -> None:
    assert [answer(server, example) for example in LONG[:3]] == [example.answer for example in LONG[:3]]
    assert sample_value(server.metrics(), "vllm:fastkv_requests_compressed_total") == 3
    assert "No space left on device" in server.log.read_text()


def test_a_client_that_never_reads_holds_nobody_up(server: Server) -> None:
    """Its answer is made to the end and its blocks go back, while it still has not read a byte."""
    num_tokens = 400
    body = {
        "model": MODEL,
        "prompt": LONG[0].prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
    }
    before, text = generated(server), json.dumps(body).encode()
    address = urlsplit(server.base_url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        wait_until(lambda: generated(server) > before, "it is being answered")
        assert answer(server, LONG[1]) == LONG[1].answer
        wait_until(lambda: generated(server) >= before + num_tokens and is_idle(server), "all is made, none is held")
    assert answer(server, LONG[2]) == LONG[2].answer


def test_sigterm_under_load_answers_what_is_under_way(server: Server) -> None:
    streams = [Stream(server, example, max_tokens=1500) for example in LONG[:3]]
    wait_until(lambda: all(stream.begun for stream in streams), "all are being answered")
    processes = processes_of(server)
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(1)
    assert any(stream.is_alive() for stream in streams), "nothing is left to drain"
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        answer(server, LONG[3])
    for stream in streams:
        stream.join(PATIENCE_S)
        assert (stream.num_tokens, stream.end) == (1500, "length")
    assert exit_status(processes) == 0


@pytest.mark.slow
def test_both_replicas_compress(replicas: Server) -> None:
    with ThreadPoolExecutor(len(LONG)) as pool:
        answers = list(pool.map(lambda example: answer(replicas, example), LONG))
    assert answers == [example.answer for example in LONG]
    samples = replicas.metrics()
    compressed = [
        sample_value(samples, "vllm:fastkv_requests_compressed_total", engine=engine, method="fastkv")
        for engine in ("0", "1")
    ]
    assert min(compressed) > 0 and sum(compressed) == len(LONG)


@pytest.mark.slow
def test_a_dead_replica_ends_the_server(replicas: Server) -> None:
    """No request is answered as if it were whole, and whoever looks after the server sees that it failed."""
    streams = answering(replicas, 4)
    assert status_after_death(replicas, "EngineCore", streams) not in (0, None)


@pytest.mark.slow
def test_a_dead_engine_ends_the_server(single: Server) -> None:
    """With status 0, which is vLLM's: docs say so to whoever looks after the server."""
    streams = answering(single, 2)
    assert status_after_death(single, "EngineCore", streams) == 0


@pytest.mark.slow
def test_a_dead_worker_ends_the_server(ranks: Server) -> None:
    """With status 0, which is vLLM's: docs say so to whoever looks after the server."""
    assert answer(ranks, LONG[2]) == LONG[2].answer
    streams = answering(ranks, 2)
    assert sample_value(ranks.metrics(), "vllm:fastkv_requests_compressed_total") == 3
    assert status_after_death(ranks, "Worker", streams) == 0


def answering(server: Server, num: int) -> list[Stream]:
    streams = [Stream(server, example, max_tokens=3000) for example in LONG[:num]]
    wait_until(lambda: all(stream.begun for stream in streams), "all are being answered")
    return streams


def status_after_death(server: Server, name: str, streams: list[Stream]) -> int:
    """The server's exit status once its last process of this name was killed; no stream ends as if it were whole."""
    processes = processes_of(server)
    [process for process in processes if name in " ".join(process.cmdline())][-1].kill()
    for stream in streams:
        stream.join(PATIENCE_S)
        assert stream.end == "abort" or isinstance(stream.end, openai.APIError), stream.end
    return exit_status(processes)
