"""The guard: as many pages as keep enough of the attention, found when all layers have run; the others go back."""

import pytest
from vllm import SamplingParams

from fastkv_vllm.adapter.step import orders_of
from tests.engine.oracle import clear, freed_blocks, make_prompts, plan_of, reference
from tests.engine.requests import ask, counts, expected_counts, filled
from tests.engine.settings import GUARDED, SMALL

(PROMPT,) = make_prompts([700], seed=3)


@pytest.fixture(scope="module")
def engine(start):
    """The server has no guard: requests bring their own."""
    return start("snapkv", SMALL, enable_prefix_caching=True, num_gpu_blocks_override=120)


def guarded(engine, settings, prompt=PROMPT, max_tokens=8):
    """The prompt without doubt about what stays, and its configuration."""
    config = filled("snapkv", SMALL | settings)
    return clear(engine.checkpoint, config, prompt, max_tokens), config


@pytest.mark.parametrize(
    ("floor", "ceiling", "triggers", "shortfalls"),
    [(0.2, 1.0, 0, 0), (0.6, 1.0, 1, 0), (0.999, 1.0, 1, 0), (0.6, 0.5, 1, 0), (0.8, 0.4, 1, 1), (0.6, 0.2, 1, 1)],
)
def test_the_fewest_pages_that_are_enough(engine, floor, ceiling, triggers, shortfalls):
    """None more where the budget's are; the whole prompt; none beyond the ceiling. Counted and told."""
    settings = {"min_attention_recall": floor, "max_retention_ratio": ceiling}
    prompt, config = guarded(engine, settings)
    plan, before = plan_of(config, len(prompt)), counts(engine.totals)
    with engine.watch():
        (output,) = ask(engine, [(prompt, "snapkv", SMALL | settings)], 8)
        first, second, *_ = engine.free_blocks
    expected = reference(engine.checkpoint, config, prompt, 8)
    kept = len(expected.kept[0][0])
    pages = kept // plan.block_size
    assert (pages > plan.planned_pages) == (triggers > 0 and plan.num_pages > plan.planned_pages)
    assert second - first == plan.num_pages - pages, "what the ceiling held and the guard did not need"
    found = counts(engine.totals) - before
    assert found == expected_counts(engine, [(prompt, config)], 8)
    assert found["snapkv", "guard_triggers"] == triggers and found["snapkv", "guard_shortfalls"] == shortfalls
    report = output.kv_transfer_params["fastkv"]
    assert report["prompt_tokens_kept"] == kept
    assert report["attention_recall"] == pytest.approx(expected.recalls[pages - plan.planned_pages], abs=1e-4)
    assert (report["attention_recall"] < floor) == (shortfalls > 0)


@pytest.mark.parametrize("step_tokens", [100, 2048])
def test_prompts_that_share_their_beginning(engine, step_tokens):
    """In chunks, from the prefix cache, and beside a request without a guard."""
    settings = SMALL | {"min_attention_recall": 0.6}
    prompts = [PROMPT[:600] + tail for tail in make_prompts([41, 77, 300], seed=step_tokens)]
    asked = [(guarded(engine, settings, prompt)[0], "snapkv", settings) for prompt in prompts]
    plain = clear(engine.checkpoint, engine.config, PROMPT[:640] + prompts[0][640:] * 3, 8)
    with engine.step_tokens(step_tokens):
        for _ in range(2):
            outputs = ask(engine, [*asked, (plain, "snapkv", SMALL)], 8)
    assert min(output.num_cached_tokens for output in outputs) >= 576
    assert "attention_recall" not in outputs[-1].kv_transfer_params["fastkv"]


def test_preempted_before_the_worker_has_told(engine, monkeypatch):
    """Its blocks went back as a whole; the prompt ends once more, and gives back what it does not need then."""
    settings = SMALL | {"min_attention_recall": 0.6}
    prompts = [guarded(engine, settings, prompt)[0] for prompt in (PROMPT, *make_prompts([450], seed=5))]
    found, settle, seen = [], engine.manager.settle, set()

    def watched(request_id, destination, surplus):
        found.append((surplus, settle(request_id, destination, surplus)))
        return found[-1][1]

    def preempt(output):
        new = orders_of(output).plan.destinations.keys() - seen
        seen.update(new)
        if new:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    monkeypatch.setattr(engine.manager, "settle", watched)
    with engine.watch(after=preempt):
        ask(engine, [(prompt, "snapkv", settings) for prompt in prompts], 8)
    assert any(p.compressed for p in engine.preemptions)
    assert any(surplus > back == 0 for surplus, back in found), "no report came too late"
    assert any(surplus == back > 0 for surplus, back in found), "no report counted"


@pytest.mark.parametrize("name", ["fastkv-guarded", "h2o-guarded"])
def test_servers_of_guarded_methods(start, name):
    """Contexts are guarded by their own last queries; whatever follows them stays or is evicted as ever."""
    engine = start(*GUARDED[name])
    prompts = make_prompts([700, 1001, 90], seed=7)
    before = engine.totals.blocks_freed
    with engine.step_tokens(300):
        engine.check(prompts, max_tokens=40, contexts=[650, None, None])
    lengths = [(650, prompts[0]), (1001, prompts[1])]
    prompts = [clear(engine.checkpoint, engine.config, prompt, 40, n) for n, prompt in lengths]
    freed = [
        freed_blocks(plan_of(engine.config, n), reference(engine.checkpoint, engine.config, prompt, 40, n))
        for (n, _), prompt in zip(lengths, prompts, strict=True)
    ]
    assert engine.totals.blocks_freed - before == sum(freed) > 0


def test_a_request_lowers_the_servers_floor_or_goes_without(start):
    choice = start(*GUARDED["h2o-guarded"]).scheduler._choice

    def chosen(**settings):
        config = choice.of(SamplingParams(extra_args={"kv_compression_config": settings}))
        return config.min_attention_recall, config.max_retention_ratio

    assert chosen(min_attention_recall=0.3) == (0.3, 0.7) and chosen(max_retention_ratio=0.9) == (0.45, 0.9)
    assert chosen(min_attention_recall=None) == (None, None)
