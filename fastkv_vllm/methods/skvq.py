"""SKVQ: all entries stay, keys in two bits and values in one and a half; sinks and the most recent ones as they are."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("skvq")
@dataclass(frozen=True)
class SKVQ(StreamingLLM):
    """Nothing is dropped and nobody votes: what leaves the sliding window is encoded, generated tokens, too.

    How entries are stored is the codec's matter, see `codecs.SkvqCodec`; the first `num_sink` are as they are. What is
    measured once per model, by `fastkv-vllm calibrate channels`: which channels are alike, and where codes end.

    Source: arXiv 2405.06219, section 3 (five sinks, a window of 128 and scales of eight bits as its README advises).
    Differences: keys are stored as they lie in the cache, rotated (theirs: before rotation); channels are ordered
    within a head, in groups of equal width, of half a head where it has up to 128 channels (theirs: 128 channels of all
    heads, ragged); entries leave the window a block at a time, so that up to a block more than the window waits. With a
    lower `retention_ratio` the most recent entries stay.
    """

    source: ClassVar[str] = "arXiv 2405.06219, section 3"
    default_retention_ratio: ClassVar[float] = 1.0
    default_num_sink: ClassVar[int] = 5
    default_evict_while_decoding: ClassVar[bool] = False
    default_codec: ClassVar[str | None] = "skvq"
    default_residual_window: ClassVar[int] = 128
    default_encode_generated: ClassVar[bool] = True
