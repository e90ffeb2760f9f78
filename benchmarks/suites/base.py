"""What a quality suite is: questions about contexts, and how an answer is scored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Metric = Callable[[str, Sequence[str]], float]  # (answer given, answers accepted) -> score in [0, 1]


class SuiteDataError(FileNotFoundError):
    """A suite's data is not where it must be; the message says which file goes where."""


@dataclass(frozen=True)
class Turn:
    """One question about a context.

    Fields:
        question: text that follows the context (or the answer before it), as the model must see it.
        answers: accepted answers; the first one stands in the history when a later turn is asked.
        answer_prefix: text the answer starts with, part of the prompt ("Answer:"); chat templates put it after the
            assistant's mark.
    """

    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""


@dataclass(frozen=True)
class Question:
    """A context and the turns asked about it; each turn is one request.

    Fields:
        task: name of the suite's task, one column of the table.
        group: what else the column is split by, such as the prompt's length in tokens; "" for nothing.
        context: text that may be compressed before the first question is known.
        turns: at least one.
        metric: how an answer is scored.
        max_new_tokens: longest answer.
        needs_end: an answer that was cut off scores 0.
        separator: text between an answer and the next turn's question.
        meta: what only the suite's own report reads, such as a needle's depth in [0, 1].
    """

    task: str
    group: str
    context: str
    turns: tuple[Turn, ...]
    metric: Metric
    max_new_tokens: int
    needs_end: bool = False
    separator: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Suite(ABC):
    """A source of questions.

    Class fields:
        name: word on the command line.
        source: where its definition stands: paper or repository.
        tasks: names of all its tasks, those asked by default first.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]

    @abstractmethod
    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        """The first `count` questions of a task; the same arguments give the same questions.

        Args:
            task: one of `tasks`.
            group: one of `groups(task)`.
            count: how many; fewer come where the data has fewer.

        Raises:
            ValueError: unknown task or group.
            SuiteDataError: the data is missing.
        """

    @abstractmethod
    def groups(self, task: str) -> tuple[str, ...]:
        """Columns of a task, such as its prompt lengths; ("",) where it has one."""
