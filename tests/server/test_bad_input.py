"""Requests that ask for nonsense: each is answered or refused in a sentence, and nobody else notices."""

import json
import math
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NOT_SET

from benchmarks.server import sample_value
from benchmarks.tiny_model.language import make_example
from fastkv_vllm.adapter.choice import FLAT, METHOD, SETTINGS
from fastkv_vllm.adapter.request import CONTEXT_TOKENS
from fastkv_vllm.methods import method_names
from tests.server.conftest import MODEL

LONG = make_example("niah", 1024, 0)
NUM_REQUESTS = 120
NUM_THAT_GENERATE, NUM_OTHERS = 20, 5  # requests of each operation of the document
TIMEOUT_S = 60

NUMBERS = st.sampled_from([0, 1, -1, 7, 64, 255, 2000, 2**31, 10**400, 0.3, 1e-300, 1e300, math.nan, math.inf])
WORDS = st.sampled_from(
    ["", "none", "uniform", "pyramid", "density", "adaptive", "avg", "/etc/passwd", "\ud800", "[" * 10**5]
)
SCALARS = NUMBERS | WORDS | st.booleans() | st.none() | st.integers() | st.text(max_size=6)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=4
)
SETTING_SETS = st.dictionaries(st.sampled_from(sorted(FLAT)), NUMBERS | WORDS | ANY_JSON, max_size=3)
XARGS = st.fixed_dictionaries(
    {},
    optional={
        METHOD: st.sampled_from([*method_names(), "none"]) | ANY_JSON,
        SETTINGS: SETTING_SETS.map(json.dumps) | ANY_JSON,
        CONTEXT_TOKENS: st.integers(1, 1024) | ANY_JSON,
    },
)
BODIES = st.fixed_dictionaries(
    {"vllm_xargs": st.builds(lambda own, flat: own | flat, XARGS, SETTING_SETS) | ANY_JSON},
    optional={
        "kv_transfer_params": ANY_JSON,
        "n": st.sampled_from([1, 2, -1, "x"]),
        "prompt_logprobs": NUMBERS,
        "stream": st.booleans(),
    },
)


# What the owner of a server asks for, not a client; and what vLLM has for other models only, to which it says 501.
LEFT_OUT = ("/scale_elastic_ep", "/v1/systemone")
MESSAGES = [{"role": "user", "content": LONG.prompt}]
# What makes sense where the document knows a type only, so that a request is not refused for its text alone.
TEXTS = {
    "/v1/completions": {"prompt": LONG.prompt},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/responses": {"input": LONG.prompt},
    "/v1/messages": {"messages": MESSAGES},
}
# Field that says how much is generated -> most that is let through: what is more is only slower.
LENGTHS = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "min_tokens": 8, "n": 3}


@st.composite
def cases_of(draw, operation):
    """Requests that the document describes, requests that are nearly such, and ours among their fields."""
    modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
    case = draw(operation.as_strategy(generation_mode=draw(st.sampled_from(modes))))
    body = case.body
    if isinstance(body, dict):
        if operation.path in TEXTS and draw(st.booleans()):
            body = draw(st.sampled_from([body, {}])) | TEXTS[operation.path] | {"model": MODEL}
        if draw(st.booleans()):
            body = body | {"vllm_xargs": draw(st.builds(lambda own, flat: own | flat, XARGS, SETTING_SETS))}
        for name, most in LENGTHS.items():
            if type(body.get(name)) in (int, float):
                body = body | {name: min(body[name], most)}
        body = body | {name: 4 for name in ("max_tokens", "max_output_tokens") if body.get(name) is None}
    return case.method, case.formatted_path, case.query, body


def status_and_complaint(server, case):
    """Of an answer; what comes in a stream after its status counts as a complaint, too."""
    method, path, query, body = case
    data = None if body is NOT_SET else body if isinstance(body, bytes) else json.dumps(body)
    headers = {} if data is None else {"Content-Type": "application/json"}
    url = server.base_url + path
    reply = requests.request(method, url, params=query, data=data, headers=headers, timeout=TIMEOUT_S)
    if not reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        return reply.status_code, reply.text if reply.status_code >= 500 else None
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return reply.status_code, next((event for event in events if json.loads(event).get("error")), None)


def is_healthy(server):
    try:
        return requests.get(f"{server.base_url}/health", timeout=TIMEOUT_S).status_code == 200
    except requests.ConnectionError:
        return False


def post(server, path, body):
    """Status and body of an answer; of a stream the list of its events."""
    request = urllib.request.Request(
        f"{server.base_url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if not response.headers["Content-Type"].startswith("text/event-stream"):
                return response.status, json.load(response)
            events = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line]
            assert events[-1] == b"[DONE]", events[-1]
            return response.status, [json.loads(event) for event in events[:-1]]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def answer(server):
    body = {"model": MODEL, "prompt": LONG.prompt, "max_tokens": 8, "temperature": 0}
    status, reply = post(server, "/v1/completions", body)
    return status, reply["choices"][0]["text"], reply["kv_transfer_params"]


def test_nonsense_is_refused_and_changes_nothing(compressing_server):
    before = answer(compressing_server)
    seen = set()

    @settings(max_examples=NUM_REQUESTS, deadline=None, derandomize=True, database=None)
    @given(st.booleans(), BODIES)
    def ask(chat, body):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        text = {"messages": [{"role": "user", "content": LONG.prompt}]} if chat else {"prompt": LONG.prompt}
        status, reply = post(compressing_server, path, {"model": MODEL, "max_tokens": 2, **text, **body})
        seen.add(status)
        assert status == 200 or 400 <= status < 500, (status, reply)
        if status != 200:
            assert reply["error"]["message"].strip(), reply
        elif isinstance(reply, list):
            assert not any("error" in event for event in reply), reply

    ask()
    assert {200, 400} <= seen
    assert answer(compressing_server) == before
    assert_idle(compressing_server)


def test_no_request_of_the_api_breaks_it(compressing_server, request: pytest.FixtureRequest):
    """Drawn from the server's own OpenAPI document. What fails has to fail without compression in the same way."""
    schema = schemathesis.openapi.from_url(f"{compressing_server.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert TEXTS.keys() < {operation.path for operation in operations}
    before, seen, over = answer(compressing_server), set(), threading.Event()

    def neighbour():
        said = []
        while not over.wait(1):
            said.append(answer(compressing_server))
        return said

    def check(case):
        status, complaint = status_and_complaint(compressing_server, case)
        seen.add((case[1], status))
        if complaint:
            assert is_healthy(compressing_server), f"{case} ended it\n{compressing_server.log_tail()}"
            plain = status_and_complaint(request.getfixturevalue("plain_server"), case)
            assert plain[0] == status and plain[1], f"{case} {complaint}"

    with ThreadPoolExecutor() as pool:
        said = pool.submit(neighbour)
        try:
            for path, text in TEXTS.items():  # what is drawn hangs on the modules that are loaded, too
                check(("POST", path, {}, text | {"model": MODEL, "max_tokens": 4}))
            for operation in operations:
                if operation.path not in LEFT_OUT:
                    drawn(operation)(given(cases_of(operation))(check))()
        finally:
            over.set()
    assert said.result() and all(one == before for one in said.result()), "others are answered as ever"
    assert {(path, 200) for path in TEXTS} <= seen
    assert answer(compressing_server) == before
    assert_idle(compressing_server)


def drawn(operation):
    """Requests of an operation, none made smaller where one fails."""
    return settings(
        max_examples=NUM_THAT_GENERATE if operation.path in TEXTS else NUM_OTHERS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def assert_idle(server):
    samples = server.metrics()
    for name in ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert sample_value(samples, name) == 0, name


def test_a_stream_is_refused_before_it_begins(compressing_server):
    """Not with status 200 and an error among its events."""
    body = {"model": MODEL, "prompt": LONG.prompt, "max_tokens": 2, "stream": True}
    status, events = post(compressing_server, "/v1/completions", body | {"vllm_xargs": {METHOD: "snapkv"}})
    assert status == 200
    assert len(events) == 2
    status, reply = post(compressing_server, "/v1/completions", body | {"vllm_xargs": {METHOD: "best"}})
    assert status == 400
    assert "best" in reply["error"]["message"]


def test_a_seed_does_not_end_it(compressing_server):
    """Of a request whose prompt takes several steps: vLLM's own server ends where it runs on CPUs."""
    body = {"model": MODEL, "prompt": LONG.prompt, "max_tokens": 8, "temperature": 1, "seed": 7}
    (status, first), (_, second) = (post(compressing_server, "/v1/completions", body) for _ in range(2))
    assert status == 200
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert is_healthy(compressing_server)
