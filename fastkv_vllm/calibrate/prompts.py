"""Prompts of a calibration: a JSON object a line, as text or as token ids."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkv_vllm.calibrate.errors import CalibrationError

TEXT_ANSWER_TOKENS = 32  # decoded where the answer is text and may come with words around it


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Fields:
        token_ids: whole prompt.
        answer_ids: expected answer; empty if none was given.
        answer_text: the answer where it was given as text.
        needle: positions of the passage the answer comes from; empty if none was given.
    """

    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer_text: str | None
    needle: range

    @property
    def max_new_tokens(self) -> int:
        """Tokens to decode before the answer is judged."""
        return len(self.answer_ids) if self.answer_text is None else max(TEXT_ANSWER_TOKENS, len(self.answer_ids))


class PromptReader:
    """Reads prompts for one model; its tokenizer is loaded when the first text comes."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def read(self, path: Path, needs: Sequence[str] = (), *, lengths: tuple[int, int] | None = None) -> list[Prompt]:
        """Prompts of a file, in its order.

        A line is a JSON object: "prompt" (text or token ids); "answer" (text or ids); "needle" (text or ids that stand
        in the prompt once) or "needle_span" (first position and the one after the last).

        Args:
            needs: of "answer" and "needle", what every line must have.
            lengths: least and most tokens; other prompts are left out.

        Raises:
            CalibrationError: no file, a line that is not as above, or no prompt of these lengths.
        """
        if not path.is_file():
            raise CalibrationError(f"prompts must be a JSONL file; {path} is none: see docs/calibration.md")
        prompts = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                prompt = self._prompt(json.loads(line), needs)
            except (ValueError, TypeError) as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from None
            if lengths is None or lengths[0] <= len(prompt.token_ids) <= lengths[1]:
                prompts.append(prompt)
        if not prompts:
            raise CalibrationError(
                f"{path} must hold a prompt of the lengths asked for; it holds none: widen --lengths"
            )
        return prompts

    def is_right(self, prompt: Prompt, generated: Sequence[int]) -> bool:
        """Whether decoding gave the answer: token by token if given as ids, else as words somewhere in the text."""
        if prompt.answer_text is None:
            return tuple(generated[: len(prompt.answer_ids)]) == prompt.answer_ids
        told = self._loaded_tokenizer().decode(list(generated), skip_special_tokens=True)
        answer = re.escape(" ".join(prompt.answer_text.split()))
        return re.search(rf"(?<!\w){answer}(?!\w)", " ".join(told.split())) is not None

    def _prompt(self, line: object, needs: Sequence[str]) -> Prompt:
        if not isinstance(line, dict):
            raise ValueError("a line must be a JSON object")
        unknown = sorted(set(line) - {"prompt", "answer", "needle", "needle_span"})
        if unknown or "prompt" not in line:
            raise ValueError(
                f"a line must have prompt, and may have answer and needle or needle_span; got {', '.join(sorted(line))}"
            )
        for name in needs:
            if not (line.get(name) or line.get(f"{name}_span")):
                raise ValueError(f"this calibration needs {name}, the line has none")
        answer = line.get("answer", [])
        token_ids, offsets = self._encode(line["prompt"])
        if not token_ids:
            raise ValueError("prompt must have a token, it has none")
        answer_ids = self._encode_alone(answer)
        needle = self._needle(line, token_ids, offsets)
        return Prompt(token_ids, answer_ids, answer if isinstance(answer, str) else None, needle)

    def _encode(self, text: str | list[int]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Ids of a prompt, and for text the characters of each."""
        if not isinstance(text, str):
            return _checked_ids(text), []
        encoded = self._loaded_tokenizer()(text, return_offsets_mapping=True)
        return tuple(encoded.input_ids), encoded.offset_mapping

    def _encode_alone(self, text: str | list[int]) -> tuple[int, ...]:
        if not isinstance(text, str):
            return _checked_ids(text)
        return tuple(self._loaded_tokenizer().encode(text, add_special_tokens=False))

    def _needle(self, line: dict[str, Any], ids: tuple[int, ...], offsets: list[tuple[int, int]]) -> range:
        if "needle_span" in line:
            begin, end = line["needle_span"]
            if not 0 <= begin < end <= len(ids):
                raise ValueError(f"needle_span must lie in 0..{len(ids)}; got {line['needle_span']}")
            return range(begin, end)
        needle = line.get("needle") or []
        if not needle:
            return range(0)
        if isinstance(needle, str) and isinstance(line["prompt"], str):
            first = line["prompt"].find(needle)
            if first < 0 or line["prompt"].find(needle, first + 1) >= 0:
                raise ValueError("needle must stand in the prompt exactly once; give needle_span instead")
            inside = [i for i, (a, b) in enumerate(offsets) if a < first + len(needle) and b > first]
            return range(inside[0], inside[-1] + 1)
        wanted = self._encode_alone(needle)
        places = [i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted]
        if len(places) != 1:
            raise ValueError(
                f"needle must stand in the prompt exactly once, it does {len(places)} times; use needle_span"
            )
        return range(places[0], places[0] + len(wanted))

    def _loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._model, local_files_only=True)
        return self._tokenizer


def digest(prompts: Sequence[Prompt]) -> str:
    """Short hash of everything in the prompts that a result can depend on."""
    content = [(p.token_ids, p.answer_ids, p.answer_text, p.needle.start, p.needle.stop) for p in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _checked_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError("prompt, answer and needle must be text or a list of token ids")
    return tuple(ids)
