"""Budgets that differ by layer and KV head: the tokens of the reference, the pages promised, none lost."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkv_vllm.methods import CUT_BUDGETS
from tests.engine.oracle import BLOCK_SIZE, clear, make_prompts, plan_of, reference
from tests.engine.settings import MIXED, RAGGED


@pytest.fixture(scope="module")
def uneven(checkpoints, tmp_path_factory):
    """A checkpoint one of whose two KV heads, by turns, attends to little: its scores are few and high."""
    directory = shutil.copytree(checkpoints("llama"), tmp_path_factory.mktemp("uneven") / "llama")
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("k_proj.weight"):
            head = int(name.split(".")[2]) % 2
            weight[head * 32 : (head + 1) * 32] *= 2
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(params=RAGGED, scope="module")
def engine(request, start, uneven):
    return start(*RAGGED[request.param], checkpoint=uneven)


@pytest.mark.parametrize("step_tokens", [61, 2048])
def test_mixed_requests(engine, step_tokens):
    """Prompts left alone, prefill and decode in the same steps as reads head by head."""
    with engine.step_tokens(step_tokens), engine.watch():
        engine.check(MIXED)


@pytest.mark.parametrize("num_tokens", [700, 704, 1001])  # a tail longer than the window, none, one inside it
def test_pages_are_the_references(engine, num_tokens):
    """Each layer and head holds what the reference keeps; all together the blocks of the plan."""
    (prompt,) = make_prompts([num_tokens], seed=num_tokens)
    prompt = clear(engine.checkpoint, engine.config, prompt, 4)
    held = []

    def look(output):
        held.extend(pages for rid, pages in engine.compressor.held.items() if rid in output.num_scheduled_tokens)

    with engine.watch(after=look), engine.watch_kept() as watched:
        engine.check([prompt], max_tokens=4)
    plan = plan_of(engine.config, num_tokens)
    expected = reference(engine.checkpoint, engine.config, prompt, 4)
    assert watched == [[head.tolist() for head in layer] for layer in expected.kept], "the very entries"
    counts = torch.tensor([[len(head) for head in layer] for layer in expected.kept])
    assert torch.equal(held[-1].counts * BLOCK_SIZE + plan.num_tail, counts)
    planned, taken = plan.num_pages * counts.numel(), int(held[-1].counts.sum())
    assert taken <= planned, "no more pages than the blocks that stay"
    if engine.config.halting_loss is None and engine.config.layer_budgets not in CUT_BUDGETS:
        assert taken == planned
    assert len(set(counts.flatten().tolist())) > 1, "the test needs uneven budgets"
    taken = held[-1].pages[torch.arange(held[-1].pages.shape[2]) < held[-1].counts.unsqueeze(-1)]
    assert len(set(taken.tolist())) == len(taken), "a page is held twice"


def test_the_window_lies_in_two_chunks(engine):
    prompt = MIXED[1]
    with engine.step_tokens(next(n for n in range(90, 700) if len(prompt) % n == 3)):
        engine.check([prompt], max_tokens=4)


def test_question_behind_a_compressed_context(engine):
    """Several queries a sequence read head by head."""
    prompts = [MIXED[0], MIXED[3]]
    engine.check(prompts, max_tokens=8, contexts=[1000, 1277])


def test_a_crowd_in_a_small_pool(start, uneven):
    """vLLM preempts by itself: compressed requests outgrow the pool, are compressed again and answer alike."""
    limits = {"num_gpu_blocks_override": 21, "max_model_len": 640, "max_num_seqs": 9}
    engine = start(*RAGGED["pyramidkv-adaptive"], checkpoint=uneven, **limits)
    with engine.step_tokens(100), engine.watch():
        engine.check(make_prompts([250] * 6, seed=7), max_tokens=120)
    assert any(p.compressed for p in engine.preemptions), "none was preempted after its compaction"


@pytest.mark.parametrize("name", ["adakv", "pyramidkv", "dbudgetkv"])
def test_prefix_caching(start, name):
    """Fresh blocks take the pages; a block may be source of one request and destination of another in one step."""
    engine = start(*RAGGED[name], enable_prefix_caching=True, num_gpu_blocks_override=120)
    first = make_prompts([900], seed=9)[0]
    prompts = [first, first[:800] + make_prompts([77], seed=10)[0], *make_prompts([640], seed=11)]
    for _ in range(2):
        outputs = engine.check(prompts, max_tokens=40)
    assert max(output.num_cached_tokens for output in outputs) > 0, "nothing came from the prefix cache"
