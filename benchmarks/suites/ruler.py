"""RULER: thirteen tasks that grow to any length, generated for the tokenizer at hand."""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.suites.base import Metric, Question, Suite, Turn
from benchmarks.suites.ruler_tasks import (
    CommonWords,
    Draft,
    FrequentWords,
    Needles,
    Rngs,
    Task,
    Tokenizer,
    VariableTracking,
    data_file,
)

DOCUMENTS_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


def string_match_all(answer: str, required: Sequence[str]) -> float:
    """Share of the required strings that stand in the answer, in upper or lower case."""
    return sum(string.lower() in answer.lower() for string in required) / len(required)


def string_match_part(answer: str, accepted: Sequence[str]) -> float:
    """1 if one of the accepted strings stands in the answer, in upper or lower case; else 0."""
    return float(any(string.lower() in answer.lower() for string in accepted))


@dataclass(frozen=True)
class Pair:
    """A question about documents, which are indices into the data set's.

    Fields:
        own: documents the answer stands in, always shown.
        near: documents shown before any other.
    """

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents(Task):
    """A question about one or two of many documents; one whose own documents do not fit is passed over.

    Fields:
        read: pairs and documents of a data directory.
    """

    max_new_tokens = 32
    read: Callable[[Path | None], tuple[list[Pair], list[str]]]

    def drafts(self, rngs: Rngs, length: int, data: Path | None, tokenizer: Tokenizer) -> Iterator[Draft]:
        pairs, documents = self.read(data)
        limit = length - self.max_new_tokens
        drafts = (self._draft(rng, pair, documents) for pair, rng in zip(pairs, rngs, strict=False))
        return (draft for draft in drafts if len(tokenizer.encode(draft.prompt(draft.least))) <= limit)

    def _draft(self, rng: random.Random, pair: Pair, documents: list[str]) -> Draft:
        known = {*pair.own, *pair.near}
        rest = [i for i in range(len(documents)) if i not in known]
        order = [*pair.own, *rng.sample(pair.near, len(pair.near)), *rng.sample(rest, len(rest))]
        seed = rng.getrandbits(64)

        def context(units: int) -> str:
            shown = random.Random(seed).sample(order[:units], units)
            text = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(shown, 1))
            return f"{DOCUMENTS_TASK}\n\nThe following are given documents.\n\n{text}"

        turn = Turn(f"\n\n{DOCUMENTS_TASK}\n\nQuestion: {pair.question}", pair.answers, " Answer:")
        return Draft(turn, context, least=len(pair.own), most=len(documents))


def read_squad(data: Path | None) -> tuple[list[Pair], list[str]]:
    """Pairs and paragraphs of SQuAD 2.0; unanswerable questions are left out."""
    content = "the dev set of SQuAD 2.0 (dev-v2.0.json): data > paragraphs > context, qas"
    articles = json.loads(data_file(data, ("squad.json",), content).read_text(encoding="utf-8"))["data"]
    contexts = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in articles]
    documents = sorted(set(itertools.chain.from_iterable(contexts)))
    index = {document: i for i, document in enumerate(documents)}
    pairs = []
    for article, of_article in zip(articles, contexts, strict=True):
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            near = tuple(i for i in dict.fromkeys(index[document] for document in of_article) if i != own)
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    pairs.append(Pair(asked["question"], answers, (own,), near))
    return pairs, documents


def read_hotpotqa(data: Path | None) -> tuple[list[Pair], list[str]]:
    """Pairs and paragraphs of HotpotQA; all paragraphs that come with a question are its own."""
    content = (
        "the dev set of HotpotQA, distractor setting (hotpot_dev_distractor_v1.json): "
        "a list of question, answer, context = [[title, sentences], ...]"
    )
    asked = json.loads(data_file(data, ("hotpotqa.json",), content).read_text(encoding="utf-8"))
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in asked]
    documents = sorted(set(itertools.chain.from_iterable(contexts)))
    index = {document: i for i, document in enumerate(documents)}
    pairs = [
        Pair(entry["question"], (entry["answer"],), tuple(dict.fromkeys(index[document] for document in context)))
        for entry, context in zip(asked, contexts, strict=True)
    ]
    return pairs, documents


TASKS: dict[str, tuple[Task, Metric]] = {
    "niah_single_1": (Needles("noise"), string_match_all),
    "niah_single_2": (Needles("essay"), string_match_all),
    "niah_single_3": (Needles("essay", value="uuid"), string_match_all),
    "niah_multikey_1": (Needles("essay", num_keys=4), string_match_all),
    "niah_multikey_2": (Needles("needle"), string_match_all),
    "niah_multikey_3": (Needles("needle", key="uuid", value="uuid"), string_match_all),
    "niah_multivalue": (Needles("essay", num_values=4), string_match_all),
    "niah_multiquery": (Needles("essay", num_keys=4, num_queries=4), string_match_all),
    "vt": (VariableTracking(), string_match_all),
    "cwe": (CommonWords(), string_match_all),
    "fwe": (FrequentWords(), string_match_all),
    "qa_1": (Documents(read_squad), string_match_part),
    "qa_2": (Documents(read_hotpotqa), string_match_part),
}


@dataclass(frozen=True)
class Ruler(Suite):
    """RULER's tasks with its published parameters, templates and metrics.

    A prompt is context, question and answer prefix, one after the other. It and the longest answer have at most as
    many tokens as the group says, and no unit of haystack more would fit; a chat template's own tokens are not
    counted. `Turn.answers` holds all required strings except in qa_1 and qa_2, where each is accepted alone.

    Source: NVIDIA/RULER, scripts/synthetic.yaml, scripts/data/synthetic/ and scripts/eval/synthetic/constants.py;
    Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (2024). We differ:
        - Words are three random syllables, not English: no word list is needed, every length has enough distinct
          ones, and none is part of another. A word has more tokens, so a length holds fewer words; the task is the
          same.
        - The haystack's size is found for each question, not once for a task, and in single units, not steps.
        - Essays are cut into sentences after . ! ? and white space, not by a trained model; they start again where
          they end.
        - fwe's prompt leaves room for its answer, which RULER's does not.
        - Names within a variable-tracking chain differ from each other.

    Fields:
        tokenizer: counts the prompt's tokens, the special ones it adds included.
        lengths: tokens of a prompt and its longest answer.
        data: directory with essays.txt (niah_single_2 and _3, niah_multikey_1, niah_multivalue, niah_multiquery),
            squad.json (qa_1) and hotpotqa.json (qa_2); the other tasks need none.
        seed: a question is a function of seed, task, length and index.
    """

    name: ClassVar[str] = "ruler"
    source: ClassVar[str] = "NVIDIA/RULER"
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)

    tokenizer: Tokenizer
    lengths: tuple[int, ...]
    data: Path | None = None
    seed: int = 0

    def groups(self, task: str) -> tuple[str, ...]:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        return tuple(map(str, self.lengths))

    def questions(self, task: str, group: str, count: int) -> Iterable[Question]:
        if group not in self.groups(task):
            raise ValueError(f"group must be one of {', '.join(self.groups(task))}, not {group!r}")
        rngs = (random.Random(f"{self.seed} {task} {group} {index}") for index in itertools.count())
        drafts = TASKS[task][0].drafts(rngs, int(group), self.data, self.tokenizer)
        return self._filled(task, group, itertools.islice(drafts, count))

    def _filled(self, task: str, group: str, drafts: Iterator[Draft]) -> Iterator[Question]:
        kind, metric = TASKS[task]
        for draft in drafts:
            context = draft.fill(self.tokenizer, int(group) - kind.max_new_tokens)
            yield Question(task, group, context, (draft.turn,), metric, kind.max_new_tokens)
