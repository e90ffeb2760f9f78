"""From a question to the token ids of a request, and to how many of them are compressed before the rest is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.suites.base import Question

# What is compressed together, and what a turn after the first sees:
#   question   the whole prompt with its question, every turn afresh with all turns before it
#   context    the context alone; each turn is asked of it by itself (one context, many requests)
#   once       context and first question, once; later turns are read against what stayed of them
PROTOCOLS = ("question", "context", "once")
_MARKS = ("\ue000", "\ue001")  # private-use characters: where context and first question end


@dataclass(frozen=True)
class Prompt:
    """One request.

    Fields:
        question, turn: what it asks; turns count from 0.
        token_ids: the whole prompt.
        num_compressed: leading tokens that are compressed.
        is_truncated: the middle of the context was cut out to make it fit.
    """

    question: Question
    turn: int
    token_ids: list[int]
    num_compressed: int
    is_truncated: bool = False


@dataclass(frozen=True)
class PromptBuilder:
    """Turns questions into prompts for one model.

    Context, first question and the rest are encoded apart from each other, so that the same question has the same
    tokens under every protocol.

    Fields:
        tokenizer: of transformers.
        max_tokens: most tokens of prompt and answer together.
        chat: wrap the turns in the tokenizer's chat template.
    """

    tokenizer: Any
    max_tokens: int
    chat: bool = False

    def prompts(self, question: Question, protocol: str) -> list[Prompt]:
        """One prompt per turn; the turns before it stand in it with their right answers, but for `context`.

        Raises:
            ValueError: the question alone is longer than the model allows.
        """
        histories = [
            (turn,) if protocol == "context" else tuple(range(turn + 1)) for turn in range(len(question.turns))
        ]
        return [self._prompt(question, history, protocol) for history in histories]

    def _prompt(self, question: Question, history: Sequence[int], protocol: str) -> Prompt:
        context, first, rest = self._texts(question, history)
        context_ids = self.tokenizer.encode(context, add_special_tokens=not self.chat)
        first_ids, rest_ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in (first, rest))
        room = self.max_tokens - question.max_new_tokens - len(first_ids) - len(rest_ids)
        if room < 1:
            raise ValueError(
                f"{question.task}: a question of {len(first_ids) + len(rest_ids)} tokens and an answer of "
                f"{question.max_new_tokens} leave no room for a context in {self.max_tokens} tokens; raise "
                "--max-model-len"
            )
        is_truncated = len(context_ids) > room
        if is_truncated:
            context_ids = context_ids[: room // 2] + context_ids[len(context_ids) - (room - room // 2) :]
        num_compressed = len(context_ids)
        if protocol != "context":
            num_compressed += len(first_ids) + (len(rest_ids) if protocol == "question" else 0)
        return Prompt(question, history[-1], [*context_ids, *first_ids, *rest_ids], num_compressed, is_truncated)

    def _texts(self, question: Question, history: Sequence[int]) -> tuple[str, str, str]:
        """Text of context, first question, and everything after it up to the answer asked for."""
        turns = [question.turns[i] for i in history]
        end_of_context, end_of_question = _MARKS
        first = end_of_context + turns[0].question
        if self.chat:
            messages = [{"role": "user", "content": question.context + first}]
            for before, turn in pairwise(turns):
                messages += [
                    {
                        "role": "assistant",
                        "content": before.answer_prefix + _spaced(before.answer_prefix, before.answers),
                    },
                    {"role": "user", "content": turn.question},
                ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text += turns[-1].answer_prefix
            context, rest = text.split(end_of_context)
            asked = turns[0].question.strip()  # templates may trim what they wrap
            question_end = rest.index(asked) + len(asked)
            if len(turns) == 1:  # the assistant's mark belongs to the question
                return context, rest, ""
            return context, rest[:question_end], rest[question_end:]
        text = question.context + first + turns[0].answer_prefix + end_of_question
        for before, turn in pairwise(turns):
            text += _spaced(before.question + before.answer_prefix, before.answers)
            text += question.separator + turn.question + turn.answer_prefix
        context, rest = text.split(end_of_context)
        first, rest = rest.split(end_of_question)
        return context, first, rest


def _spaced(before: str, answers: Sequence[str]) -> str:
    """The answer that stands in the history, apart from what is before it."""
    return answers[0] if not before or before[-1].isspace() else f" {answers[0]}"
