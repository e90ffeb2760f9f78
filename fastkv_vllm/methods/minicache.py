"""MiniCache: neighbouring layers' entries stored as one, from the middle of the model on."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("minicache")
@dataclass(frozen=True)
class MiniCache(StreamingLLM):
    """Two layers, one direction, each layer's magnitudes; nobody votes and, unless the ratio says so, nothing goes.

    How entries are merged is `codecs.PairCodec`'s matter.

    Source: arXiv 2405.14366, section 3. Differences: values only, unless `merge_layers` says otherwise (theirs: keys,
    too, which loses several times as many answers of our small model); the prompt is read with each layer's own entries
    and merged when it ends; what is generated is not merged; codes of four bits only with a `codec`.
    """

    source: ClassVar[str] = "arXiv 2405.14366, section 3"
    default_retention_ratio: ClassVar[float] = 1.0
    default_evict_while_decoding: ClassVar[bool] = False
    default_merge_layers: ClassVar[str | None] = "values"
