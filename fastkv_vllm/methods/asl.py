"""ASL: FastKV whose layer is found for each prompt while it runs."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.fastkv import FastKV
from fastkv_vllm.methods.registry import register


@register("asl")
@dataclass(frozen=True)
class ASL(FastKV):
    """Rows are cut where their ranks have settled: early if the model soon knows what matters, late if it does not.

    The rank of a row is its place among the rows by the rating that fastkv cuts by. The cut comes after the first layer
    at which the variance of the best rows' ranks over the last three layers is no more than `rank_variance` times what
    it was at `min_tsp_layer`, and at the latest after `tsp_layer`; see `settling`.

    Source: arXiv 2601.07667, sections on the method as others summarise them: pooled window scores, variance of ranks
    over consecutive layers relative to the first one's, threshold 0.3, from layer 10 of 32 on. Not verified: over how
    many layers and which rows the variance runs; three, and those that would go on, are ours. Differences: as fastkv;
    a share of the rows goes on (theirs: 2048), pooling is fastkv's (theirs: average), there is a last layer.
    """

    source: ClassVar[str] = "arXiv 2601.07667, sections on the method"
    default_rank_variance: ClassVar[float | None] = 0.3
