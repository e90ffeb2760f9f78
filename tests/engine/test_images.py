"""Prompts with images: vision-language models are compressed as exactly as others."""

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from fastkv_vllm.adapter.request import tokens_after_image
from tests.engine.oracle import blocks_filled, make_prompts
from tests.engine.settings import EVICTING, SMALL, TSP
from tests.reference.images import IMAGE_FAMILY, picture

TEXT = make_prompts([300, 120, 50, 200, 30, 90, 500, 400, 3], seed=5)
MIDDLE = TEXT[0] + picture(0) + TEXT[1]
TWO = TEXT[2] + picture(1) + TEXT[3] + picture(2) + TEXT[4]
FIRST = picture(2) + TEXT[7]
NEAR_THE_END = TEXT[7] + picture(1) + TEXT[8]
NONE, SHORT = TEXT[6], TEXT[5]
ENGINES = {"vl_cache": SMALL, "fastkv": TSP}


@pytest.fixture(params=ENGINES, scope="module")
def engine(request, start, checkpoints):
    return start(request.param, ENGINES[request.param], checkpoint=checkpoints(IMAGE_FAMILY), skip_tokenizer_init=False)


def test_prompts_one_by_one_in_one_chunk(engine):
    for prompt in (MIDDLE, NEAR_THE_END):
        engine.check([prompt], max_tokens=16)


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Images cut by the ends of chunks, text only, prompts left alone, prefill and decode in the same steps."""
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check([MIDDLE, TWO, NONE, SHORT, FIRST, NEAR_THE_END], max_tokens=24)
        assert len(engine.free_blocks) >= 2000 / step_tokens, "prompts were not cut into chunks"


def test_preempted_before_and_after_compaction(engine):
    def preempt(number):
        if number in (3, 11, 20):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(100), engine.watch(before=preempt):
        engine.check([TWO, MIDDLE, NONE], max_tokens=24)
    assert {p.compressed for p in engine.preemptions} == {True, False}


def test_prefix_caching(start, checkpoints):
    """Images are part of a block's hash: the same text with another image is another prompt."""
    arguments = {"checkpoint": checkpoints(IMAGE_FAMILY), "skip_tokenizer_init": False, "enable_prefix_caching": True}
    engine = start("vl_cache", SMALL, **arguments)
    other = TEXT[0] + picture(1) + TEXT[1]
    for _ in range(2):
        outputs = engine.check([MIDDLE, other, NEAR_THE_END], max_tokens=16)
    assert min(output.num_cached_tokens for output in outputs) > 300


def test_evicted_while_decoding(start, checkpoints):
    """Tokens after the image vote on the prompt, up to a block of the last ones later; nothing of a block is left."""
    engine = start("vl_cache", SMALL | EVICTING, checkpoint=checkpoints(IMAGE_FAMILY), skip_tokenizer_init=False)
    prompts, before = [MIDDLE, NEAR_THE_END, NONE, SHORT], engine.totals.decode_blocks_freed

    def preempt(number):
        if number == 50:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    with engine.step_tokens(61), engine.watch():
        engine.check(prompts, max_tokens=70)
    filled = [blocks_filled(len(prompt), len(prompt) + 70) for prompt in prompts[:3]]
    assert engine.totals.decode_blocks_freed - before == sum(filled) >= 6
    with engine.watch(before=preempt):
        engine.check(prompts[:2], max_tokens=70)
    assert [p.compressed for p in engine.preemptions] == [True, True]


def test_tokens_after_the_last_image():
    """Marks around an image, and those inside it, are text unless it goes on behind them."""
    marks = torch.tensor([False, True, True, False, True, False])
    images = [PlaceholderRange(offset=100, length=30), PlaceholderRange(offset=40, length=6, is_embed=marks)]
    features = [MultiModalFeatureSpec(None, "image", str(i), position) for i, position in enumerate(images)]
    assert [tokens_after_image(features, n) for n in (1000, 131, 130, 120, 100, 60, 45, 44, 41, 40)] == [
        *(870, 1, 0, 0, 55, 15, 0, 1, 0, 0)
    ]
    assert tokens_after_image([], 1000) == 0


def test_question_behind_a_compressed_context(engine):
    engine.check([MIDDLE, TWO], max_tokens=8, contexts=[480, 330])
