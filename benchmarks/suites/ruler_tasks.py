"""RULER's generated tasks: what each question is made of, and the haystack it grows by.

A question comes as a `Draft`, whose context is a function of the haystack's size in units; `Draft.fill` chooses the
largest size that fits. The units are RULER's:

| kind | unit | haystack |
|---|---|---|
| `Needles` | word, line, or needle | essays cut after a word; five short sentences a line; other needles |
| `VariableTracking` | line | the same five sentences |
| `CommonWords` | distinct word | rare words, each listed three times (once where the prompt is short) |
| `FrequentWords` | word drawn | coded words whose frequencies follow a zeta distribution |
"""

import itertools
import json
import math
import random
import re
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from benchmarks.suites.base import SuiteDataError, Turn

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences before a needle

SYLLABLES = [consonant + vowel for consonant in "bdklmnprstvz" for vowel in "aeiou"]
NUM_WORDS = len(SYLLABLES) ** 3

NUM_HOPS = 4
VARIABLE_LETTERS, EXAMPLE_VARIABLE_LETTERS = 5, 3
EXAMPLE_TOKENS = 500  # length of the solved variable-tracking example

NUM_COMMON = 10
LONG_LENGTH = 4096  # from here on common words are repeated as published, below it less

CODE_LETTERS = 6
TOKENS_PER_CODE = 50  # one distinct coded word in so many tokens
MIN_CODES = 5
MIN_DRAWN = 74  # from here on the frequencies of ranks 2 to 5 differ
ZETA_2 = math.pi**2 / 6

ItemKind = Literal["word", "number", "uuid"]
Rngs = Iterator[random.Random]


class Tokenizer(Protocol):
    """What is asked of a tokenizer, such as one of transformers."""

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the server adds too."""


@dataclass(frozen=True)
class Draft:
    """A question whose haystack has no size yet.

    Fields:
        turn: the question; it does not depend on the haystack's size.
        context: text with so many units of haystack; the same number gives the same text.
        least: fewest units.
        most: units there are.
    """

    turn: Turn
    context: Callable[[int], str]
    least: int
    most: float = math.inf

    def prompt(self, units: int) -> str:
        return self.context(units) + self.turn.question + self.turn.answer_prefix

    def fill(self, tokenizer: Tokenizer, limit: int) -> str:
        """The context that makes the fullest prompt of at most `limit` tokens.

        Raises:
            ValueError: the smallest prompt is longer.
        """

        def count(units: int) -> int:
            return len(tokenizer.encode(self.prompt(units)))

        units = largest_fill(count, limit, self.least, self.most)
        if units is None:
            raise ValueError(f"the prompt must have at most {limit} tokens, but its smallest has {count(self.least)}")
        return self.context(units)


class Task(ABC):
    """A kind of task with its parameters.

    Class fields:
        max_new_tokens: longest answer.
    """

    max_new_tokens: ClassVar[int]

    @abstractmethod
    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        """The questions in order: one for each generator, fewer where the data ends.

        Args:
            length: tokens of a prompt and its answer.
            data: directory of the data files; only tasks that need one look at it.

        Raises:
            SuiteDataError: a file is missing; raised by this call, before the first question is asked for.
        """


@dataclass(frozen=True)
class Needles(Task):
    """Keys with values stand in a haystack; the values of some keys are asked for.

    Fields:
        haystack: "noise", "essay", or "needle" for keys and values nobody asks for.
        key: what a key is; a "word" is two words with a hyphen.
        value: what a value is.
        num_keys: keys that could be asked for.
        num_values: values of each.
        num_queries: keys asked for.
    """

    max_new_tokens = 128
    haystack: Literal["noise", "essay", "needle"]
    key: ItemKind = "word"
    value: ItemKind = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        essay = read_essays(data).split() if self.haystack == "essay" else []
        return (self._draft(rng, essay) for rng in rngs)

    def _draft(self, rng: random.Random, essay: list[str]) -> Draft:
        keys = [random_item(rng, self.key) for _ in range(self.num_keys)]
        values = [[random_item(rng, self.value) for _ in range(self.num_values)] for _ in keys]
        needles = [self._needle(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        rng.shuffle(needles)
        answers = tuple(value for of_key in values[: self.num_queries] for value in of_key)
        *others, last = keys[: self.num_queries]
        query = f"{', '.join(others)}, and {last}" if others else last
        many = len(answers) > 1
        noun, some, are, are_all = (
            (f"{self.value}s", "Some", "are", "are all") if many else (self.value, "A", "is", "is")
        )
        task = (
            f"{some} special magic {noun} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {noun} afterwards.\n"
        )
        turn = Turn(
            f"\nWhat {are_all} the special magic {noun} for {query} mentioned in the provided text?",
            answers,
            f" The special magic {noun} for {query} mentioned in the provided text {are}",
        )
        seed = rng.getrandbits(64)

        def context(units: int) -> str:
            places = random.Random(seed)
            if self.haystack == "essay":
                return task + _among_sentences(places, needles, itertools.islice(itertools.cycle(essay), units))
            return task + _among_lines(places, needles, self._lines(places, units))

        return Draft(turn, context, least=len(needles))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _lines(self, rng: random.Random, units: int) -> list[str]:
        if self.haystack == "noise":
            return [NOISE] * units
        return [self._needle(random_item(rng, self.key), random_item(rng, self.value)) for _ in range(units)]


class VariableTracking(Task):
    """One variable is assigned a number and `NUM_HOPS` others the one before; all of them are asked for.

    A solved example with shorter names and about `EXAMPLE_TOKENS` tokens stands in front.
    """

    max_new_tokens = 30

    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        return (self._draft(rng, tokenizer) for rng in rngs)

    def _draft(self, rng: random.Random, tokenizer: Tokenizer) -> Draft:
        example = self._chain(rng, EXAMPLE_VARIABLE_LETTERS)
        size = largest_fill(lambda units: len(tokenizer.encode(example.prompt(units))), EXAMPLE_TOKENS, example.least)
        names = " ".join(example.turn.answers)
        solved = f"{example.prompt(example.least if size is None else size)} {names}\n\n"
        chain = self._chain(rng, VARIABLE_LETTERS)
        return Draft(chain.turn, lambda units: solved + chain.context(units), chain.least)

    def _chain(self, rng: random.Random, letters: int) -> Draft:
        names = tuple(itertools.islice(_distinct_names(rng, string.ascii_uppercase, letters), NUM_HOPS + 1))
        value = str(rng.randrange(10_000, 99_999))
        hops = [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        statements = [f"VAR {names[0]} = {value}", *hops]
        turn = Turn(
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            names,
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assgined the value {value}, they are: ",  # spelt as in RULER
        )
        task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        seed = rng.getrandbits(64)

        def context(units: int) -> str:
            return task + _among_lines(random.Random(seed), statements, [NOISE] * units)

        return Draft(turn, context, least=len(statements))


class CommonWords(Task):
    """A numbered list repeats `NUM_COMMON` words more often than all others; they are asked for.

    A solved example with a short list stands in front.
    """

    max_new_tokens = 120

    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        return (self._draft(rng, is_long=length >= LONG_LENGTH) for rng in rngs)

    def _draft(self, rng: random.Random, *, is_long: bool) -> Draft:
        example_words, *example_repeats = (40, 10, 3) if is_long else (20, 3, 1)
        repeats = (30, 3) if is_long else (6, 1)
        example = self._list(rng, *example_repeats)
        solved = f"{example.prompt(example_words)} {_numbered(example.turn.answers)}\n"
        words = self._list(rng, *repeats)
        return Draft(words.turn, lambda units: solved + words.context(units), words.least, words.most)

    def _list(self, rng: random.Random, common_repeats: int, rare_repeats: int) -> Draft:
        seed = rng.getrandbits(64)

        def words(units: int) -> list[str]:
            return list(itertools.islice(distinct_words(random.Random(seed)), units))

        def context(units: int) -> str:
            chosen = words(units)
            listed = chosen[:NUM_COMMON] * common_repeats + chosen[NUM_COMMON:] * rare_repeats
            random.Random(seed).shuffle(listed)
            return (
                "Below is a numbered list of words. In these words, some appear more often than others. "
                f"Memorize the ones that appear most often.\n{_numbered(listed)}"
            )

        turn = Turn(
            "\nQuestion: What are the 10 most common words in the above list?",
            tuple(words(NUM_COMMON)),
            " Answer: The top 10 words that appear most often in the list are:",
        )
        return Draft(turn, context, least=NUM_COMMON + 1, most=NUM_WORDS)


class FrequentWords(Task):
    """Coded words whose frequencies fall with the square of their rank: ranks 2 to 4 are asked for, rank 1 is dots."""

    max_new_tokens = 50

    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        return (self._draft(rng, max(MIN_CODES, length // TOKENS_PER_CODE)) for rng in rngs)

    def _draft(self, rng: random.Random, num_codes: int) -> Draft:
        codes = list(itertools.islice(_distinct_names(rng, string.ascii_lowercase, CODE_LETTERS), num_codes))
        codes[0] = "..."
        seed = rng.getrandbits(64)

        def context(units: int) -> str:
            words = [code for k, code in enumerate(codes, 1) for _ in range(int(units * k**-2 / ZETA_2))]
            random.Random(seed).shuffle(words)
            return (
                "Read the following coded text and track the frequency of each coded word. "
                f"Find the three most frequently appeared coded words. {' '.join(words)}"
            )

        turn = Turn(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            tuple(codes[1:4]),
            " Answer: According to the coded text above, the three most frequently appeared words are:",
        )
        return Draft(turn, context, least=MIN_DRAWN)


def largest_fill(count: Callable[[int], int], limit: int, least: int, most: float = math.inf) -> int | None:
    """Units n with count(n) <= limit < count(n + 1), or `most` where that fits; None where `least` does not.

    Doubles until the limit is passed, then searches the interval, split not in the middle but where a straight line
    between its ends crosses the limit: tokens are nearly linear in units, so few texts are encoded.
    """
    low, low_tokens = least, count(least)
    if low_tokens > limit:
        return None
    while low < most:
        high = int(min(2 * low + 1, most))
        high_tokens = count(high)
        if high_tokens > limit:
            break
        low, low_tokens = high, high_tokens
    else:
        return low
    while high - low > 1:
        share = (limit - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        tokens = count(middle)
        if tokens <= limit:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low


def distinct_words(rng: random.Random) -> Iterator[str]:
    """Pronounceable words of three syllables, none twice; at most `NUM_WORDS` may be taken."""
    return _distinct_names(rng, SYLLABLES, 3)


def random_item(rng: random.Random, kind: ItemKind) -> str:
    """A key or value: two words with a hyphen, seven digits, or a UUID."""
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(itertools.islice(distinct_words(rng), 2))


def split_sentences(text: str) -> list[str]:
    """Sentences, each ending with its mark; white space between them is dropped."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def read_essays(data: Path | None) -> str:
    """The essays' text, on one line."""
    path = data_file(
        data,
        ("essays.txt", "essays.json"),
        "the essays as plain text, or as JSON {\"text\": ...}; Paul Graham's essays are what RULER's script "
        "download_paulgraham_essay.py collects (as PaulGrahamEssays.json)",
    )
    text = path.read_text(encoding="utf-8")
    words = (json.loads(text)["text"] if path.suffix == ".json" else text).split()
    if not words:
        raise SuiteDataError(f"{path} must hold the essays, but it has no words")
    return " ".join(words)


def data_file(data: Path | None, names: tuple[str, ...], content: str) -> Path:
    """The first of the files that is in the directory; `content` tells in the error what it holds."""
    file = " or ".join(names)
    if data is None:
        raise SuiteDataError(f"no data directory is given; it must hold {file}: {content}")
    for name in names:
        if (data / name).is_file():
            return data / name
    raise SuiteDataError(f"{data} must hold {file}: {content}")


def _distinct_names(rng: random.Random, parts: str | list[str], count: int) -> Iterator[str]:
    """Names of `count` random parts, none twice; never VAR, the mark of an assignment."""
    used = {"VAR"}
    while True:
        name = "".join(rng.choices(parts, k=count))
        if name not in used:
            used.add(name)
            yield name


def _numbered(words: list[str] | tuple[str, ...]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _among_lines(rng: random.Random, needles: list[str], lines: list[str]) -> str:
    """The needles, in order, in front of different lines."""
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    for inserted, (place, needle) in enumerate(zip(places, needles, strict=True)):
        lines.insert(place + inserted, needle)
    return "\n".join(lines)


def _among_sentences(rng: random.Random, needles: list[str], words: Iterator[str]) -> str:
    """The needles, in order, between sentences at different ones of `DEPTHS`."""
    sentences = split_sentences(" ".join(words))
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
    for inserted, (place, needle) in enumerate(zip(places, needles, strict=True)):
        sentences.insert(place + inserted, needle)
    return " ".join(sentences)
