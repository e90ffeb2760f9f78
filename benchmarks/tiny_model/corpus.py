"""Training text of the tiny model: rounds of stated facts, each followed by questions about all of them."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.tiny_model.language import (
    BOS,
    END,
    FIRST_FILLER,
    Fact,
    Ids,
    key_source,
    pair_question,
    random_value,
    spread,
)

SECOND_SHARE, ALIAS_SHARE, PAIR_SHARE = 0.15, 0.3, 0.25
MAX_ROUNDS = 4
MIN_QUESTION_TOKENS = 16


def make_batch(rng: random.Random, num_sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Training sequences and which of their tokens are answers.

    Returns:
        ids: [num_sequences, length + 1], int64; inputs are all but the last token, targets all but the first.
        is_answer: the same shape, bool.
    """
    pairs = [_sequence(rng, length + 1) for _ in range(num_sequences)]
    return torch.tensor([ids for ids, _ in pairs]), torch.tensor([mask for _, mask in pairs])


def is_filler(ids: Tensor) -> Tensor:
    """Which ids are filler words, bool of the same shape."""
    return ids >= FIRST_FILLER


def _sequence(rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
    """One sequence: 1 to 4 rounds of equal length; questions ask about all facts of the rounds so far."""
    ids, is_answer = [BOS], [False]
    next_key, facts = key_source(rng), []
    filler_share = _filler_share(rng)
    num_rounds = rng.randint(1, MAX_ROUNDS)
    for i_round in range(num_rounds):
        end = length * (i_round + 1) // num_rounds
        room = (end - len(ids)) * (1 - filler_share)
        statements: list[Ids] = []
        target = room * rng.uniform(0.3, 0.6)
        while not statements or sum(map(len, statements)) < target:
            fact = _fact(rng, next_key)
            facts.append(fact)
            statements += fact.statements()
        free = end - len(ids) - sum(map(len, statements)) - MIN_QUESTION_TOKENS
        said = spread(rng, statements, max(0, min(free, int((end - len(ids)) * filler_share))))
        ids += said
        is_answer += [False] * len(said)
        while len(ids) < end:
            for question, answer in _questions(rng, facts):
                ids += [*question, *answer, END]
                is_answer += [False] * len(question) + [True] * (len(answer) + 1)
                if len(ids) >= end:
                    break
    return ids[:length], is_answer[:length]


def _filler_share(rng: random.Random) -> float:
    """None in a quarter of the sequences, nearly all in another, anything in the rest."""
    kind = rng.random()
    if kind < 0.25:
        return 0.0
    return rng.random() if kind < 0.75 else rng.uniform(0.90, 0.99)


def _fact(rng: random.Random, next_key: Callable[[], Ids]) -> Fact:
    kind = rng.random()
    if kind < SECOND_SHARE:
        return Fact(next_key(), random_value(rng), second=random_value(rng))
    if kind < SECOND_SHARE + ALIAS_SHARE:
        return Fact(next_key(), random_value(rng), alias=next_key())
    return Fact(next_key(), random_value(rng))


def _questions(rng: random.Random, facts: list[Fact]) -> list[tuple[Ids, Ids]]:
    """One question about each fact, in random order; some about two plain facts."""
    plain = [fact for fact in facts if not fact.second and not fact.alias]
    asked = []
    for fact in rng.sample(facts, len(facts)):
        if len(plain) > 1 and rng.random() < PAIR_SHARE:
            asked.append(pair_question(*rng.sample(plain, 2)))
        else:
            asked.append(fact.question())
    return asked
