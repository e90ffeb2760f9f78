"""`vllm serve --kv-compression fastkv` as a client sees it: answers, figures, log."""

import json
from dataclasses import replace

import openai
import pytest
import requests

from benchmarks.server import sample_value, serve
from benchmarks.soak import draw, soak
from benchmarks.tiny_model.language import make_example
from fastkv_vllm.adapter.metrics import BLOCK_TOKENS, COUNTERS, CUTS, LEFT_ALONE, POOL_TOKENS, STASH_BYTES
from fastkv_vllm.config import CompressionConfig
from tests.deploy.conftest import metrics_of, queries
from tests.server.conftest import CHECKPOINT, ENVIRONMENT, FLAGS, MODEL, SETTINGS, client_of

LONG = [make_example("niah", 1024, seed) for seed in range(4)]
SHORT = make_example("niah", 300, 0)
BLOCK_SIZE = 32
MESSAGES = [{"role": "user", "content": LONG[0].prompt}]
CHATS = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/responses": {"input": LONG[0].prompt, "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}


def complete(server, example, **arguments):
    return client_of(server).completions.create(
        model=MODEL, prompt=example.prompt, max_tokens=8, temperature=0, **arguments
    )


def stream(server, example):
    chunks = complete(server, example, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_a_compressing_server_answers_and_counts(compressing_server):
    """Right answers from a tenth of the cache, and figures that match the requests sent."""
    before = compressing_server.metrics()
    answers = [complete(compressing_server, example).choices[0].text.strip() for example in LONG[:2]]
    answers += [stream(compressing_server, example).strip() for example in LONG[2:]]
    assert answers == [example.answer for example in LONG]
    assert complete(compressing_server, SHORT).choices[0].text.strip() == SHORT.answer

    after = compressing_server.metrics()
    labels = {"model_name": MODEL, "engine": "0"}
    grown = {
        name: sample_value(after, f"{name}_total", **labels) - sample_value(before, f"{name}_total", **labels)
        for name in COUNTERS
    }
    plan = CompressionConfig(method="fastkv", **SETTINGS).plan(1024, BLOCK_SIZE)
    num = len(LONG)
    assert grown["vllm:fastkv_requests_compressed"] == num
    assert grown["vllm:fastkv_prompt_tokens_seen"] == num * 1024
    assert grown["vllm:fastkv_prompt_tokens_kept"] == num * plan.num_kept
    assert grown["vllm:fastkv_blocks_freed"] == num * plan.num_freed_blocks
    assert grown["vllm:fastkv_tsp_rows_in"] == num * 1024
    assert grown["vllm:fastkv_tsp_rows_out"] == num * plan.cuts[-1][1]
    assert min(grown[f"vllm:fastkv_{act}_seconds"] for act in ("score", "select", "compact")) > 0
    short, left_alone = {"reason": "short", **labels}, f"{LEFT_ALONE}_total"
    assert sample_value(after, left_alone, **short) - sample_value(before, left_alone, **short) == 1
    cut = {"layer": str(plan.cuts[0][0]), **labels}
    assert sample_value(after, f"{CUTS}_total", **cut) - sample_value(before, f"{CUTS}_total", **cut) == num
    assert sample_value(after, STASH_BYTES, **labels) == 0


def test_the_metrics_are_there_with_their_labels(compressing_server):
    samples, labels = compressing_server.metrics(), {"model_name": MODEL, "engine": "0"}
    for name in (STASH_BYTES, POOL_TOKENS, BLOCK_TOKENS):
        assert [sample.labels for sample in samples[name]] == [labels], name
    (cache,) = (sample.labels for sample in samples["vllm:cache_config_info"])
    assert sample_value(samples, BLOCK_TOKENS) == BLOCK_SIZE
    assert sample_value(samples, POOL_TOKENS) == int(cache["num_gpu_blocks"]) * BLOCK_SIZE > 0
    for name, (own, _) in COUNTERS.items():
        found = [sample.labels for sample in samples.get(f"{name}_total", ())]
        assert all(set(names) == {*labels, *own} for names in found), name
        for first in ("short", "requested") if own == ("reason",) else () if own == ("layer",) else ("fastkv",):
            assert labels | dict.fromkeys(own, first) in found, f"{name} is not there before its first event"


@pytest.mark.parametrize("place", queries())
def test_what_dashboard_and_alerts_ask_for_is_there(compressing_server, place):
    samples = compressing_server.metrics()
    assert metrics_of(queries()[place]) <= set(samples), place


def test_the_log_has_the_start_up_table(compressing_server):
    log = compressing_server.log.read_text()
    assert "FastKV compression is on for" in log
    for name, value in {
        "method": "fastkv",
        "retention_ratio": "0.1",
        "tsp": "on after layer 5",
        "prefix_caching": "off",
        "scheduler": "CompressionScheduler",
    }.items():
        assert any(line.split()[-len(value.split()) - 1 :] == [name, *value.split()] for line in log.splitlines()), name


def test_prompt_logprobs_are_an_error_of_that_request(compressing_server):
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs cannot be had"):
        complete(compressing_server, SHORT, extra_body={"prompt_logprobs": 1})
    assert complete(compressing_server, SHORT).choices[0].text.strip() == SHORT.answer


def test_a_context_is_compressed_before_its_question(compressing_server):
    """What the question asks for was not asked when the choice was made: the answer is lost, which proves it."""
    num_context = len(LONG[0].prompt_ids) - len(LONG[0].prompt.split("? ")[1].split()) - 1
    before = sample_value(compressing_server.metrics(), "vllm:fastkv_prompt_tokens_seen_total")
    reply = complete(compressing_server, LONG[0], extra_body={"vllm_xargs": {"kv_context_tokens": num_context}})
    assert reply.choices[0].text.strip() != LONG[0].answer
    assert sample_value(compressing_server.metrics(), "vllm:fastkv_prompt_tokens_seen_total") - before == num_context


def test_a_bad_context_is_an_error_of_that_request(compressing_server):
    with pytest.raises(openai.BadRequestError, match=r"kv_context_tokens must be an integer in 1\.\."):
        complete(compressing_server, LONG[0], extra_body={"vllm_xargs": {"kv_context_tokens": 100_000}})
    assert complete(compressing_server, SHORT).choices[0].text.strip() == SHORT.answer


def test_a_request_chooses_its_method(compressing_server):
    """Another method and settings, none at all, and one that does not exist; the counters tell which was done."""

    def ask(**extra):
        before = compressing_server.metrics()
        text = complete(compressing_server, LONG[0], extra_body={"vllm_xargs": extra}).choices[0].text.strip()
        after = compressing_server.metrics()
        figures = [("vllm:fastkv_prompt_tokens_kept_total", {"method": method}) for method in ("snapkv", "fastkv")]
        figures.append(("vllm:fastkv_tsp_rows_out_total", {}))
        return text, *(sample_value(after, name, **own) - sample_value(before, name, **own) for name, own in figures)

    settings = json.dumps({"budget": 500})
    text, kept, *others = ask(kv_compression="snapkv", kv_compression_config=settings)
    assert text == LONG[0].answer and abs(kept - 500) < 32 and others == [0, 0]
    text, *figures = ask(kv_compression="none")
    assert text == LONG[0].answer and figures == [0, 0, 0]
    with pytest.raises(openai.BadRequestError, match="unknown compression method 'h3o'; known: "):
        ask(kv_compression="h3o")


def ask(server, path, stream, **choice):
    body = CHATS[path] | {"model": MODEL, "stream": stream, "temperature": 0, "vllm_xargs": choice}
    if stream and path == "/v1/chat/completions":
        body["stream_options"] = {"include_usage": True}
    return requests.post(server.base_url + path, json=body, timeout=120)


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_api_takes_a_choice(compressing_server, path, stream):
    def counted():
        samples = compressing_server.metrics()
        names = ("requests_compressed", "prompt_tokens_seen", "prompt_tokens_kept")
        return [sample_value(samples, f"vllm:fastkv_{name}_total", method="snapkv") for name in names]

    before = counted()
    reply = ask(compressing_server, path, stream, kv_compression="snapkv", retention_ratio=0.3)
    assert reply.status_code == 200 and (stream or LONG[0].answer in reply.text), reply.text
    num, seen, kept = (after - ago for ago, after in zip(before, counted(), strict=True))
    plan = CompressionConfig(method="snapkv", retention_ratio=0.3).plan(int(seen), BLOCK_SIZE)
    assert num == 1 and 1000 < seen <= 1024 and kept == plan.num_kept
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    said = [event.get("response", event) for event in map(json.loads, events if stream else [reply.text])]
    report = {"method": "snapkv", "prompt_tokens_seen": seen, "prompt_tokens_kept": kept}
    assert [done for part in said if (done := part.get("kv_transfer_params"))] == [{"fastkv": report}]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_api_refuses_what_cannot_be_had(compressing_server, path, stream):
    refused = ask(compressing_server, path, stream, kv_compression="snapkv", retention_ratio=3)
    assert refused.status_code == 400 and "retention_ratio" in refused.text, refused.text
    assert refused.headers["Content-Type"].startswith("application/json")


def test_an_answer_says_what_was_done(compressing_server):
    """A setting by name reaches the engine."""
    plan = CompressionConfig(method="snapkv", retention_ratio=0.3).plan(1024, BLOCK_SIZE)
    body = {"vllm_xargs": {"kv_compression": "snapkv", "retention_ratio": 0.3}}
    reply = complete(compressing_server, LONG[0], extra_body=body)
    report = {"method": "snapkv", "prompt_tokens_seen": 1024, "prompt_tokens_kept": plan.num_kept}
    assert reply.kv_transfer_params == {"fastkv": report}
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = complete(compressing_server, LONG[0], extra_body=body, **with_usage)
    assert last.kv_transfer_params == {"fastkv": report} and last.usage.prompt_tokens == 1024
    assert "".join(chunk.choices[0].text for chunk in chunks).strip() == LONG[0].answer
    assert complete(compressing_server, SHORT).kv_transfer_params == {
        "fastkv": {"method": "none", "left_alone": "short"}
    }


def test_a_request_is_guarded(compressing_server):
    """A page is too little for its floor: more stays, the answer says how much of the attention that is."""
    labels = {"method": "snapkv", "model_name": MODEL, "engine": "0"}

    def count(name):
        return sample_value(compressing_server.metrics(), f"vllm:fastkv_guard_{name}_total", **labels)

    settings = {"kv_compression": "snapkv", "retention_ratio": 0.01, "min_attention_recall": 0.99}
    before = count("triggers"), count("shortfalls")
    reply = complete(compressing_server, LONG[0], extra_body={"vllm_xargs": settings})
    assert reply.choices[0].text.strip() == LONG[0].answer
    report = reply.kv_transfer_params["fastkv"]
    assert report["attention_recall"] >= 0.99 and 2 * BLOCK_SIZE < report["prompt_tokens_kept"] <= 1024
    assert (count("triggers"), count("shortfalls")) == (before[0] + 1, before[1])


def test_a_client_that_goes_away_leaves_nothing(compressing_server):
    chunks = client_of(compressing_server).completions.create(
        model=MODEL, prompt=LONG[0].prompt, max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(chunks))
    chunks.close()
    assert complete(compressing_server, LONG[1]).choices[0].text.strip() == LONG[1].answer
    samples = compressing_server.metrics()
    assert sample_value(samples, "vllm:kv_cache_usage_perc") == 0
    assert sample_value(samples, "vllm:num_requests_running") == 0


def test_a_soak_in_small():
    """In float32: rounded to bfloat16, votes that nearly tie hang on what else is in the batch."""
    asks = [replace(draw(0, number, "fastkv"), max_tokens=8) for number in range(24)]
    flags = (*FLAGS, "--dtype", "float32")
    with serve(CHECKPOINT, method="fastkv", config=SETTINGS, extra=flags, env=ENVIRONMENT) as server:
        said = soak(replace(server, model=MODEL), asks, num_again=6, tolerance=0.02)
    assert said["wrong"] == []
    assert said["acts"]["read to the end"] + said["acts"]["left"] == len(asks)
    assert said["acts"]["sent again"] >= 6
    assert sum(count for name, count in said["metrics"].items() if name.startswith("compressed")) > 0


def test_a_plain_server_has_none_of_it(plain_server):
    assert complete(plain_server, LONG[0]).choices[0].text.strip() == LONG[0].answer
    assert not [name for name in plain_server.metrics() if "fastkv" in name]
    assert "FastKV compression is on" not in plain_server.log.read_text()
