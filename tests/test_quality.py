"""The quality harness counts wrong answers wrong and notices a server that did not compress."""

import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from benchmarks import quality
from benchmarks.prompts import PROTOCOLS, Prompt, PromptBuilder
from benchmarks.quality import (
    Answer,
    Cell,
    Contender,
    Scored,
    contenders,
    make_rows,
    merge_rows,
    require_compressed,
    score,
    tables,
)
from benchmarks.questions import CHECKPOINT
from benchmarks.scores import summarise
from benchmarks.suites import SUITES, SuiteDataError, make_suite
from benchmarks.suites.base import Question, Turn
from benchmarks.suites.tiny import TinySuite, same_words
from benchmarks.tiny_model.language import make_example
from tests.test_suites_ruler import byte_tokenizer

SNAPKV = Contender("snapkv", {"retention_ratio": 0.1})
PLAIN = Contender("none", {})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def question(task="mk", seed=0):
    return list(TinySuite((1024,)).questions(task, "1024", seed + 1))[seed]


def prompt(**kwargs):
    return Prompt(**({"question": question(), "turn": 0, "token_ids": [1], "num_compressed": 1024} | kwargs))


class TestScores:
    def test_a_planted_wrong_answer_is_wrong(self):
        right = question().turns[0].answers[0]
        assert score(prompt(), Answer(right, True)) == 1
        wrong = right.split()
        wrong[-1] = "00" if wrong[-1] != "00" else "01"
        assert score(prompt(), Answer(" ".join(wrong), True)) == 0
        assert score(prompt(), Answer(f"{right} 00", True)) == 0
        assert score(prompt(), Answer("", True)) == 0

    def test_a_right_answer_that_goes_on_is_wrong(self):
        assert score(prompt(), Answer(question().turns[0].answers[0], False)) == 0

    def test_the_turn_decides(self):
        conversation = question("mt")
        last = conversation.turns[3].answers[0]
        assert score(prompt(question=conversation, turn=3), Answer(last, True)) == 1
        assert score(prompt(question=conversation, turn=0), Answer(last, True)) == 0

    def test_wilson_interval(self):
        """8 of 10: the textbook interval."""
        summary = summarise([1.0] * 8 + [0.0] * 2)
        assert (summary.mean, summary.count) == (0.8, 10)
        assert (summary.low, summary.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)

    def test_interval_of_fractions(self):
        """Mean 0.5, deviation 0.5 ** 0.5 / 2 of [0.25, 0.75]: 1.96 * 0.25 on each side."""
        summary = summarise([0.25, 0.75])
        assert (summary.low, summary.high) == pytest.approx((0.01, 0.99), abs=1e-3)


class TestPrompts:
    @pytest.mark.parametrize("task", TinySuite.tasks)
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_the_first_prompt_is_the_examples(self, tokenizer, task, protocol):
        built = PromptBuilder(tokenizer, 4608).prompts(question(task), protocol)
        assert built[0].token_ids == make_example(task, 1024, 0).prompt_ids

    def test_what_is_compressed(self, tokenizer):
        builder = PromptBuilder(tokenizer, 4608)
        conversation = question("mt")
        by_protocol = {p: builder.prompts(conversation, p) for p in PROTOCOLS}
        first = by_protocol["question"][0]
        for prompt in by_protocol["question"]:
            assert prompt.num_compressed == len(prompt.token_ids)
        for prompt in by_protocol["once"]:
            assert prompt.num_compressed == len(first.token_ids) == 1024
        for prompt in by_protocol["context"]:
            words = tokenizer.decode(prompt.token_ids[: prompt.num_compressed]).split()
            assert "?" not in words
            assert words == ["<s>", *conversation.context.split()]
            assert tokenizer.decode(prompt.token_ids[prompt.num_compressed :]).split()[0] == "?"

    def test_a_conversation_holds_the_right_answers(self, tokenizer):
        conversation = question("mt")
        example = make_example("mt", 1024, 0)
        text = f"{example.prompt} {example.answer}"
        for i, (follow_up, answer) in enumerate(example.follow_ups, start=1):
            text += f" {follow_up}"
            prompt = PromptBuilder(tokenizer, 4608).prompts(conversation, "question")[i]
            assert tokenizer.decode(prompt.token_ids).split()[1:] == text.split()
            text += f" {answer}"

    def test_a_long_context_loses_its_middle(self, tokenizer):
        (prompt,) = PromptBuilder(tokenizer, 500).prompts(question(), "context")
        assert prompt.is_truncated
        assert len(prompt.token_ids) == 500 - question().max_new_tokens
        whole = make_example("mk", 1024, 0).prompt_ids
        assert prompt.token_ids[:200] == whole[:200]
        assert prompt.token_ids[-200:] == whole[-200:]

    def test_a_question_that_leaves_no_room(self, tokenizer):
        with pytest.raises(ValueError, match="leave no room for a context in 20 tokens; raise --max-model-len"):
            PromptBuilder(tokenizer, 20).prompts(question(), "question")

    def test_chat_template(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
            "{% if add_generation_prompt %}<a>{% endif %}"
        )
        turns = (Turn("Q1?", ("A1",), "It is "), Turn("Q2?", ("A2",), "So "))
        asked = Question("t", "", "CONTEXT", turns, same_words, 4)
        builder = PromptBuilder(tokenizer, 200, chat=True)
        first, second = builder.prompts(asked, "once")
        assert tokenizer.decode(first.token_ids) == "<user>CONTEXTQ1?</><a>It is "
        assert tokenizer.decode(second.token_ids) == "<user>CONTEXTQ1?</><assistant>It is A1</><user>Q2?</><a>So "
        assert tokenizer.decode(second.token_ids[: second.num_compressed]) == "<user>CONTEXTQ1?"
        blind = builder.prompts(asked, "context")[1]
        assert tokenizer.decode(blind.token_ids) == "<user>CONTEXTQ2?</><a>So "
        assert tokenizer.decode(blind.token_ids[: blind.num_compressed]) == "<user>CONTEXT"


class TestActivation:
    """A server whose counters do not say that it compressed is refused."""

    @staticmethod
    def server(compressed, left_alone=0):
        samples = {
            "vllm:fastkv_requests_compressed_total": [SimpleNamespace(value=compressed, labels={})],
            "vllm:fastkv_requests_left_alone_total": [SimpleNamespace(value=left_alone, labels={})],
        }
        return SimpleNamespace(metrics=lambda: samples)

    def test_all_as_expected(self):
        require_compressed(self.server(2, 1), SNAPKV, [1024, 2048, 100])
        require_compressed(self.server(0), PLAIN, [1024])

    @pytest.mark.parametrize(("compressed", "lengths"), [(0, [1024]), (1, [1024, 1024]), (2, [1024]), (0, [100])])
    def test_a_server_that_did_something_else(self, compressed, lengths):
        with pytest.raises(RuntimeError, match=f"the server compressed {compressed} and left"):
            require_compressed(self.server(compressed), SNAPKV, lengths)

    def test_a_plain_server_that_compresses(self):
        with pytest.raises(RuntimeError, match="0 of them to compress"):
            require_compressed(self.server(1), PLAIN, [1024])


def test_rows_and_tables():
    cell = Cell("mk", "1024", "question", "1")

    def scored(scores):
        made = []
        for i, value in enumerate(scores):
            made.append(Scored(cell, prompt(question=question(seed=i)), Answer("", True), value))
        return made

    plain = make_rows(PLAIN, scored([1, 1, 1, 0]), [])
    rows = plain + make_rows(SNAPKV, scored([1, 0, 0, 0]), plain)
    assert [(row["mean"], row["ratio_to_plain"]) for row in rows] == [(0.75, None), (0.25, pytest.approx(1 / 3))]
    depths = [question(seed=i).meta["depth"] for i in range(4)]
    by_depth = rows[1]["by_depth"]
    assert sum(n for _, n in by_depth) == 4
    assert by_depth[int(depths[0] * 10)][0] == 1
    ((protocol, table),) = tables({"rows": rows})
    assert protocol == "question"
    assert "0.75 [0.30, 0.95] |" in table
    assert "x0.33" in table
    assert "snapkv 0.1" in table


def test_a_cell_that_was_left_alone_shows_no_score():
    """Contexts below min_tokens: right answers would say nothing of the method."""
    cell = Cell("mk", "512", "context", "1")
    rows = [
        row
        for contender in (PLAIN, SNAPKV)
        for row in make_rows(contender, [Scored(cell, prompt(num_compressed=500), Answer("", True), 1.0)], [])
    ]
    assert [row["compressed"] for row in rows] == [0, 0]
    ((_, table),) = tables({"rows": rows})
    assert table.splitlines()[-1].split("|")[2].strip() == "left alone"
    assert "1.00" in table.splitlines()[-2]


def test_a_guard_has_a_row_of_its_own_that_says_what_stays():
    """What stays follows from the prompts, so the ratio in the row's name does not tell it."""
    args = Namespace(methods="snapkv", codecs="none", recalls="none,0.9", ratios="0.05", config={}, model=None)
    bare, guarded = contenders(args)
    cell = Cell("mk", "1024", "question", "1")
    rows = [
        row
        for contender, kept in ((bare, (0.05, 0.05)), (guarded, (0.3, 0.6)))
        for row in make_rows(contender, [Scored(cell, prompt(), Answer("", True, share), 1.0) for share in kept], [])
    ]
    ((_, table),) = tables({"rows": rows})
    assert re.search(r"^\| snapkv 0.05 +\| +1.00 \[\S+ \S+\] \|$", table, flags=re.MULTILINE)
    assert re.search(r"^\| snapkv 0.05, recall 0.9 +\| +1.00 \[\S+ \S+\], 0.45 stay \|$", table, flags=re.MULTILINE)


def test_depth_is_where_the_needle_lies():
    for seed in range(5):
        asked = question("niah", seed)
        words = asked.context.split()
        index = round(asked.meta["depth"] * len(words))
        assert words[index : index + 6] == [*asked.turns[0].question.split()[1:], *asked.turns[0].answers[0].split()]


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("tiny", "ruler", "needle")])
def test_a_suite_of_published_data_asks_for_it(name):
    with pytest.raises(SuiteDataError, match="give the directory of its files with --data"):
        make_suite(name, None, [1024], None)


def test_a_report_grows_by_contender() -> None:
    def report(*rows: tuple[str, float]) -> dict:
        cell = {"task": "niah", "group": "512", "protocol": "question", "turns": "1"}
        made = [{"method": method, "config": {}, "mean": mean, **cell} for method, mean in rows]
        return {"suite": "tiny", "model": "m", "rows": made}

    old, new = report(("none", 0.9), ("snapkv", 0.5)), report(("none", 1.0), ("adakv", 0.7))
    rows = merge_rows(old, new)
    assert [(row["method"], row["mean"]) for row in rows] == [("none", 1.0), ("snapkv", 0.5), ("adakv", 0.7)]
    with pytest.raises(ValueError, match="has other questions"):
        merge_rows(old | {"model": "other"}, new)


def test_what_was_measured_before_a_failure_stays(monkeypatch, tmp_path) -> None:
    def measure(contender, model, prompts, extra):
        if contender.method in broken:
            raise RuntimeError("its server ended")
        points = 0.5 if contender.method == "snapkv" else 1.0
        (batch,) = prompts.values()
        cell = Cell("niah", "512", "question", "1")
        return [Scored(cell, prompt, Answer("", True), points) for prompt in batch]

    report = tmp_path / "quality.json"
    words = f"quality --tasks niah --lengths 512 -n 2 --protocols question --json {report} --methods"
    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr("sys.argv", [*words.split(), "none,adakv,snapkv"])
    broken = {"snapkv"}
    with pytest.raises(RuntimeError, match="its server ended"):
        quality.main()
    assert [row["method"] for row in json.loads(report.read_text())["rows"]] == ["none", "adakv"]
    broken = set()
    monkeypatch.setattr("sys.argv", [*words.split(), "snapkv"])
    quality.main()
    rows = json.loads(report.read_text())["rows"]
    assert [(row["method"], row["ratio_to_plain"]) for row in rows] == [("none", None), ("adakv", 1.0), ("snapkv", 0.5)]
