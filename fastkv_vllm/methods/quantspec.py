"""QuantSpec: all entries stay, in eight bits; by four of them the model drafts tokens that the eight verify."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("quantspec")
@dataclass(frozen=True)
class QuantSpec(StreamingLLM):
    """Nothing is dropped and nobody votes: what lies before the residual window is stored so that it reads two ways.

    How entries are stored is the codec's matter, see `codecs.hierarchical`. The model itself drafts up to
    `draft_tokens` tokens one by one on the upper four bits, then runs over all of them at once on the eight: tokens of
    greedy requests are those of the same cache without drafts.

    Source: arXiv 2502.10424, sections 4 and 5 (five drafts, a residual window of 128 as in its code).
    Differences: what is generated stays as it is (the paper: a buffer of twice the window, whose older half is encoded
    whenever it is full); drafts run on the same weights (theirs: on four bits of them). With a lower `retention_ratio`
    the most recent entries stay.
    """

    source: ClassVar[str] = "arXiv 2502.10424, section 4"
    default_retention_ratio: ClassVar[float] = 1.0
    default_num_sink: ClassVar[int] = 0
    default_evict_while_decoding: ClassVar[bool] = False
    default_codec: ClassVar[str | None] = "int4x2"
    default_residual_window: ClassVar[int] = 128
    default_draft_tokens: ClassVar[int] = 5
