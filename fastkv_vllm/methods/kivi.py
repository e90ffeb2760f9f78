"""KIVI: all entries stay, in two or four bits; the most recent ones as they are."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("kivi")
@dataclass(frozen=True)
class KIVI(StreamingLLM):
    """Nothing is dropped and nobody votes: what leaves the residual window is encoded, generated tokens, too.

    How entries are stored is the codec's matter, see `codecs.kivi`: four bits, as the authors advise for
    models with grouped queries; "kivi2" has two.

    Source: arXiv 2402.02750, section 3 (groups of 32, a residual window of 128 as in its LongBench scripts).
    Differences: entries leave the window a block at a time, keys and values together (the paper: keys in the length of
    the window, values one by one), so that up to a block more than the window waits. With a lower `retention_ratio` the
    most recent entries stay.
    """

    source: ClassVar[str] = "arXiv 2402.02750, section 3"
    default_retention_ratio: ClassVar[float] = 1.0
    default_num_sink: ClassVar[int] = 0
    default_evict_while_decoding: ClassVar[bool] = False
    default_codec: ClassVar[str | None] = "kivi4"
    default_residual_window: ClassVar[int] = 128
    default_encode_generated: ClassVar[bool] = True
