"""DuoAttention: retrieval heads keep the whole prompt, streaming heads its beginning and its end."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.methods.budgets import MODEL_BUDGETS, BudgetOptions, ModelBudget
from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


def by_retrieval(plan: PromptPlan, options: BudgetOptions) -> list[list[float]]:
    """Entries of each head: `streaming_tokens`, or the whole prompt while the budget lasts, highest weights first.

    One head between the two kinds gets what is left.
    """
    weights = options.head_weights
    order = sorted(((-weight, layer, head) for layer, row in enumerate(weights) for head, weight in enumerate(row)))
    streaming = min(options.streaming_tokens, plan.num_kept)
    left = (plan.num_kept - streaming) * len(order)
    entries = [[0.0] * len(row) for row in weights]
    for _, layer, head in order:
        more = min(left, plan.num_tokens - streaming)
        entries[layer][head] = streaming + more - plan.num_tail
        left -= more
    return entries


MODEL_BUDGETS["retrieval"] = ModelBudget("retrieval-heads", "gates", by_retrieval)


@register("duoattention")
@dataclass(frozen=True)
class DuoAttention(StreamingLLM):
    """Two classes of KV heads by gates learnt once per model; nobody votes.

    Source: arXiv 2410.10819, section 3 (half of the cache for models with grouped queries; 64 sinks and 256 recent
    tokens as deployed). Differences: how many heads are retrieval heads follows from `retention_ratio`, so that
    methods compare at equal memory (the paper sets a quantile of the gates); while a prompt is read, streaming heads
    let go whenever `streaming_tokens` more have been, of whole pages of the cache (theirs after each chunk, whose
    length the user sets); they keep what is generated after it.
    """

    source: ClassVar[str] = "arXiv 2410.10819, section 3"
    default_num_sink: ClassVar[int] = 64
    default_retention_ratio: ClassVar[float] = 0.5
    default_evict_while_decoding: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    head_budgets: ClassVar[str] = "retrieval"
