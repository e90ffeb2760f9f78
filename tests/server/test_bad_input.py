"""Requests that ask for nonsense: each is answered or refused in a sentence, and nobody else notices."""

import json
import math
import urllib.error
import urllib.request

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.server import sample_value
from benchmarks.tiny_model.language import make_example
from fastkv_vllm.adapter.choice import FLAT, METHOD, SETTINGS
from fastkv_vllm.adapter.request import CONTEXT_TOKENS
from fastkv_vllm.methods import method_names
from tests.server.conftest import MODEL

LONG = make_example("niah", 1024, 0)
NUM_REQUESTS = 120
TIMEOUT_S = 30

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
    samples = compressing_server.metrics()
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
