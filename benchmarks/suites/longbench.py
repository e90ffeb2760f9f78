# ruff: noqa: RUF001 (the Chinese templates have full-width punctuation)
"""LongBench and LongBench v2 over local copies of their data, and the reading of data files other suites share."""

import json
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.suites import metrics
from benchmarks.suites.base import Question, Suite, SuiteDataError, Turn


@dataclass(frozen=True)
class Form:
    """How a task is asked and scored.

    Fields:
        template: the prompt; all up to and including {context} is the context, all after it the question.
        max_new_tokens: longest answer.
        metric: scorer, or a function that needs more of the row to be one.
        answer_prefix: end of the prompt that the answer starts with.
    """

    template: str
    max_new_tokens: int
    metric: Callable[..., float]
    answer_prefix: str = ""

    def context(self, fields: Mapping[str, Any]) -> str:
        head, _, _ = self.template.partition("{context}")
        return (head + "{context}").format(**fields)

    def turn(self, answers: Any, fields: Mapping[str, Any]) -> Turn:
        """The question about the context; `answers` is one accepted answer or a list of them."""
        _, _, tail = self.template.partition("{context}")
        accepted = answers if isinstance(answers, list | tuple) else [answers]
        return Turn(tail.format(**fields), tuple(map(str, accepted)), self.answer_prefix.format(**fields))

    def question(self, task: str, group: str, answers: Any, fields: Mapping[str, Any]) -> Question:
        turns = (self.turn(answers, fields),)
        return Question(task, group, self.context(fields), turns, self.metric, self.max_new_tokens)


def read_rows(data: Path, name: str, dataset: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of <name>.jsonl, or of the list in <name>.json, each with its place in words ("qasper.jsonl, line 3").

    Args:
        data: directory of the file.
        name: file's name without its ending.
        dataset: published dataset to export it from.
        fields: those each row must have.

    Raises:
        SuiteDataError: no such file.
        ValueError: a row is no JSON object or lacks a field.
    """
    path = next((path for path in (data / f"{name}.jsonl", data / f"{name}.json") if path.is_file()), None)
    if path is None:
        raise SuiteDataError(
            f"{name}.jsonl (one JSON object a line, UTF-8) or {name}.json (a list of them) must be in the directory "
            f"{data}, with the fields {', '.join(fields)}: export it from the dataset {dataset}"
        )
    for place, row in _objects(path):
        require_fields(row, fields, place)
        yield place, row


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json":
        yield from ((f"{path.name}, entry {i}", row) for i, row in enumerate(json.loads(path.read_text("utf-8")), 1))
        return
    with path.open(encoding="utf-8") as lines:
        for i, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {i} is not JSON: {error}") from error
            yield f"{path.name}, line {i}", row


def require_fields(row: Any, fields: Sequence[str], place: str) -> None:
    """Raises ValueError where a row is no object or lacks a field, naming both."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}")
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"{place} lacks the field {', '.join(missing)}; it has {', '.join(row)}")


def require_known(suite: Suite, task: str, group: str | None = None) -> None:
    """Raises ValueError where a suite has no such task, or the task no such group, listing those it has."""
    if task not in suite.tasks:
        raise ValueError(f"{suite.name} has no task {task!r}; it has {', '.join(suite.tasks)}")
    if group is not None and group not in suite.groups(task):
        raise ValueError(f"task {task} of {suite.name} has no group {group!r}; it has {', '.join(suite.groups(task))}")


_ONLY = "Only give me the answer and do not output any other words."
_HOPS = (
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given passages.\n{{context}}\n\n"
    f"Answer the question based on the given passages. {_ONLY}\n\nQuestion: {{input}}\nAnswer:"
)
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_EXAMPLES = "The following are some examples.\n\n{context}\n\n{input}"
_CODE = "Please complete the code given below. \n{context}"
FORMS = {
    "narrativeqa": Form(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}Story: {{context}}\n\nNow, answer the question based on the story {_STORY}"
        "Question: {input}\n\nAnswer:",
        128,
        metrics.qa_f1,
    ),
    "qasper": Form(
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}Article: {{context}}\n\n "
        f"Answer the question based on the above article {_ARTICLE}Question: {{input}}\n\nAnswer:",
        128,
        metrics.qa_f1,
    ),
    "multifieldqa_en": Form(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        metrics.qa_f1,
    ),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), Form(_HOPS, 32, metrics.qa_f1)),
    "gov_report": Form(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "qmsum": Form(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        metrics.rouge_l,
    ),
    "multi_news": Form(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "trec": Form(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        metrics.classification,
    ),
    "triviaqa": Form(
        f"Answer the question based on the given passage. {_ONLY} {_EXAMPLES}", 32, metrics.first_line(metrics.qa_f1)
    ),
    "samsum": Form(
        f"Summarize the dialogue into a few short sentences. {_EXAMPLES}", 128, metrics.first_line(metrics.rouge_l)
    ),
    "passage_count": Form(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32,
        metrics.count,
    ),
    "passage_retrieval_en": Form(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        32,
        metrics.retrieval,
    ),
    "lcc": Form(_CODE + "Next line of code:\n", 64, metrics.code_similarity),
    "repobench-p": Form(_CODE + "{input}Next line of code:\n", 64, metrics.code_similarity),
    "multifieldqa_zh": Form(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64,
        metrics.qa_f1_zh,
    ),
    "dureader": Form(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        128,
        metrics.rouge_l_zh,
    ),
    "vcsum": Form(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        metrics.rouge_l_zh,
    ),
    "lsht": Form("请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", 64, metrics.classification),
    "passage_retrieval_zh": Form(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}"
        '\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        metrics.retrieval,
    ),
}
_NOT_EVEN = ("narrativeqa", "musique", "qmsum", "multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
EVEN_TASKS = tuple(f"{task}_e" for task in FORMS if task not in _NOT_EVEN)
EVEN_GROUPS, EVEN_ENDS = ("0-4k", "4-8k", "8k+"), (4000, 8000)


@dataclass(frozen=True)
class LongBench(Suite):
    """The 21 tasks of LongBench and the 13 of LongBench-E, named `<task>_e`.

    Templates, answer lengths and scoring are the original's, but: Chinese is split by character (see metrics.py); of
    two classes in a row whose names are parts of the right one's, the original drops only the first; it ends samsum's
    answers with the line, here only the scoring does. The original asks trec, triviaqa, samsum, lsht, lcc and
    repobench-p without the model's chat template.

    Fields:
        data: directory of `<task>.jsonl`, exported from the dataset THUDM/LongBench.
    """

    name: ClassVar[str] = "longbench"
    source: ClassVar[str] = "arXiv:2308.14508, github.com/THUDM/LongBench (LongBench/)"
    tasks: ClassVar[tuple[str, ...]] = (*FORMS, *EVEN_TASKS)

    data: Path

    def groups(self, task: str) -> tuple[str, ...]:
        """Of LongBench-E its ranges of `length`, words or, in Chinese, characters."""
        require_known(self, task)
        return EVEN_GROUPS if task in EVEN_TASKS else ("",)

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        require_known(self, task, group)
        form = FORMS[task.removesuffix("_e")]
        fields = ["input", "context", "answers"]
        fields += ["length"] if group else []
        fields += ["all_classes"] if form.metric is metrics.classification else []
        rows = read_rows(self.data, task, "THUDM/LongBench", fields)
        wanted = (row for _, row in rows if not group or EVEN_GROUPS[bisect(EVEN_ENDS, row["length"])] == group)
        return [_with_classes(form, row).question(task, group, row["answers"], row) for row in islice(wanted, count)]


def _with_classes(form: Form, row: dict[str, Any]) -> Form:
    if form.metric is not metrics.classification:
        return form
    return replace(form, metric=metrics.first_line(partial(form.metric, classes=tuple(row["all_classes"]))))


CHOICE_FORM = Form(
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\nWhat is the "
    "correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n"
    '(D) {choice_D}\n\nFormat your response as follows: "The correct answer is (insert answer here)".',
    128,
    metrics.stated_letter,
)
CHOICE_FIELDS = ("question", "choice_A", "choice_B", "choice_C", "choice_D")
ABOUT = ("domain", "sub_domain", "difficulty")


@dataclass(frozen=True)
class LongBenchV2(Suite):
    """LongBench v2: multiple choice over contexts of 8 thousand to 2 million words, asked without examples.

    An answer that does not say "The correct answer is (B)" scores 0, as in the original. A question's `meta` has its
    domain, sub_domain and difficulty.

    Fields:
        data: directory of data.json (a list) or data.jsonl, exported from the dataset THUDM/LongBench-v2.
    """

    name: ClassVar[str] = "longbench_v2"
    source: ClassVar[str] = "arXiv:2412.15204, github.com/THUDM/LongBench"
    tasks: ClassVar[tuple[str, ...]] = ("choice",)

    data: Path

    def groups(self, task: str) -> tuple[str, ...]:
        """Lengths of the context in words: under 32 thousand, under 128 thousand, more."""
        require_known(self, task)
        return ("short", "medium", "long")

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        require_known(self, task, group)
        fields = (*ABOUT, "length", *CHOICE_FIELDS, "answer", "context")
        rows = read_rows(self.data, "data", "THUDM/LongBench-v2", fields)
        wanted = (row for _, row in rows if row["length"] == group)
        return [_choice_question(task, group, row) for row in islice(wanted, count)]


def _choice_question(task: str, group: str, row: dict[str, Any]) -> Question:
    fields = {name: row[name].strip() for name in ("context", *CHOICE_FIELDS)}
    question = CHOICE_FORM.question(task, group, row["answer"], fields)
    return replace(question, meta={name: row[name] for name in ABOUT})
