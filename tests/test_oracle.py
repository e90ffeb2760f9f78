"""The comparison with kvpress: its arithmetic, what it must not miss, and (marked judge) the comparison itself."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.judges
import benchmarks.oracle
from benchmarks.judges import JudgeMissing, judge_python, run_judge
from benchmarks.oracle import compare
from benchmarks.oracle.differences import (
    DIFFERENCES,
    KVPRESS_VOTING,
    NUM_LAYERS,
    aligned,
    aligned_duo,
    compression_ratio,
)
from benchmarks.oracle.overlap import TIE, Agreement, add_prompt, overlap, score_gap

NUM_HEADS = 2
PAIR = aligned("snapkv", 0.1, 1024)


def has_kvpress():
    try:
        return bool(judge_python("kvpress"))
    except JudgeMissing:
        return False


needs_kvpress = pytest.mark.skipif(not has_kvpress(), reason="no .venv-kvpress: scripts/judge_env.sh kvpress makes it")


def answer(pair, tokens=(7, 3)):
    """Both sides' answer to one prompt: the first entries stay, entry n is rated -n."""
    kept = [[list(range(pair.kept_by_us)) for _ in range(NUM_HEADS)] for _ in range(NUM_LAYERS)]
    rating = [[[-float(n) for n in range(pair.num_tokens)] for _ in range(NUM_HEADS)] for _ in range(NUM_LAYERS)]
    return {"kept": kept, "tokens": list(tokens), "scores": rating}


def test_overlap():
    assert overlap([1, 2, 3], [3, 2, 1]) == 1.0
    assert overlap([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert overlap([1, 2, 3, 4], [4]) == 0.25
    assert overlap([1], [2]) == 0.0


def test_score_gap():
    scores = [4.0, 2.0, 2.0, 1.0]
    assert score_gap(scores, [1], [2]) == 0.0
    assert score_gap(scores, [3], [0]) == 0.75
    assert score_gap(scores, [1, 3], [0, 2]) == 0.75, "the worst swap counts"
    assert score_gap(scores, [1, 3], [0]) is None, "counts differ: nothing was swapped"


def test_agreement_of_some_layers():
    agreement = Agreement()
    ours, theirs = [[[0, 1]], [[0, 1]], [[0, 2]]], [[[0, 1]], [[2, 3]], [[0, 1]]]
    scores = [[[4.0, 3.0, 2.0, 1.0]]] * 3
    add_prompt(agreement, 0, ours, theirs, scores, range(2))
    assert agreement.overlaps == [1.0, 0.0]
    assert (agreement.mean, agreement.minimum, agreement.share_identical) == (0.5, 0.0, 0.5)
    with pytest.raises(ValueError):
        add_prompt(agreement, 0, [[[0]]], [[[0], [0]]], scores, range(1))


def test_equal_sides_agree():
    outcome = compare.judge(PAIR, [answer(PAIR)] * 2, [answer(PAIR)] * 2)
    assert len(outcome.agreement.overlaps) == 2 * NUM_LAYERS * NUM_HEADS
    assert (outcome.agreement.mean, outcome.agreement.minimum) == (1.0, 1.0)
    assert (outcome.num_same, outcome.num_unexplained) == (2, 0)


def test_one_changed_entry_shows():
    ours = answer(PAIR)
    ours["kept"][5][1][17] = 700  # kvpress rates it below the entry it replaces
    outcome = compare.judge(PAIR, [answer(PAIR), ours], [answer(PAIR)] * 2)
    (found,) = outcome.agreement.disagreements
    assert (found.prompt, found.layer, found.head, found.only_ours, found.only_theirs) == (1, 5, 1, [700], [17])
    assert not found.is_tie
    assert outcome.num_unexplained == 1
    assert outcome.agreement.minimum == 1 - 1 / PAIR.kept_by_us


@pytest.mark.parametrize("gap, is_tie", [(0.0, True), (0.5 * TIE, True), (3 * TIE, False)])
def test_a_tie_is_no_disagreement(gap, is_tie):
    ours, theirs = answer(PAIR), answer(PAIR)
    ours["kept"][0][0][17] = 700
    theirs["scores"][0][0][17], theirs["scores"][0][0][700] = 1.0, 1.0 - gap
    outcome = compare.judge(PAIR, [ours], [theirs])
    assert outcome.agreement.num_ties == is_tie
    assert outcome.num_unexplained == (not is_tie)


def test_another_answer_shows():
    outcome = compare.judge(PAIR, [answer(PAIR, (7, 4, 3))], [answer(PAIR)])
    assert (outcome.num_same, outcome.num_unexplained) == (0, 1)


def test_early_layers_have_no_answers_to_compare():
    pair = aligned("fastkv", 0.1, 1024)
    ours = answer(pair, (9,))
    ours["kept"][NUM_LAYERS - 1] = [[0], [0]]  # after the TSP layer: not looked at
    outcome = compare.judge(pair, [ours], [answer(pair)])
    assert (outcome.num_same, outcome.num_unexplained) == (None, 0)
    assert len(outcome.agreement.overlaps) == len(pair.layers) * NUM_HEADS < NUM_LAYERS * NUM_HEADS


@pytest.mark.parametrize("side, name", [(0, "we"), (1, "kvpress")], ids=["ours", "theirs"])
def test_another_count_is_an_error(side, name):
    sides = [answer(PAIR), answer(PAIR)]
    sides[side]["kept"][3][0].pop()
    with pytest.raises(RuntimeError, match=rf"{name} should keep 128 entries and kept \[127, 128\]"):
        compare.judge(PAIR, [sides[0]], [sides[1]])


@pytest.mark.parametrize("num_tokens", [2, 97, 1024, 1030, 4096, 8191])
def test_compression_ratio_gives_the_count(num_tokens):
    for num_kept in range(1, num_tokens):
        assert int(num_tokens * (1 - compression_ratio(num_tokens, num_kept))) == num_kept
    for num_kept in (0, num_tokens):
        with pytest.raises(ValueError, match="num_kept must be in"):
            compression_ratio(num_tokens, num_kept)


@pytest.mark.parametrize("method", compare.METHODS)
def test_aligned_counts(method):
    for ratio, num_kept in ((0.1, 128), (0.2, 224), (0.5, 512)):
        pair = aligned(method, ratio, 1024)
        assert (pair.kept_by_us, pair.kept_by_them) == (num_kept, num_kept)


def test_aligned_refuses_what_kvpress_cannot_do():
    assert aligned("snapkv", 0.1, 1032).kept_by_us == aligned("streamingllm", 0.1, 1032).kept_by_us
    with pytest.raises(ValueError, match="at most 8 tokens over whole blocks"):
        aligned("snapkv", 0.1, 1033)
    assert aligned("snapkv", 0.1, 1055, **KVPRESS_VOTING).settings == KVPRESS_VOTING
    with pytest.raises(ValueError, match="leaves 500 tokens alone: short"):
        _ = aligned("streamingllm", 0.1, 500).kept_by_us


def test_half_of_the_heads_are_retrieval_heads():
    pair = aligned_duo(1024)
    assert (pair.kept_by_us, pair.kept_by_them, pair.compares_answers) == (672, 672, False)
    pages = [n for layer in pair.plan.streaming.pages for n in layer]
    assert sorted(pages) == [10] * 8 + [32] * 8
    with pytest.raises(ValueError, match="must be whole blocks; got 1056"):
        aligned_duo(1056)


@pytest.mark.parametrize("method", compare.METHODS)
def test_a_difference_left_in_is_only_that_one(method):
    pair = aligned(method, 0.2, 1024)
    changed = {
        difference.what: {name for name, value in vars(difference.left_in(pair)).items() if value != vars(pair)[name]}
        for difference in DIFFERENCES
        if method in difference.methods and difference.left_in is not None
    }
    everything = changed.pop("all of them, both sides as shipped")
    assert changed and all(len(names) == 1 for names in changed.values()), changed
    assert everything >= {"num_kept"}


def test_prompts_have_their_length_and_differ():
    prompts = compare.make_prompts(7, 640)
    assert {len(prompt) for prompt in prompts} == {640}
    assert len({tuple(prompt) for prompt in prompts}) == 7


def test_kvpress_child_needs_nothing_of_the_project():
    source = (Path(benchmarks.oracle.__file__).parent / "kvpress_child.py").read_text()
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - sys.stdlib_module_names == {"torch", "transformers", "kvpress"}


def test_a_missing_environment_says_how_to_make_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks.judges, "ROOT", tmp_path)
    with pytest.raises(JudgeMissing, match=r"no \.venv-kvpress: make it with scripts/judge_env\.sh kvpress"):
        run_judge("kvpress", [])
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "scripts/judge_env.sh kvpress" in capsys.readouterr().err


@pytest.mark.judge
@pytest.mark.engine
@pytest.mark.slow
@needs_kvpress
def test_we_keep_what_kvpress_keeps():
    """Identical sets up to ties and identical answers; a difference left in shows, so the comparison is not blind."""
    pairs = [aligned("snapkv", 0.2, 1055, **KVPRESS_VOTING), aligned("streamingllm", 0.2, 1024), aligned_duo(1024)]
    other = replace(pairs[0], settings=pairs[0].settings | {"kernel_size": 7})
    outcomes, versions = compare.compare([*pairs, other], 2)
    for pair, outcome in zip(pairs, outcomes, strict=False):
        assert outcome.num_unexplained == 0, f"{pair}: {outcome.agreement.disagreements}"
        assert outcome.agreement.share_identical > 0.9, "ties are rare"
    assert outcomes[-1].agreement.mean < 0.95
    assert versions["kvpress"] == "0.5.5"
