"""Needle in a haystack: one fact at every depth of every length."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.suites.base import Question, Suite, Turn
from benchmarks.suites.ruler import string_match_part
from benchmarks.suites.ruler_tasks import Draft, Tokenizer, random_item, read_essays, split_sentences

MAX_NEW_TOKENS = 32
CITIES = (
    "Accra",
    "Bogota",
    "Cardiff",
    "Dakar",
    "Edmonton",
    "Freetown",
    "Geneva",
    "Hanoi",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lisbon",
    "Montevideo",
    "Nairobi",
    "Oslo",
    "Prague",
)
WHO = ("The baker", "A neighbour", "The old captain", "Her cousin", "The librarian", "A young farmer", "The postman")
DID = ("repaired", "painted", "described", "carried home", "sold", "forgot about", "polished", "drew a plan of")
WHAT = ("a wooden chair", "the garden gate", "two lanterns", "a blue kettle", "the church bell", "an old map")
WHEN = ("before the rain came", "after supper", "on market day", "in early spring", "while the others slept")

Sentences = Callable[[int], list[str]]  # the first so many sentences of the haystack


@dataclass(frozen=True)
class NeedleGrid(Suite):
    """A sentence that says a city's number stands at a depth of a text; the number is asked for.

    Source: Kamradt, gkamradt/LLMTest_NeedleInAHaystack (2023): needle at the last end of a sentence before the depth,
    the request to add nothing. We differ: each needle is a new number, so that an exact match decides instead of a
    judging model; the text is cut after a sentence; depth is counted in characters, not tokens.

    Fields:
        tokenizer: counts the prompt's tokens, the special ones it adds included.
        lengths: tokens of a prompt and its longest answer.
        data: directory with essays.txt, repeated where they end; without one the text is made of our own sentences.
        seed: a question is a function of seed, length and index.
        depths: shares of the text before the needle, in [0, 1]; one after the other by the question's index, and in
            `meta` as "depth", beside "length".
    """

    name: ClassVar[str] = "needle"
    source: ClassVar[str] = "gkamradt/LLMTest_NeedleInAHaystack"
    tasks: ClassVar[tuple[str, ...]] = ("needle",)

    tokenizer: Tokenizer
    lengths: tuple[int, ...]
    data: Path | None = None
    seed: int = 0
    depths: tuple[float, ...] = tuple(i / 10 for i in range(11))

    def groups(self, task: str) -> tuple[str, ...]:
        if task not in self.tasks:
            raise ValueError(f"task must be needle, not {task!r}")
        return tuple(map(str, self.lengths))

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        if group not in self.groups(task):
            raise ValueError(f"group must be one of {', '.join(self.groups(task))}, not {group!r}")
        sentences = self._sentences()
        return (self._question(sentences, int(group), index) for index in range(count))

    def _sentences(self) -> Sentences:
        if self.data is None:
            return lambda count: list(itertools.islice(_filler(random.Random(f"{self.seed} filler")), count))
        essays = split_sentences(read_essays(self.data))
        return lambda count: list(itertools.islice(itertools.cycle(essays), count))

    def _question(self, sentences: Sentences, length: int, index: int) -> Question:
        depth = self.depths[index % len(self.depths)]
        rng = random.Random(f"{self.seed} needle {length} {index}")
        city, number = rng.choice(CITIES), random_item(rng, "number")
        turn = Turn(
            f"\n\nWhat is the special number of {city}? "
            "Don't give information outside the document or repeat your findings.",
            (number,),
            f" The special number of {city} is",
        )
        needle = f"The special number of {city} is {number}."
        draft = Draft(turn, lambda units: _place(sentences(units), needle, depth), least=1)
        context = draft.fill(self.tokenizer, length - MAX_NEW_TOKENS)
        meta = {"depth": depth, "length": length}
        return Question("needle", str(length), context, (turn,), string_match_part, MAX_NEW_TOKENS, meta=meta)


def _place(sentences: list[str], needle: str, depth: float) -> str:
    """The sentences, the needle at the last boundary with at most a share `depth` of the characters before it."""
    before = list(itertools.accumulate((len(sentence) + 1 for sentence in sentences), initial=0))
    place = bisect_right(before, depth * before[-1]) - 1
    return " ".join([*sentences[:place], needle, *sentences[place:]])


def _filler(rng: random.Random) -> Iterator[str]:
    """Plain sentences without cities or numbers."""
    while True:
        yield f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHEN)}."
