"""How often the tiny model's greedy answers are exactly right, by task and prompt length.

python -m benchmarks.tiny_model.evaluate --model DIR [--tasks niah,mk,...] [--lengths 512,1024,2048] [-n 24]
python -m benchmarks.tiny_model.evaluate --model DIR --drop [--window 8]

Plain: transformers' generate; multi-turn goes on with the right answers, its figure is the mean of all turns.
With --drop: the methods of `drop.py`, first turns only.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.tiny_model.drop import METHODS, is_exact
from benchmarks.tiny_model.language import TASKS, Example, make_example

MAX_ANSWER_TOKENS = 16


class Evaluator:
    """Exact match of one checkpoint over the same `num_examples` seeds everywhere."""

    def __init__(self, directory: Path, num_examples: int) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        self._tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
        self._num_examples = num_examples

    def exact_match(self, task: str, length: int) -> float:
        """Share of right answers over all examples and turns, with the whole cache."""
        examples = self._examples(task, length)
        texts, answers = [x.prompt for x in examples], [x.answer for x in examples]
        hits = self._hits(texts, answers)
        for follow_ups in zip(*(x.follow_ups for x in examples), strict=True):
            texts = [
                f"{text} {answer} {asked}" for text, answer, (asked, _) in zip(texts, answers, follow_ups, strict=True)
            ]
            answers = [answer for _, answer in follow_ups]
            hits += self._hits(texts, answers)
        return sum(hits) / len(hits)

    def exact_match_dropped(self, length: int, window_size: int, method: str, task: str) -> float:
        """Share of right first answers when the method has reduced the cache after the prompt."""
        examples = self._examples(task, length)
        answers = self._tokenizer([x.answer for x in examples], add_special_tokens=False).input_ids
        hits = [
            is_exact(self._model, example.prompt_ids, answer, method, window_size)
            for example, answer in zip(examples, answers, strict=True)
        ]
        return sum(hits) / len(hits)

    def _examples(self, task: str, length: int) -> list[Example]:
        return [make_example(task, length, seed) for seed in range(self._num_examples)]

    @torch.inference_mode()
    def _hits(self, texts: list[str], answers: list[str]) -> list[bool]:
        """Which texts, all of the same length in tokens, are continued with their answer and its end mark."""
        batch = self._tokenizer(texts, return_tensors="pt", return_token_type_ids=False)
        out = self._model.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        told = self._tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :])
        return [text.split(" <pad>")[0] == f"{answer} ." for text, answer in zip(told, answers, strict=True)]


def print_table(rows: list[str], columns: list[str], cell: Callable[[str, str], float]) -> None:
    """A Markdown table with one line per row, printed as it is measured."""
    print("| " + " | ".join(["", *columns]) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(f"{cell(row, column):.2f}" for column in columns) + " |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--lengths", default="512,1024,2048", help="prompt tokens, comma-separated")
    parser.add_argument("-n", type=int, default=24, help="examples a cell")
    parser.add_argument("--drop", action="store_true", help="compare methods that drop cached entries")
    parser.add_argument("--window", type=int, default=8, help="observation window of --drop")
    args = parser.parse_args()
    evaluator = Evaluator(args.model, args.n)
    tasks, lengths = args.tasks.split(","), args.lengths.split(",")
    if not args.drop:
        print_table(lengths, tasks, lambda length, task: evaluator.exact_match(task, int(length)))
        return
    for length in lengths:
        print(f"\nlength {length}, window {args.window}\n")
        cell = partial(evaluator.exact_match_dropped, int(length), args.window)
        print_table(list(METHODS), tasks, cell)


if __name__ == "__main__":
    main()
