# ruff: noqa: RUF001 (the Chinese template has full-width punctuation)
"""InfiniteBench over local copies of its data, and the reading of options SCBench shares."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.suites import metrics
from benchmarks.suites.base import Question, Suite
from benchmarks.suites.longbench import Form, read_rows, require_known

_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
_SUMS = (
    "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
    "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\n"
)
FORMS = {
    "passkey": Form(
        _HIDDEN + " and memorize it. I will quiz you about the important information.\n\n{context}\n\n{input}\n\n",
        6,
        metrics.first_integer,
        "The pass key is",
    ),
    "number_string": Form(
        _HIDDEN + ". I will quiz you about the important information there.\n\n{context}\n\n{input}\n\n",
        12,
        metrics.first_integer,
        "The sequence of digits is",
    ),
    "kv_retrieval": Form(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        50,
        metrics.word,
    ),
    "longbook_sum_eng": Form("Summarize the book below.\n\n{context}\n\n", 1200, metrics.rouge_lsum, "Summary:"),
    "longbook_choice_eng": Form(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n" + _OPTIONS,
        40,
        metrics.choice,
        "The letter of the correct answer is",
    ),
    "longbook_qa_eng": Form(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}\n",
        40,
        metrics.qa_f1,
        "Answer:",
    ),
    "longbook_qa_chn": Form(
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n", 40, metrics.qa_f1_zh, "答案："
    ),
    "longdialogue_qa_eng": Form(
        "Below is a dialogue script where one random occurrence of a character name is replaced with "
        '"$$MASK$$", and you should try to guess who that character is.\n\n{context}\n\n',
        40,
        metrics.word_any_case,
        "The name that has been replaced with $$MASK$$ is likely",
    ),
    "math_find": Form("What is {sought} in the following list?\n\n{context}\n\n{input}", 3, metrics.first_number),
    "math_calc": Form(_SUMS, 30000, metrics.leading_numbers, "Values:"),
    "code_run": Form(
        "There is a function called {function} in the following Python code.\n\n{context}\n\n"
        "Please compute the exact value of {call}. ",
        5,
        metrics.last_integer,
        "The value of {call} is",
    ),
    "code_debug": Form(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n{context}\n\nOptions:\n" + _OPTIONS,
        5,
        metrics.buggy_function,
        "The correct option is:",
    ),
}
WITH_OPTIONS = ("longbook_choice_eng", "code_debug")


@dataclass(frozen=True)
class InfiniteBench(Suite):
    """The 12 tasks of InfiniteBench, contexts of about 100 thousand tokens and more.

    Prompts, answer lengths and scoring are the original's for open models (its set of templates "yarn-mistral"); what a
    template says after the question ("The pass key is") is the answer's prefix. The lengths suit models that go on from
    there: a pass key has 6 tokens; math_calc has 30000. Of math_find, code_run and math_calc the context begins with
    what is asked or an example, as in the original.

    Fields:
        data: directory of `<task>.jsonl`, exported from the dataset xinrongzhang2022/InfiniteBench.
    """

    name: ClassVar[str] = "infinitebench"
    source: ClassVar[str] = "arXiv:2402.13718, github.com/OpenBMB/InfiniteBench"
    tasks: ClassVar[tuple[str, ...]] = tuple(FORMS)

    data: Path

    def groups(self, task: str) -> tuple[str, ...]:
        require_known(self, task)
        return ("",)

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        require_known(self, task, group)
        form = FORMS[task]
        fields = ("context", "input", "answer", *(("options",) if task in WITH_OPTIONS else ()))
        rows = islice(read_rows(self.data, task, "xinrongzhang2022/InfiniteBench", fields), count)
        return [
            form.question(task, group, _answers(task, row, place), _fields(task, row, place)) for place, row in rows
        ]


def _fields(task: str, row: dict[str, Any], place: str) -> dict[str, Any]:
    """What the task's template names."""
    fields = {"context": row["context"], "input": row["input"]}
    if task in WITH_OPTIONS:
        fields |= by_letter(row["options"], place)
    elif task == "math_find":
        fields["sought"] = "the " + found(r"The (.+) of", row["input"], place).lower()
    elif task == "code_run":
        fields["call"] = found(r"(func_\d+\(-?\d+\))", row["input"], place)
        fields["function"] = fields["call"].partition("(")[0]
    return fields


def _answers(task: str, row: dict[str, Any], place: str) -> Any:
    answer = row["answer"]
    if task in WITH_OPTIONS:
        return lettered(answer, row["options"], place)
    if task == "math_calc":
        return str(answer)  # one answer that is a list
    return answer


def found(pattern: str, text: str, place: str) -> str:
    """The pattern's group in the field `input`; ValueError, naming the place in the data, where it is not there."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{place}: the field input must contain {pattern!r}, got {text!r}")
    return match[1]


def by_letter(options: Sequence[str], place: str) -> dict[str, str]:
    """The four options by their letters; ValueError, naming the place in the data, where there are not four."""
    if len(options) != len(metrics.LETTERS):
        raise ValueError(f"{place} must have {len(metrics.LETTERS)} options, got {options!r}")
    return dict(zip(metrics.LETTERS, options, strict=True))


def lettered(answer: str | Sequence[str], options: Sequence[str], place: str) -> tuple[str, str]:
    """(text, letter) of an answer given as text, (text,) or both: what `choice` and `buggy_function` accept.

    Raises:
        ValueError: the answer is not one of the options; names the place in the data.
    """
    text, *letter = [answer] if isinstance(answer, str) else answer
    if len(letter) == 1 and letter[0] in metrics.LETTERS:
        return text, letter[0]
    if letter or text not in options:
        raise ValueError(f"{place}: the answer must be one of the options {options!r}, got {answer!r}")
    return text, metrics.LETTERS[options.index(text)]
