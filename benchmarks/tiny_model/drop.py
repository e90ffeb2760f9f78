"""What dropping cached entries does to the tiny model's answers, in plain torch.

One teacher-forced pass over prompt and answer: prompt tokens attend to all of the prompt, answer tokens only
to the prompt entries that a method keeps. So the prompt is prefilled in full, its cache reduced once, and the
answer decoded; the first answer token, which the last prompt token predicts, never suffers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.tiny_model.language import END

POOL_SIZE = 7
NUM_SINKS = 4
RETENTION_RATIO = 0.1
TSP_RATIO = 0.2
HIDDEN = torch.finfo(torch.float32).min  # finite: a row that sees nothing must not turn into NaN

# From the window's attention probabilities [Hq, window, L]: kept prompt entries [H, L], bool.
Select = Callable[[Tensor, int], Tensor]


class DropAttention:
    """Attention for transformers that hides dropped prompt entries.

    prompt_length: tokens before the answer.
    window_size: last prompt tokens whose attention scores the entries; they are always kept.
    select: entries the answer may see in every layer, per KV head; None hides nothing.
    tsp_layer: layer after which only the best `TSP_RATIO` of the prompt goes on, all heads alike; None: all.
    """

    def __init__(self, prompt_length: int, window_size: int, select: Select | None, tsp_layer: int | None) -> None:
        self._prompt_length = prompt_length
        self._window_size = window_size
        self._select = select
        self._tsp_layer = tsp_layer
        self._goes_on: Tensor | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
        scaling: float, **_: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [1, Hq, N, D], key and value [1, H, N, D]; the result is [1, N, Hq, D]."""
        length, group_size = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x[0].repeat_interleave(group_size, 0) for x in (key, value))
        logits = (query[0] @ key.mT).float() * scaling  # [Hq, N, N]
        logits.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), HIDDEN)
        if self._goes_on is not None:
            logits[:, :, : self._prompt_length].masked_fill_(~self._goes_on, HIDDEN)
        window = slice(self._prompt_length - self._window_size, self._prompt_length)
        probabilities = logits[:, window, : self._prompt_length].softmax(-1)
        if self._select is not None:
            kept = self._select(probabilities, group_size).repeat_interleave(group_size, 0)
            answer = logits[:, self._prompt_length :, : self._prompt_length]
            answer.masked_fill_(~kept[:, None], HIDDEN)
        out = logits.softmax(-1).to(value.dtype) @ value
        if module.layer_idx == self._tsp_layer:
            budget = int(self._prompt_length * TSP_RATIO)
            scores = _pooled_scores(probabilities).mean(0, keepdim=True)
            self._goes_on = _best(scores, self._window_size, budget)[0]
        return out.transpose(0, 1)[None], None


def snapkv(probabilities: Tensor, group_size: int) -> Tensor:
    """SnapKV (Li et al. 2024, section 4): best pooled attention of the window, summed over the group."""
    scores = _pooled_scores(probabilities).unflatten(0, (-1, group_size)).sum(1)
    return _best(scores, probabilities.shape[1], int(probabilities.shape[2] * RETENTION_RATIO))


def streaming(probabilities: Tensor, group_size: int) -> Tensor:
    """StreamingLLM (Xiao et al. 2023): the first tokens and the last ones."""
    num_heads, _, length = probabilities.shape
    position = torch.arange(length)
    recent = int(length * RETENTION_RATIO) - NUM_SINKS
    kept = (position < NUM_SINKS) | (position >= length - recent)
    return kept.expand(num_heads // group_size, length)


METHODS: dict[str, tuple[Select | None, int | None]] = {
    "full": (None, None),
    "snapkv": (snapkv, None),
    "streaming": (streaming, None),
    **{f"tsp{layer}": (None, layer) for layer in range(7)},
}


@torch.inference_mode()
def is_exact(
    model: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int], method: str, window_size: int
) -> bool:
    """Whether greedy decoding gives the answer and its end mark under the method."""
    prompt_length = len(prompt_ids)
    AttentionInterface.register("drop", DropAttention(prompt_length, window_size, *METHODS[method]))
    model.set_attn_implementation("drop")
    targets = torch.tensor([*answer_ids, END])
    ids = torch.tensor([prompt_ids + answer_ids])
    logits = model(ids, use_cache=False, logits_to_keep=len(targets)).logits[0]
    return bool((logits.argmax(-1) == targets).all())


def _pooled_scores(probabilities: Tensor) -> Tensor:
    """Scores [Hq, L - window] of the entries before the window: its attention, max-pooled."""
    window_size = probabilities.shape[1]
    scores = probabilities.sum(1)[:, :-window_size]
    return F.max_pool1d(scores, POOL_SIZE, stride=1, padding=POOL_SIZE // 2)


def _best(scores: Tensor, window_size: int, budget: int) -> Tensor:
    """The `budget` best entries, window included: bool [heads, L] from scores [heads, L - window]."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(1, scores.topk(budget - window_size).indices, True)
    return F.pad(kept, (0, window_size), value=True)
