# ruff: noqa: RUF001 (the Chinese template has full-width punctuation)
"""SCBench over local copies of its data: several questions about each context."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import exp, log
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.suites import metrics
from benchmarks.suites.base import Metric, Question, Suite
from benchmarks.suites.infinitebench import by_letter, found, lettered
from benchmarks.suites.longbench import Form, read_rows, require_fields, require_known

FUNCTION_BAR = 0.8  # BLEU from which on a function counts as repeated


def repeated_function(answer: str, accepted: Sequence[str], candidates: Sequence[str]) -> float:
    """1 where, of all candidates, the accepted function is most like the answer's code, and by BLEU >= 0.8 (RepoQA).

    The answer's code is its first fenced block, else all of it. The original cuts the first function out of it with
    tree-sitter, and smooths BLEU; texts whose BLEU is 0 without smoothing stay under 0.8 with it.
    """
    block = re.search(r"^```\w*\s*\n(.*?)^```", answer.strip(), re.DOTALL | re.MULTILINE)
    code = (block[1] if block else answer).split()
    closest = max(candidates, key=lambda candidate: _bleu(code, candidate.split()))
    return float(closest == accepted[0] and _bleu(code, closest.split()) >= FUNCTION_BAR)


def _bleu(words: Sequence[str], reference: Sequence[str]) -> float:
    """exp(min(0, 1 - r / c)) * (p1 p2 p3 p4)^(1/4), p_n = clipped n-gram precision; 0 where one of them is 0."""
    log_precision = 0.0
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (words, reference))
        num_common = (ours & theirs).total()
        if num_common == 0:
            return 0.0
        log_precision += log(num_common / ours.total()) / 4
    return exp(min(0.0, 1 - len(reference) / len(words)) + log_precision)


def by_answer(answer: str, accepted: Sequence[str], metric_of: Mapping[tuple[str, ...], Metric]) -> float:
    """Score of the metric that belongs to the accepted answers: turns of one question may be of several kinds."""
    return metric_of[tuple(accepted)](answer, accepted)


_PLAIN = "{context}\n\n{input}"
FORMS = {
    "scbench_kv": Form(
        f"Extract the value corresponding to the specified key in the JSON object below.\n\n{_PLAIN}",
        150,
        metrics.substring,
    ),
    "scbench_prefix_suffix": Form(_PLAIN, 150, metrics.substring),
    "scbench_vt": Form(_PLAIN, 30, metrics.share_of_list),
    "scbench_repoqa": Form(
        "Based on the function description and code context, please retrieve and repeat the exact described function "
        f"from the code context in a code block wrapped by ```:\n\n{_PLAIN}",
        1024,
        repeated_function,
    ),
    "scbench_qa_eng": Form(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}\n"
        "Answer:",
        40,
        metrics.substring_any_case,
    ),
    "scbench_qa_chn": Form("阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：", 40, metrics.qa_f1_zh),
    "scbench_choice_eng": Form(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
        "The the correct answer is",
        40,
        metrics.choice,
    ),
    "scbench_many_shot": Form(_PLAIN, 10, metrics.substring_any_case),
    "scbench_summary": Form(_PLAIN, 200, metrics.rouge_lsum),
    "scbench_mf": Form("{first_input}\n\n{context}\n\nWhat is {sought}?\n\n{input}", 5, metrics.first_number),
    "scbench_summary_with_needles": Form(_PLAIN, 800, by_answer),
    "scbench_repoqa_and_kv": Form(_PLAIN, 1024, by_answer),
}
# Of the mixed tasks, what a turn's field `task` may be.
TURN_METRICS = {
    "scbench_summary": metrics.rouge_lsum,
    "scbench_passkey": metrics.first_integer,
    "scbench_repoqa": repeated_function,
    "scbench_kv": metrics.substring,
}
TURN_FIELDS = {
    "scbench_choice_eng": ("input", "answer", "options"),
    "scbench_summary_with_needles": ("input", "answer", "task"),
    "scbench_repoqa_and_kv": ("input", "answer", "task"),
}
WITH_FUNCTIONS = ("scbench_repoqa", "scbench_repoqa_and_kv")


@dataclass(frozen=True)
class SCBench(Suite):
    """The 12 tasks of SCBench; a question has all turns of its context.

    Templates, answer lengths and scoring are the original's (its templates for several requests on one context: the
    context does not depend on the turn asked), with these differences. scbench_many_shot and scbench_qa_chn are scored
    against the whole answer, where the original takes each of its characters for an accepted answer. The mixed tasks
    are scored turn by turn with the metric of the turn's kind, but all turns may be as long as the longest kind (the
    original: 15 tokens for a pass key, 80 for a value), and a mean over turns joins what the original reports apart.
    Functions: see `repeated_function`.

    Fields:
        data: directory of `<task>.jsonl`, exported from the dataset microsoft/SCBench.
    """

    name: ClassVar[str] = "scbench"
    source: ClassVar[str] = "arXiv:2412.10319, github.com/microsoft/MInference (scbench/)"
    tasks: ClassVar[tuple[str, ...]] = tuple(FORMS)

    data: Path

    def groups(self, task: str) -> tuple[str, ...]:
        require_known(self, task)
        return ("",)

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        require_known(self, task, group)
        fields = ("multi_turns", *(("context",) if task != "scbench_vt" else ()))
        if task not in WITH_FUNCTIONS:
            rows = read_rows(self.data, task, "microsoft/SCBench", fields)
            return [_question(task, group, place, row, ()) for place, row in islice(rows, count)]
        # Functions compete with those of all contexts of their repository.
        all_rows = list(read_rows(self.data, task, "microsoft/SCBench", (*fields, "repo")))
        functions = _functions_by_repo(task, all_rows)
        return [_question(task, group, place, row, functions[row["repo"]]) for place, row in all_rows[:count]]


def _functions_by_repo(task: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    for place, row in rows:
        found = [turn["answer"] for turn in _turns(task, row, place) if turn["task"] == "scbench_repoqa"]
        functions.setdefault(row["repo"], []).extend(found)
    return functions


def _turns(task: str, row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The row's turns, checked, each with its kind in the field `task`."""
    if not row["multi_turns"]:
        raise ValueError(f"{place} must have a turn in the field multi_turns")
    is_mixed = FORMS[task].metric is by_answer
    for i, turn in enumerate(row["multi_turns"], 1):
        require_fields(turn, TURN_FIELDS.get(task, ("input", "answer")), f"{place}, turn {i}")
        if is_mixed and turn["task"] not in TURN_METRICS:
            raise ValueError(f"{place}, turn {i}: task must be one of {', '.join(TURN_METRICS)}, got {turn['task']!r}")
    return [turn if is_mixed else {**turn, "task": task} for turn in row["multi_turns"]]


def _question(task: str, group: str, place: str, row: dict[str, Any], functions: Sequence[str]) -> Question:
    form, given = FORMS[task], _turns(task, row, place)
    turns = tuple(form.turn(_answers(task, turn, place), _fields(task, turn, place)) for turn in given)
    metric: Metric = form.metric
    if metric in (repeated_function, by_answer):
        metrics_of_kinds = {**TURN_METRICS, "scbench_repoqa": partial(repeated_function, candidates=functions)}
        metric_of = {turn.answers: metrics_of_kinds[kind["task"]] for turn, kind in zip(turns, given, strict=True)}
        metric = partial(by_answer, metric_of=metric_of)
    context = form.context({"context": _context(row, place), "first_input": given[0]["input"]})
    return Question(task, group, context, turns, metric, form.max_new_tokens)


def _context(row: dict[str, Any], place: str) -> Any:
    """The row's context, a text or scbench_mf's list of numbers; scbench_vt may have it in the field `input`."""
    field = "input" if "context" not in row and "input" in row else "context"
    require_fields(row, (field,), place)
    return row[field]


def _fields(task: str, turn: dict[str, Any], place: str) -> dict[str, str]:
    """What follows the context names these."""
    fields = {"input": turn["input"]}
    if task == "scbench_choice_eng":
        fields |= by_letter(turn["options"], place)
    elif task == "scbench_mf":
        fields["sought"] = "the " + found(r"The (.+) is", turn["input"], place).lower()
    return fields


def _answers(task: str, turn: dict[str, Any], place: str) -> Any:
    if task == "scbench_choice_eng":
        return lettered(turn["answer"], turn["options"], place)
    answer = turn["answer"]
    return ", ".join(answer) if task == "scbench_vt" and isinstance(answer, list) else answer
