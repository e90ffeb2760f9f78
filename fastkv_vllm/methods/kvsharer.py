"""KVSharer: some layers read the entries of others, found once per model."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.registry import register
from fastkv_vllm.methods.streamingllm import StreamingLLM


@register("kvsharer")
@dataclass(frozen=True)
class KVSharer(StreamingLLM):
    """Layers without entries of their own; nobody votes, and unless the ratio says so nothing is dropped.

    Source: arXiv 2410.18517, section 3. Differences: the prompt itself is read with each layer's own entries, sharing
    begins when it has ended (theirs: from the first token on); layers that share still compute their keys and values.
    """

    source: ClassVar[str] = "arXiv 2410.18517, section 3"
    default_retention_ratio: ClassVar[float] = 1.0
    default_evict_while_decoding: ClassVar[bool] = False
    shares_layers: ClassVar[bool] = True
