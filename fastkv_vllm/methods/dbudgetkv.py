"""DBudgetKV: each layer keeps as much as its attention needs, and gives back the rest of its budget."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("dbudgetkv")
@dataclass(frozen=True)
class DBudgetKV(StreamingLLM):
    """First and most recent tokens, as many as the halting rule asks for; nobody votes.

    The oldest entry that is no sink goes first, as long as the norm of the last query's attention falls by no more than
    `halting_loss`, see `halting`. All heads of a layer keep the same number, each layer has its own.

    Source: arXiv 2502.16886, section 3, in the form of the authors' code: norm of the last query's row per head, then
    the mean over heads (the paper writes the Frobenius norm of all rows). Differences: `retention_ratio` is a ceiling
    (theirs has none); lengths are rounded up to whole pages, and the last, partial block and the last `window_size`
    tokens always stay.
    """

    source: ClassVar[str] = "arXiv 2502.16886, section 3"
    default_retention_ratio: ClassVar[float] = 0.9
    default_halting_loss: ClassVar[float | None] = 0.01
    default_evict_while_decoding: ClassVar[bool] = False
