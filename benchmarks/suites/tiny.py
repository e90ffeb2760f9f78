"""The built-in suite: questions in the tiny model's own language."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.suites.base import Question, Suite, Turn
from benchmarks.tiny_model.language import END, TASKS, WORDS, make_example

MAX_ANSWER_TOKENS = 20
_ASK = " ? "  # where the question begins; stands nowhere else in a prompt


@dataclass(frozen=True)
class TinySuite(Suite):
    """Needles in filler: one (niah), among distractors (mk), two at once (mq), one said twice (mv), behind another
    name (vt), and four questions in turn (mt). The answer must be exactly right and must end.

    Fields:
        lengths: prompt tokens up to the first answer.
    """

    lengths: tuple[int, ...]
    name: ClassVar[str] = "tiny"
    source: ClassVar[str] = "benchmarks/tiny_model/README.md"
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)

    def groups(self, task: str) -> tuple[str, ...]:
        return tuple(map(str, self.lengths))

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        for seed in range(count):
            example = make_example(task, int(group), seed)
            context, question = example.prompt.split(_ASK)
            words, key = context.split(), question.split()[:2]
            places = [i for i in range(len(words)) if words[i : i + 2] == key]
            turns = [Turn(_ASK + question, (example.answer,))]
            # A follow-up's text begins with the mark that ends the answer before it: here that is the separator.
            turns += [Turn(_ASK + text.partition("? ")[2], (answer,)) for text, answer in example.follow_ups]
            yield Question(
                task=task,
                group=group,
                context=context,
                turns=tuple(turns),
                metric=same_words,
                max_new_tokens=MAX_ANSWER_TOKENS,
                needs_end=True,
                separator=f" {WORDS[END]}",
                meta={"depth": places[0] / len(words)} if task in ("niah", "mk") else {},
            )


def same_words(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is word for word an accepted one."""
    return float(any(answer.split() == text.split() for text in accepted))
