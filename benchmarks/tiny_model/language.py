"""The tiny model's language: vocabulary, facts, filler, tokenizer and evaluation prompts.

A text is filler words with facts stated in between, followed by a question about one of them. Every token
is one whitespace-separated word, so token counts are word counts.

| what | text | answer |
|---|---|---|
| statement | `k1 k2 v1 v2 v3 v4 .` | |
| question | `? k1 k2` | `v1 v2 v3 v4` |
| alias | `x1 x2 = k1 k2 .`, asked as `? x1 x2` | `= k1 k2 v1 v2 v3 v4` |
| second value | `k1 k2 + w1 w2 w3 w4 .`, asked as `? * k1 k2` | `v1 .. v4 , k1 k2 + w1 .. w4` |
| pair question | `? a1 a2 , b1 b2 :` | `a1 a2 v1 .. v4 , b1 b2 w1 .. w4` |

Every answer ends with `.`, the end-of-sequence token, which answer texts here leave out as decoding does.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

Ids = tuple[int, ...]

VOCAB_SIZE = 512
NUM_KEY_HALVES, NUM_VALUES, NUM_FILLERS = 64, 100, 268
VALUE_TOKENS = 4
WORDS = (
    ["<pad>", "<s>", "<unk>", ".", "?", "=", ",", "*", ":", "+"]
    + [f"ka{i:02d}" for i in range(NUM_KEY_HALVES)]
    + [f"kb{i:02d}" for i in range(NUM_KEY_HALVES)]
    + [f"{i:02d}" for i in range(NUM_VALUES)]
    + [f"w{i:03d}" for i in range(NUM_FILLERS)]
)
PAD, BOS, UNK, END, ASK, EQUALS, COMMA, STAR, COLON, PLUS = range(10)
FIRST_KEY_A = 10
FIRST_KEY_B = FIRST_KEY_A + NUM_KEY_HALVES
FIRST_VALUE = FIRST_KEY_B + NUM_KEY_HALVES
FIRST_FILLER = FIRST_VALUE + NUM_VALUES

JUMP_PROBABILITY = 0.03
_chain_rng = random.Random(0)
SUCCESSORS = [_chain_rng.sample(range(NUM_FILLERS), 4) for _ in range(NUM_FILLERS)]

MAX_DISTRACTORS, TOKENS_PER_DISTRACTOR = 64, 32
NUM_TURNS = 4


@dataclass(frozen=True)
class Fact:
    """A key and its value; with `second` it has a second value, with `alias` another name (not both)."""

    key: Ids
    value: Ids
    second: Ids = ()
    alias: Ids = ()

    def statements(self) -> list[Ids]:
        """What a text must say for the fact to be known; the order is free."""
        said = [(*self.key, *self.value, END)]
        if self.second:
            said.append((*self.key, PLUS, *self.second, END))
        if self.alias:
            said.append((*self.alias, EQUALS, *self.key, END))
        return said

    def question(self) -> tuple[Ids, Ids]:
        """The question about everything this fact says, and its answer without the end mark."""
        if self.second:
            return (ASK, STAR, *self.key), (*self.value, COMMA, *self.key, PLUS, *self.second)
        if self.alias:
            return (ASK, *self.alias), (EQUALS, *self.key, *self.value)
        return (ASK, *self.key), self.value


@dataclass(frozen=True)
class Example:
    """One evaluation prompt: `prompt_ids` is BOS and the ids of `prompt`; `answer` has no end mark.

    Multi-turn examples go on: each follow-up is the text that comes after the previous answer (end mark
    first) and the answer expected then.
    """

    prompt: str
    prompt_ids: list[int]
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()


def pair_question(first: Fact, second: Fact) -> tuple[Ids, Ids]:
    """One question about two facts, and its answer without the end mark."""
    question = (ASK, *first.key, COMMA, *second.key, COLON)
    return question, (*first.key, *first.value, COMMA, *second.key, *second.value)


def random_value(rng: random.Random) -> Ids:
    """A value: `VALUE_TOKENS` independent value tokens."""
    return tuple(FIRST_VALUE + rng.randrange(NUM_VALUES) for _ in range(VALUE_TOKENS))


def key_source(rng: random.Random) -> Callable[[], Ids]:
    """A function that returns a new key at each call, none twice; 64 * 64 keys share 64 + 64 halves."""
    used = set()

    def next_key() -> Ids:
        code = rng.randrange(NUM_KEY_HALVES**2)
        while code in used:
            code = rng.randrange(NUM_KEY_HALVES**2)
        used.add(code)
        first, second = divmod(code, NUM_KEY_HALVES)
        return FIRST_KEY_A + first, FIRST_KEY_B + second

    return next_key


def filler(rng: random.Random, count: int) -> list[int]:
    """`count` filler tokens of a Markov chain with four successors a word and rare jumps."""
    word, ids = rng.randrange(NUM_FILLERS), []
    for _ in range(count):
        jump = rng.random() < JUMP_PROBABILITY
        word = rng.randrange(NUM_FILLERS) if jump else SUCCESSORS[word][rng.getrandbits(2)]
        ids.append(FIRST_FILLER + word)
    return ids


def spread(rng: random.Random, statements: list[Ids], num_filler: int) -> list[int]:
    """The statements in random order at random places of `num_filler` filler tokens."""
    words = filler(rng, num_filler)
    places = sorted(rng.randrange(num_filler + 1) for _ in statements)
    ids, start = [], 0
    for place, statement in zip(places, rng.sample(statements, len(statements)), strict=True):
        ids += words[start:place]
        ids += statement
        start = place
    return ids + words[start:]


def to_text(ids: Iterable[int]) -> str:
    """The words of the ids, separated by one space."""
    return " ".join(WORDS[i] for i in ids)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer; encoding puts BOS in front, `.` is the end-of-sequence token."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=".",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_example(task: str, length: int, seed: int) -> Example:
    """An evaluation prompt of exactly `length` tokens (BOS included) that ends with its question.

    Args:
        task: niah (one needle, no distractors), mk (with distractors), mq (one question about two needles),
            mv (both values of a key), vt (the value behind an alias), mt (four questions in turn).
        length: prompt tokens; must hold the statements; distractors take up to a fifth of it.
        seed: the example is a function of the three arguments alone.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    rng = random.Random(f"{task} {length} {seed}")
    next_key = key_source(rng)
    needles = TASKS[task](rng, next_key)
    turns = [pair_question(*needles)] if task == "mq" else [needle.question() for needle in needles]
    num_distractors = 0 if task == "niah" else min(MAX_DISTRACTORS, length // TOKENS_PER_DISTRACTOR)
    facts = needles + [Fact(next_key(), random_value(rng)) for _ in range(num_distractors)]
    statements = [statement for fact in facts for statement in fact.statements()]
    question, answer = turns[0]
    num_filler = length - 1 - sum(map(len, statements)) - len(question)
    if num_filler < 0:
        raise ValueError(f"a {task} prompt needs at least {length - num_filler} tokens, not {length}")
    ids = [*spread(rng, statements, num_filler), *question]
    follow_ups = tuple((to_text((END, *ask)), to_text(reply)) for ask, reply in turns[1:])
    return Example(to_text(ids), [BOS, *ids], to_text(answer), follow_ups)


def _plain(count: int) -> Callable[[random.Random, Callable[[], Ids]], list[Fact]]:
    return lambda rng, next_key: [Fact(next_key(), random_value(rng)) for _ in range(count)]


TASKS: dict[str, Callable[[random.Random, Callable[[], Ids]], list[Fact]]] = {
    "niah": _plain(1),
    "mk": _plain(1),
    "mq": _plain(2),
    "mv": lambda rng, next_key: [Fact(next_key(), random_value(rng), second=random_value(rng))],
    "vt": lambda rng, next_key: [Fact(next_key(), random_value(rng), alias=next_key())],
    "mt": _plain(NUM_TURNS),
}
