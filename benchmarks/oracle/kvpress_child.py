"""What kvpress does with given prompts. Runs in .venv-kvpress; started by `benchmarks.oracle.compare`.

python -P benchmarks/oracle/kvpress_child.py TASK_JSON_FILE ANSWER_JSON_FILE

A task has `model` (checkpoint directory) and either `jobs` (see `keep`) or `load` (see `measure`). float32, torch's
scaled-dot-product attention, one sequence at a time, this file imports nothing of the project.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kvpress import AdaKVPress, DuoAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


def _duo_attention(
    head_compression_ratio: float, gates: list[list[float]], sink_size: int, recent_size: int
) -> DuoAttentionPress:
    """The press with these gates [L][H] in the place of those published for its models."""
    press = DuoAttentionPress(head_compression_ratio)
    press.load_attention_pattern = lambda model: (sink_size, recent_size, torch.tensor(gates).numpy())
    return press


PRESSES = {
    "snapkv": SnapKVPress,
    "streamingllm": StreamingLLMPress,
    "tova": TOVAPress,
    "pyramidkv": PyramidKVPress,
    "adakv": lambda alpha_safeguard=0.2, **scorer: AdaKVPress(SnapKVPress(**scorer), alpha_safeguard),
    "duoattention": _duo_attention,
}
MASKING = (AdaKVPress, DuoAttentionPress)  # they drop nothing: attention hides what they mask
PACKAGES = ("kvpress", "transformers", "torch")


@dataclass
class Watch:
    """What a press did with one prompt, layer by layer.

    Fields:
        kept: positions of the entries left in the cache, per layer and KV head, ascending.
        scores: the press's rating of all entries, per layer and KV head; 1 and 0 for kept and dropped if it rates none.
    """

    kept: list[list[list[int]]] = field(default_factory=list)
    scores: list[list[list[float]]] = field(default_factory=list)


def keep(model: PreTrainedModel, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Per prompt of a job its `kept` and `scores` (see `Watch`) and its greedy `tokens`.

    Args:
        model: the loaded checkpoint.
        job: `press` (of PRESSES), `settings` (its arguments), `prompts` (token ids; the whole prompt is the context),
            `max_tokens`, `stop_token`, and `counts`: entries to keep per prompt, layer and KV head instead of those
            that pyramidkv or adakv would come to; None: theirs.
    """
    answers = []
    for prompt, counts in zip(job["prompts"], job["counts"] or [None] * len(job["prompts"]), strict=True):
        watch = Watch()
        press = _watched(_counting(PRESSES[job["press"]](**job["settings"]), counts), watch)
        tokens = _generate(model, prompt, job["max_tokens"], press(model), stop_token=job["stop_token"])
        answers.append({"kept": watch.kept, "scores": watch.scores, "tokens": tokens})
    return answers


def measure(model: PreTrainedModel, load: dict[str, Any]) -> dict[str, Any]:
    """Process CPU and wall seconds of the prompt and of the other tokens per repeat, and bytes of the cache.

    Args:
        model: the loaded checkpoint.
        load: `press` (None: uncompressed) and `settings`, `prompt`, `output_tokens`, `repeats` (timed ones, after one
            that warms up and whose cache is looked at after each layer's attention).
    """
    make: Callable[[], AbstractContextManager[None]] = nullcontext
    if load["press"] is not None:
        make = lambda: PRESSES[load["press"]](**load["settings"])(model)  # noqa: E731
    result: dict[str, Any] = {"prefill_cpu_s": [], "prefill_wall_s": [], "decode_cpu_s": [], "decode_wall_s": []}
    with _cache_bytes(model) as sizes:
        _generate(model, load["prompt"], load["output_tokens"], make())
    for _ in range(load["repeats"]):
        marks: list[tuple[float, float]] = []
        _generate(
            model,
            load["prompt"],
            load["output_tokens"],
            make(),
            mark=lambda marks=marks: marks.append((time.process_time(), time.perf_counter())),
        )
        for part, (start, end) in zip(("prefill", "decode"), pairwise(marks), strict=True):
            result[f"{part}_cpu_s"].append(end[0] - start[0])
            result[f"{part}_wall_s"].append(end[1] - start[1])
    num_layers = model.config.num_hidden_layers
    return result | {"peak_cache_bytes": max(sizes), "decode_cache_bytes": sizes[num_layers * 2 - 1]}


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    prompt: list[int],
    max_tokens: int,
    press: AbstractContextManager[None],
    *,
    stop_token: int | None = None,
    mark: Callable[[], None] = lambda: None,
) -> list[int]:
    """Greedy tokens; the first comes from the prompt's full attention, positions go on after the whole prompt.

    `mark` is called before the prompt, after it, and at the end.
    """
    cache = DynamicCache()
    mark()
    with press:
        logits = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
    tokens = [int(logits[0, -1].argmax())]
    mark()
    while len(tokens) < max_tokens and tokens[-1] != stop_token:
        position = torch.tensor([[len(prompt) + len(tokens) - 1]])
        logits = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, position_ids=position).logits
        tokens.append(int(logits[0, -1].argmax()))
    mark()
    return tokens


def _counting(press: Any, counts: list[list[int]] | None) -> Any:
    """The press, made to keep so many entries in each layer and head by its own scores."""
    if counts is None:
        return press
    if isinstance(press, PyramidKVPress):
        press.get_layer_budget = lambda module, num_tokens: min(counts[module.layer_idx])
        return press

    def compress(module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, *others: Any) -> Any:
        scores = press.press.score(module, hidden_states, keys, values, *others)
        order = scores[0].argsort(dim=-1, descending=True)
        dropped = [row[count:] for row, count in zip(order, counts[module.layer_idx], strict=True)]
        heads = torch.cat([torch.full_like(row, head) for head, row in enumerate(dropped)])
        module.masked_key_indices = (torch.zeros_like(heads), heads, torch.cat(dropped))
        return keys, values

    press.compress = compress
    return press


def _watched(press: Any, watch: Watch) -> Any:
    """The press, with its results recorded; what is left is read off keys and masks, not computed once more."""
    scorer = press.press if isinstance(press, AdaKVPress) else None if isinstance(press, DuoAttentionPress) else press
    compress = press.compress

    def watched_compress(module: Any, hidden_states: Any, keys: torch.Tensor, *others: Any) -> Any:
        kept = compress(module, hidden_states, keys, *others)
        positions = [_positions(*heads) for heads in zip(keys[0], kept[0][0], strict=True)]
        if isinstance(press, MASKING):
            _, heads, masked = module.masked_key_indices
            hidden = [set(masked[heads == head].tolist()) for head in range(len(positions))]
            positions = [sorted(set(head) - gone) for head, gone in zip(positions, hidden, strict=True)]
        watch.kept.append(positions)
        if scorer is None:
            stay = torch.zeros(keys.shape[1:3])
            for row, head in zip(stay, positions, strict=True):
                row[head] = 1
            watch.scores.append(stay.tolist())
        return kept

    press.compress = watched_compress
    if scorer is not None:
        score = scorer.score

        def watched_score(*arguments: Any) -> torch.Tensor:
            scores = score(*arguments)
            watch.scores.append(scores[0].tolist())
            return scores

        scorer.score = watched_score
    return press


def _positions(keys: torch.Tensor, kept: torch.Tensor) -> list[int]:
    """Rows of `keys` [N, D] that `kept` [K, D] consists of; RoPE makes each row unique."""
    rows = {key.numpy().tobytes(): position for position, key in enumerate(keys)}
    assert len(rows) == len(keys), "two positions have the same key"
    return sorted(rows[key.numpy().tobytes()] for key in kept)


@contextmanager
def _cache_bytes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Bytes of the whole cache after each layer's attention, before a press entered later prunes that layer."""
    sizes: list[int] = []

    def look(module: Any, arguments: Any, kwargs: dict[str, Any], output: Any) -> None:
        layers = [layer for layer in kwargs["past_key_values"].layers if layer.is_initialized]
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in model.model.layers]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """Command line."""
    source, target = (Path(argument) for argument in sys.argv[1:3])
    task = json.loads(source.read_text())
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    answer: dict[str, Any] = {"versions": {name: version(name) for name in PACKAGES}}
    if "load" in task:
        answer["load"] = measure(model, task["load"])
    else:
        answer["jobs"] = [keep(model, job) for job in task["jobs"]]
    target.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
