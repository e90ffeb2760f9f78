"""The suites over local data ask what the benchmarks ask and score as they do."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import infinitebench, longbench, metrics, scbench
from benchmarks.suites.base import Metric, Question, Suite, SuiteDataError
from benchmarks.suites.infinitebench import InfiniteBench
from benchmarks.suites.longbench import LongBench, LongBenchV2
from benchmarks.suites.scbench import SCBench

CONTEXT = "The context, with {braces} and 北京."
INPUT = "Input: The largest number of the list is func_7(-3)"  # holds what the templates search for in it
OPTIONS = ["Anna", "Mrs. Hill", "Carl", "Dora"]
WRONG = "QQQ"
FUNCTION = "def add(first, second):\n    total = first + second\n    return total"
OTHER_FUNCTION = "def scale(values, factor):\n    return [value * factor for value in values]"

# Metric -> the row's answer and an answer that is entirely right.
ANSWERS: dict[Callable[..., float], tuple[Any, str]] = {
    metrics.qa_f1: ("in the old town", "Old town, in."),
    metrics.qa_f1_zh: ("北京", "北京。"),
    metrics.rouge_l: ("they met. they left", "they met. they left"),
    metrics.rouge_l_zh: ("会议结束", "会议结束"),
    metrics.rouge_lsum: ("They met.\nThey left", "they met\nthey left!"),
    metrics.classification: ("Food", "Food"),
    metrics.code_similarity: ("return total", "\nreturn total\nmore"),
    metrics.count: ("7", "There are 7."),
    metrics.retrieval: ("Paragraph 12", "Paragraph 12"),
    metrics.first_integer: ("01234", " 01234. It is 5."),
    metrics.first_number: (42, "42"),
    metrics.last_integer: (-3, "It is -3."),
    metrics.leading_numbers: ([1, 4, 8], "1, 4, 8"),
    metrics.word: ("ab-12", '"ab-12"'),
    metrics.word_any_case: (["ANNA"], "Anna, I think"),
    metrics.substring: ("ab-12", "it is ab-12!"),
    metrics.substring_any_case: ("New York", "in new york"),
    metrics.share_of_list: (["VAR1", "VAR2"], "var2 and VAR1"),
    metrics.choice: ("Mrs. Hill", "B"),
    metrics.buggy_function: (["Mrs. Hill"], "B. Mrs."),
    metrics.stated_letter: ("B", "The correct answer is (B)"),
    scbench.repeated_function: (FUNCTION, f"Here:\n```python\n{FUNCTION}\n```"),
}


def answers_of(form: longbench.Form) -> tuple[Any, str]:
    """As ANSWERS; the metrics that `first_line` made are told by what they take for right."""
    if form.metric in ANSWERS:
        return ANSWERS[form.metric]
    return "in the old town", "\nin the old town\nQuestion: next"


def longbench_row(task: str) -> dict[str, Any]:
    answer, _ = answers_of(longbench.FORMS[task.removesuffix("_e")])
    row = {"input": INPUT, "context": CONTEXT, "answers": [answer], "length": 5000, "dataset": task}
    return {**row, "all_classes": ["Food", "Sport"] if task in ("trec", "trec_e", "lsht") else None}


def choice_row(task: str, length: str = "short") -> dict[str, Any]:
    row = {"_id": "1", "domain": "Law", "sub_domain": "Tax", "difficulty": "easy", "length": length}
    choices = {f"choice_{letter}": option for letter, option in zip("ABCD", OPTIONS, strict=True)}
    return {**row, "question": INPUT, **choices, "answer": "B", "context": f" {CONTEXT}\n"}


def infinitebench_row(task: str) -> dict[str, Any]:
    answer, _ = answers_of(infinitebench.FORMS[task])
    return {"id": 0, "context": CONTEXT, "input": INPUT, "answer": answer, "options": OPTIONS}


def turn(answer: Any, **more: Any) -> dict[str, Any]:
    return {"input": INPUT, "answer": answer, "options": OPTIONS, **more}


def scbench_row(task: str) -> dict[str, Any]:
    kinds = {
        "scbench_summary_with_needles": ("scbench_summary", "scbench_passkey"),
        "scbench_repoqa_and_kv": ("scbench_repoqa", "scbench_kv"),
    }
    if task in kinds:
        answers = [ANSWERS[scbench.TURN_METRICS[kind]][0] for kind in kinds[task]]
        turns = [turn(answer, task=kind) for answer, kind in zip(answers, kinds[task], strict=True)]
    else:
        turns = [turn(answers_of(scbench.FORMS[task])[0])] * 2
    context = "input" if task == "scbench_vt" else "context"
    return {"id": 0, context: CONTEXT, "multi_turns": turns, "repo": "a/b"}


ROWS: dict[type[Suite], Callable[[str], dict[str, Any]]] = {
    LongBench: longbench_row,
    LongBenchV2: choice_row,
    SCBench: scbench_row,
    InfiniteBench: infinitebench_row,
}
FORMS = {LongBench: longbench.FORMS, SCBench: scbench.FORMS, InfiniteBench: infinitebench.FORMS}
DATASETS = {
    LongBench: "THUDM/LongBench",
    LongBenchV2: "THUDM/LongBench-v2",
    SCBench: "microsoft/SCBench",
    InfiniteBench: "xinrongzhang2022/InfiniteBench",
}
CASES = [pytest.param(suite, task, id=f"{suite.name}-{task}") for suite in ROWS for task in suite.tasks]
every_task = pytest.mark.parametrize(("suite", "task"), CASES)


def file_name(suite: type[Suite], task: str) -> str:
    return "data.jsonl" if suite is LongBenchV2 else f"{task}.jsonl"


def write(path: Path, *rows: Any) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def a_group(suite: Suite, task: str) -> str:
    """The group of the row written."""
    groups = suite.groups(task)
    return groups[1] if task.endswith("_e") else groups[0]


def ask(suite_class: type[Suite], data: Path, task: str, *rows: Any, count: int = 9) -> list[Question]:
    """Questions read from a file of these rows."""
    write(data / file_name(suite_class, task), *rows)
    suite = suite_class(data)
    return list(suite.questions(task, a_group(suite, task), count))


def prompt(question: Question, i: int = 0) -> str:
    return question.context + question.turns[i].question + question.turns[i].answer_prefix


def right_answers(suite: type[Suite], task: str) -> Sequence[str]:
    if suite is LongBenchV2:
        return ["The correct answer is (B)"]
    form = FORMS[suite][task.removesuffix("_e")]
    if form.metric is not scbench.by_answer:
        return [answers_of(form)[1]] * (2 if suite is SCBench else 1)
    return [ANSWERS[scbench.TURN_METRICS[given["task"]]][1] for given in scbench_row(task)["multi_turns"]]


@every_task
def test_context_then_question(suite: type[Suite], task: str, tmp_path: Path) -> None:
    (question,) = ask(suite, tmp_path, task, ROWS[suite](task))
    assert (question.task, question.group) == (task, a_group(suite(tmp_path), task))
    assert question.context.endswith(CONTEXT) and question.max_new_tokens > 0
    template = (
        longbench.CHOICE_FORM.template if suite is LongBenchV2 else FORMS[suite][task.removesuffix("_e")].template
    )
    for given in question.turns:
        assert CONTEXT not in given.question
        if "{input}" in template or "{question}" in template:
            assert INPUT in given.question
        if "{A}" in template or "{choice_A}" in template:
            assert all(option in given.question for option in OPTIONS)
        text = question.context.replace(CONTEXT, "") + given.question + given.answer_prefix
        assert re.findall(r"[{}]", text) == [], "a field of the template is not filled"


@every_task
def test_right_answer_scores_1_and_wrong_0(suite: type[Suite], task: str, tmp_path: Path) -> None:
    (question,) = ask(suite, tmp_path, task, ROWS[suite](task))
    for given, right in zip(question.turns, right_answers(suite, task), strict=True):
        assert all(isinstance(answer, str) for answer in given.answers)
        assert question.metric(right, given.answers) == pytest.approx(1)
        assert question.metric(WRONG, given.answers) == 0
        assert question.metric("", given.answers) == 0


@every_task
def test_count_and_blank_lines(suite: type[Suite], task: str, tmp_path: Path) -> None:
    rows = [ROWS[suite](task)] * 3
    assert len(ask(suite, tmp_path, task, *rows)) == 3
    assert len(ask(suite, tmp_path, task, *rows, count=2)) == 2
    path = tmp_path / file_name(suite, task)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    here = suite(tmp_path)
    assert len(list(here.questions(task, a_group(here, task), 9))) == 3


@every_task
def test_missing_file(suite: type[Suite], task: str, tmp_path: Path) -> None:
    here = suite(tmp_path)
    with pytest.raises(SuiteDataError) as error:
        list(here.questions(task, a_group(here, task), 1))
    for part in (file_name(suite, task), str(tmp_path), "JSON object a line", DATASETS[suite]):
        assert part in str(error.value)


@every_task
def test_missing_field(suite: type[Suite], task: str, tmp_path: Path) -> None:
    row = ROWS[suite](task)
    field = "input" if task == "scbench_vt" else "context"
    without = {name: value for name, value in row.items() if name != field}
    with pytest.raises(ValueError, match=rf"{re.escape(file_name(suite, task))}, line 2 lacks the field context"):
        ask(suite, tmp_path, task, row, without)


@every_task
def test_unknown_task_or_group(suite: type[Suite], task: str, tmp_path: Path) -> None:
    here = suite(tmp_path)
    with pytest.raises(ValueError, match="no task 'other'.*" + re.escape(task)):
        here.groups("other")
    with pytest.raises(ValueError, match="no group 'other'"):
        here.questions(task, "other", 1)


@pytest.mark.parametrize(
    ("suite", "task", "change", "message"),
    [
        (LongBench, "trec", {"all_classes": ...}, "trec.jsonl, line 1 lacks the field all_classes"),
        (LongBench, "trec_e", {"length": ...}, "trec_e.jsonl, line 1 lacks the field length"),
        (LongBenchV2, "choice", {"choice_D": ...}, "data.jsonl, line 1 lacks the field choice_D"),
        (InfiniteBench, "code_debug", {"options": ...}, "code_debug.jsonl, line 1 lacks the field options"),
        (InfiniteBench, "code_debug", {"options": [*OPTIONS, "Eve"]}, "code_debug.jsonl, line 1 must have 4 options"),
        (InfiniteBench, "code_debug", {"answer": "Eve"}, "code_debug.jsonl, line 1: the answer must be one of"),
        (InfiniteBench, "code_run", {"input": "f(1)"}, "code_run.jsonl, line 1: the field input must contain"),
        (InfiniteBench, "math_find", {"input": "f(1)"}, "math_find.jsonl, line 1: the field input must contain"),
        (SCBench, "scbench_kv", {"multi_turns": []}, "scbench_kv.jsonl, line 1 must have a turn"),
        (SCBench, "scbench_kv", {"multi_turns": [{"input": ""}]}, "line 1, turn 1 lacks the field answer"),
        (SCBench, "scbench_repoqa", {"repo": ...}, "scbench_repoqa.jsonl, line 1 lacks the field repo"),
        (SCBench, "scbench_repoqa_and_kv", {"multi_turns": [turn("x")]}, "line 1, turn 1 lacks the field task"),
        (SCBench, "scbench_repoqa_and_kv", {"multi_turns": [turn("x", task="y")]}, "turn 1: task must be one of"),
    ],
)
def test_malformed_row(suite: type[Suite], task: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {name: value for name, value in {**ROWS[suite](task), **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(suite, tmp_path, task, row)


def test_not_json(tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_text('{"input"\n')
    with pytest.raises(ValueError, match=r"lcc\.jsonl, line 1 is not JSON"):
        LongBench(tmp_path).questions("lcc", "", 1)
    (tmp_path / "lcc.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"lcc\.jsonl, line 1 must be a JSON object, got list"):
        LongBench(tmp_path).questions("lcc", "", 1)


@pytest.mark.parametrize(
    ("suite", "task", "expected"),
    [
        (LongBench, "trec", "Please determine the type of the question below. Here are some examples of questions.\n\n"
         "{context}\n{input}"),
        (LongBench, "hotpotqa", "Answer the question based on the given passages. Only give me the answer and do not "
         "output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the "
         "given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"),
        (LongBench, "samsum", "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
         "{context}\n\n{input}"),
        (LongBench, "repobench-p_e", "Please complete the code given below. \n{context}{input}Next line of code:\n"),
        (LongBenchV2, "choice", "Please read the following text and answer the question below.\n\n<text>\n{context}\n"
         "</text>\n\nWhat is the correct answer to this question: {input}\nChoices:\n(A) Anna\n(B) Mrs. Hill\n(C) Carl"
         '\n(D) Dora\n\nFormat your response as follows: "The correct answer is (insert answer here)".'),
        (InfiniteBench, "passkey", "There is an important info hidden inside a lot of irrelevant text. Find it and "
         "memorize it. I will quiz you about the important information.\n\n{context}\n\n{input}\n\nThe pass key is"),
        (InfiniteBench, "longbook_choice_eng", "Read the book and answer the question.\n\n{context}\n\nQuestion: "
         "{input}\nA. Anna\nB. Mrs. Hill\nC. Carl\nD. Dora\n\nThe letter of the correct answer is"),
        (InfiniteBench, "math_find", "What is the largest number in the following list?\n\n{context}\n\n{input}"),
        (InfiniteBench, "code_run", "There is a function called func_7 in the following Python code.\n\n{context}\n\n"
         "Please compute the exact value of func_7(-3). The value of func_7(-3) is"),
        (SCBench, "scbench_mf", "{input}\n\n{context}\n\nWhat is the largest number of the list?\n\n{input}"),
        (SCBench, "scbench_choice_eng", "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
         "A. Anna\nB. Mrs. Hill\nC. Carl\nD. Dora\n\nThe the correct answer is"),
    ],
)  # fmt: skip
def test_whole_prompt(suite: type[Suite], task: str, expected: str, tmp_path: Path) -> None:
    (question,) = ask(suite, tmp_path, task, ROWS[suite](task))
    assert prompt(question) == expected.format(context=CONTEXT, input=INPUT)


def test_longbench_e_groups(tmp_path: Path) -> None:
    lengths = [3999, 4000, 7999, 8000, 20000]
    write(tmp_path / "qasper_e.jsonl", *({**longbench_row("qasper_e"), "length": n} for n in lengths))
    suite = LongBench(tmp_path)
    assert suite.groups("qasper_e") == ("0-4k", "4-8k", "8k+") and suite.groups("qasper") == ("",)
    assert [len(list(suite.questions("qasper_e", group, 9))) for group in suite.groups("qasper_e")] == [1, 2, 2]
    assert len(LongBench.tasks) == 21 + 13


def test_longbench_v2_list_and_groups(tmp_path: Path) -> None:
    rows = [choice_row("choice", length) for length in ("short", "long", "long")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    suite = LongBenchV2(tmp_path)
    found = [list(suite.questions("choice", group, 9)) for group in ("short", "medium", "long")]
    assert [len(questions) for questions in found] == [1, 0, 2]
    assert found[0][0].meta == {"domain": "Law", "sub_domain": "Tax", "difficulty": "easy"}
    (tmp_path / "data.json").write_text(json.dumps([{}]))
    with pytest.raises(ValueError, match=r"data\.json, entry 1 lacks the field domain"):
        suite.questions("choice", "short", 1)


def test_list_of_numbers_as_context(tmp_path: Path) -> None:
    row = {**scbench_row("scbench_mf"), "context": [3, 42]}
    (question,) = ask(SCBench, tmp_path, "scbench_mf", row)
    assert question.context == f"{INPUT}\n\n[3, 42]"


def test_history_shows_the_text_of_an_answer(tmp_path: Path) -> None:
    (question,) = ask(SCBench, tmp_path, "scbench_choice_eng", scbench_row("scbench_choice_eng"))
    assert question.turns[0].answers == ("Mrs. Hill", "B")
    (question,) = ask(SCBench, tmp_path, "scbench_vt", scbench_row("scbench_vt"))
    assert question.turns[0].answers == ("VAR1, VAR2",)


def test_functions_of_one_repository_compete(tmp_path: Path) -> None:
    rows = [
        {"context": CONTEXT, "repo": repo, "multi_turns": [turn(code)]}
        for repo, code in (("a/b", FUNCTION), ("a/b", OTHER_FUNCTION), ("c/d", FUNCTION + "\n# last"))
    ]
    first, second, third = ask(SCBench, tmp_path, "scbench_repoqa", *rows)
    assert first.metric(OTHER_FUNCTION, first.turns[0].answers) == 0
    assert second.metric(OTHER_FUNCTION, second.turns[0].answers) == 1
    assert third.metric(FUNCTION + "\n# last", third.turns[0].answers) == 1
    assert first.metric(FUNCTION.replace("total", "result"), first.turns[0].answers) == 0  # BLEU < 0.8


def test_each_kind_of_turn_has_its_metric(tmp_path: Path) -> None:
    turns = [turn("They met.\nThey left", task="scbench_summary"), turn("01234", task="scbench_passkey")]
    row = {"context": CONTEXT, "multi_turns": turns}
    (question,) = ask(SCBench, tmp_path, "scbench_summary_with_needles", row)
    summary, needle = question.turns
    assert question.metric("they met", summary.answers) == pytest.approx(2 * 1 * 0.5 / 1.5)  # P = 2/2, R = 2/4
    assert question.metric("01234, not 99", needle.answers) == 1
    assert question.metric("no, 99, then 01234", needle.answers) == 0
    turns = [turn(FUNCTION, task="scbench_repoqa"), turn("ab-12", task="scbench_kv")]
    row = {"context": CONTEXT, "repo": "a/b", "multi_turns": turns}
    (question,) = ask(SCBench, tmp_path, "scbench_repoqa_and_kv", row)
    function, value = question.turns
    assert question.metric(f"```\n{FUNCTION}\n```", function.answers) == 1
    assert question.metric("It is ab-12", value.answers) == 1
    assert question.metric("ab-12", function.answers) == question.metric(FUNCTION, value.answers) == 0


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "expected"),
    [
        (metrics.exact_match, " Paris\n", ["Rome", "Paris"], 1),
        (metrics.exact_match, "Paris.", ["Paris"], 0),
        (metrics.substring, "key: ab", ["ab"], 1),
        (metrics.substring, "key: AB", ["ab"], 0),
        (metrics.substring_any_case, "key: AB", ["x", "ab"], 1),
        (metrics.share_of_list, "x1 and X3", ["X1, X2, X3"], 2 / 3),
        (metrics.word, 'It is "ab-12".', ["ab-12"], 1),
        (metrics.word, "It is ab-123.", ["ab-12"], 0),
        (metrics.first_integer, "012 34", ["34"], 0),
        (metrics.first_integer, "012 34", ["12"], 0),
        (metrics.first_number, "It is 3.7", ["3"], 1),  # an integer is compared with the integer part
        (metrics.first_number, "It is 3.7", ["3.7"], 1),
        (metrics.first_number, "It is 3", ["3.7"], 0),
        (metrics.last_integer, "f(3) is `-12`.", ["-12"], 1),
        (metrics.last_integer, "-12 it is", ["-12"], 0),
        (metrics.leading_numbers, "1, 4, 9, 7", ["[1, 4, 8, 7]"], 2 / 4),
        (metrics.leading_numbers, "4, 1", ["[1, 4]"], 0),
        (metrics.count, "7 or 8, no: 7", ["7"], 2 / 3),
        (metrics.retrieval, "Paragraph 3, not 4", ["Paragraph 3"], 1 / 2),
        (metrics.retrieval, "段落3", ["段落3"], 1),
        (metrics.retrieval, "13", ["Paragraph 3"], 0),
        # Words "old town hall" and "in old town": 2 in common, P = 2/3, R = 2/3.
        (metrics.qa_f1, "The old town hall!", ["x", "in an old town"], 2 / 3),
        (metrics.qa_f1, "old", ["old town"], 2 * 1 * 0.5 / 1.5),
        # Characters 北京市 and 北京: P = 2/3, R = 1.
        (metrics.qa_f1_zh, "北京市。", ["《上海", "北京"], 4 / 5),
        # Sentences "a b c" and "a x c. d": "a c" in common; 3 and 4 distinct words.
        (metrics.rouge_l, "a b c", ["a x c. d"], 2 * 2 / (3 + 4)),
        (metrics.rouge_l, "c b a", ["a b c"], 2 * 1 / (3 + 3)),
        (metrics.rouge_l, "a a a", ["a"], 1),  # distinct words
        (metrics.rouge_l, "a a b", ["b a a. b a"], 2 * 1 / (2 + 2)),  # of "b a" the package takes "a", not "b"
        (metrics.rouge_l_zh, "甲乙丙", ["甲丁丙"], 2 * 2 / (3 + 3)),
        (metrics.rouge_lsum, "A, b c", ["a x c\nd"], 2 * 2 / (3 + 4)),
        (metrics.rouge_lsum, "a a a", ["a"], 2 * 1 / (3 + 1)),  # words as often as both have them
        (metrics.rouge_lsum, "c\na", ["a b c"], 2 * 2 / (2 + 3)),  # union over lines
        (metrics.code_similarity, "# note\n`x`\nabcd", ["abce"], 0.75),  # 2 * 3 / 8
        (metrics.code_similarity, "// only", ["abce"], 0),
        (metrics.stated_letter, "**The correct answer is (C)**", ["C"], 1),
        (metrics.stated_letter, "The correct answer is C, not (B)", ["C"], 1),
        (metrics.stated_letter, "C", ["C"], 0),
        (metrics.choice, "B. Hill", ["Hill", "B"], 1),
        (metrics.choice, "A", ["Hill", "B"], 0),
        (metrics.choice, "Hill", ["Hill", "B"], 1),
        (metrics.choice, "so the answer is: Hill", ["Hill", "B"], 1),
        (metrics.choice, "so the answer is C or B", ["Hill", "B"], 0),
        (metrics.choice, "so it must be B", ["Hill", "B"], 1),
        (metrics.buggy_function, "B: run", ["run", "B"], 1),
        (metrics.buggy_function, "the answer is: run", ["run", "B"], 1),
        (metrics.buggy_function, "the answer is: A", ["run", "B"], 0),
        (metrics.buggy_function, "run", ["run", "B"], 0),
    ],
)
def test_metric(metric: Metric, answer: str, accepted: Sequence[str], expected: float) -> None:
    assert metric(answer, accepted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Other number", 1),  # "number" is part of the right name and does not count
        ("Other number or city", 1 / 2),
        ("number", 0),
    ],
)
def test_classification(answer: str, expected: float) -> None:
    assert metrics.classification(answer, ["Other number"], ["number", "city", "Other number"]) == expected


def test_first_line() -> None:
    metric = metrics.first_line(metrics.exact_match)
    assert (metric("\n\na\nb", ["a"]), metric("b\na", ["a"])) == (1, 0)


def test_bleu_by_hand() -> None:
    # "a b c d e" of "a b c d x": precisions 4/5, 3/4, 2/3, 1/2, equal lengths.
    words = list("abcde")
    assert scbench._bleu(words, list("abcdx")) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # All of "a b c d" is in "a b c d e": only the brevity penalty exp(1 - 5/4) is left.
    assert scbench._bleu(list("abcd"), words) == pytest.approx(2.718281828 ** (1 - 5 / 4))
    assert scbench._bleu(list("abc"), words) == 0


def test_every_metric_has_an_answer() -> None:
    forms: Mapping[str, longbench.Form] = {**longbench.FORMS, **infinitebench.FORMS, **scbench.FORMS}
    wrapped = {"triviaqa", "samsum", "scbench_summary_with_needles", "scbench_repoqa_and_kv"}
    assert {task for task, form in forms.items() if form.metric not in ANSWERS} == wrapped
