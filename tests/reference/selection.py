"""Which entries a method drops: scores and choices as loops and sorts, to be read rather than to be fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW_METHODS = ("fastkv", "asl", "snapkv", "pyramidkv", "adakv", "vatp", "headkv", "think")
_ALL_QUERY_METHODS = ("h2o", "a2sf")
_NO_SCORES = ("streamingllm", "duoattention", "dbudgetkv", "kivi", "skvq", "quantspec", "kvsharer", "minicache")
_VOTERS = ("vl_cache",)
_ONE_CHOICE = ("tova", "lazyllm", "pyramidinfer", "gemfilter")
_METHODS = (*_WINDOW_METHODS, *_ALL_QUERY_METHODS, *_NO_SCORES, *_VOTERS, *_ONE_CHOICE)


@dataclass(frozen=True)
class Drop:
    """Which entries a method drops at the end of the prompt.

    method: "streamingllm", "duoattention", "dbudgetkv", "kivi", "skvq", "quantspec" (the most recent stay), "tova" and
        "lazyllm" (the last query votes, once for all heads), "pyramidinfer" (the last num_voters queries vote, later
        ones more, once for all heads), "gemfilter" (products of the last query at the layer of the cut; tokens that
        go on are read again as a prompt of their own, whose entries stay), "vl_cache" (the last num_voters queries
        vote, all alike), "h2o" and "a2sf" (all queries vote); all others: the last window_size queries vote.
    num_kept: entries per layer and KV head that stay, forced ones included; the mean where budgets are uneven.
    forced_from: prompt positions from here on always stay and are always propagated (window and block tail).
    window_size, kernel_size, pooling: last positions, which vote; odd pooling width; "max" or "avg".
    num_voters: last positions that vote, where it need not be the window.
    num_sink: positions below it always stay and are always propagated.
    cuts: (0-based layer, rows propagated after it out of those it saw, forced ones included), layers ascending.
    rank_variance, min_tsp_layer: where set, the only cut comes after the first layer beyond min_tsp_layer with no more
        than this share left of the variance of ranks there; at the latest after the layer in cuts.
    block_size: set where budgets are uneven: they are whole pages of it beside the last, partial one.
    layer_budgets, head_budgets: "uniform"; "pyramid" over layers, "handed-on" and "seen" by the rows of each layer,
        "density" by how much of them the last num_voters queries look at;
        "adaptive" over the heads of a layer, "importance" and "retrieval" over all heads of all layers.
    pyramid_beta, head_floor, head_beta, streaming_tokens, head_weights [L][H]: their numbers.
    decay: weight of a row's votes relative to the next one's, where all vote.
    value_norms: scores are multiplied by the L1 norms of the values, those of each head before they are added up.
    halting_loss: a layer keeps no more pages than it needs to lose at most this share of the last query's norm.
    min_recall: where set, heads keep the fewest whole pages, num_planned entries or more and num_kept at most, with
        which they keep this share of the attention that the last num_voters queries pay, mean over layers and heads.
    num_planned: entries per layer and KV head that stay at least, tail included; set with min_recall.
    period: after the prompt, whenever the text's length is a multiple of it, heads choose anew as many entries as they
        held in multiples of it when the prompt ended; None: what is generated stays.
    num_recent: last entries that always stay then, as far as there is room for the sinks and a choice beside them.
    stream_period: where heads let go of entries while a prompt is read, the tokens between two times; see `streaming`.
    codec: how the entries that stay are stored, but for those from encoded_to on; None: as they are.
    encoded_to: prompt position; set with a codec.
    num_channels, num_value_channels: of its keys and values, that a head's codec stores: those that matter most to the
        voters; None: all.
    num_exact: first entries of each head that its codec leaves as they are.
    channel_groups: file with what was measured of the channels of each head, where the codec needs it; None: nothing.
    encode_after, residual: where set, as many more entries are stored whenever the text but for its last `residual`
        tokens is a multiple of that long.
    layer_owners: layer whose entries each layer reads after the prompt; empty: its own.
    merge: where these two are merged instead: t, gamma, and whether keys are not; see `merging`. What is then stored by
        a codec are directions, and entries that are not merged.
    """

    method: str
    num_kept: int
    forced_from: int
    window_size: int = 8
    num_voters: int = 8
    kernel_size: int = 7
    pooling: str = "max"
    num_sink: int = 0
    cuts: tuple[tuple[int, int], ...] = ()
    block_size: int | None = None
    layer_budgets: str = "uniform"
    head_budgets: str = "uniform"
    pyramid_beta: int = 20
    head_floor: float = 0.2
    head_beta: float = 1.5
    streaming_tokens: int = 320
    head_weights: tuple[tuple[float, ...], ...] | None = None
    decay: float | None = None
    value_norms: bool = False
    halting_loss: float | None = None
    min_recall: float | None = None
    num_planned: int | None = None
    period: int | None = None
    num_recent: int = 0
    stream_period: int | None = None
    rank_variance: float | None = None
    min_tsp_layer: int | None = None
    codec: str | None = None
    encoded_to: int | None = None
    num_channels: int | None = None
    num_value_channels: int | None = None
    num_exact: int = 0
    channel_groups: str | None = None
    encode_after: int | None = None
    residual: int = 0
    layer_owners: tuple[int, ...] = ()
    merge: tuple[float, float, bool] | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {self.method!r}")
        if (self.decay is not None) != (self.method in _ALL_QUERY_METHODS):
            raise ValueError(f"decay goes with {' or '.join(_ALL_QUERY_METHODS)}; got {self.decay} and {self.method!r}")
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling must be max or avg; got {self.pooling!r}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or pooling shifts positions; got {self.kernel_size}")
        for (first, before), (second, after) in pairwise(self.cuts):
            if first >= second or before < after:
                raise ValueError(f"layers of cuts must rise and their rows must not; got {self.cuts}")
        if self.cuts and not self.has_scores:
            raise ValueError(f"cuts need a method with scores; got {self.method!r}")

    def tail(self, num_tokens: int) -> int:
        """Tokens after the last whole block that entries are moved out of."""
        return num_tokens % self.block_size if self.codec is None else num_tokens - self.encoded_to

    @property
    def revives(self) -> bool:
        """Whether each decoded token chooses anew what the layers after a cut hold."""
        return self.method == "lazyllm"

    @property
    def one_choice(self) -> bool:
        """Whether all heads of a layer keep the same entries: their scores are added up."""
        return self.method in _ONE_CHOICE

    @property
    def has_scores(self) -> bool:
        return self.method not in _NO_SCORES

    def is_forced(self, position: int) -> bool:
        return position < self.num_sink or position >= self.forced_from

    def num_forced(self, num_whole: int) -> int:
        """Entries of the num_whole tokens before the tail that need room, then or when a head chooses anew."""
        recent = sum(self.is_forced(p) for p in range(self.num_sink, num_whole))
        return self.num_sink + (recent if self.period is None else max(recent, self.window_size))

    @property
    def num_later_voters(self) -> int:
        """Last tokens that vote when heads choose anew: as on the prompt, more than the window only up to a period."""
        return min(self.num_voters, max(self.window_size, self.period))

    def check_fits(self, num_tokens: int, num_layers: int) -> None:
        """Raise ValueError if a window column of the prompt is not forced or a cut's layer does not exist."""
        for layer, _ in self.cuts:
            if not 0 <= layer < num_layers:
                raise ValueError(f"layers of cuts must be in [0, {num_layers}); got {layer}")
        if self.has_scores and not 0 <= self.forced_from <= num_tokens - self.window_size:
            raise ValueError(
                f"forced_from must be in [0, {num_tokens} - {self.window_size}] to cover the window; "
                f"got {self.forced_from}"
            )


def window_scores(queries: Tensor, keys: Tensor, drop: Drop) -> Tensor:
    """Votes of the last window_size queries for every earlier key, per KV head.

    S[k, j] = sum over the query heads h of k of pool_j(sum over w of softmax_j(Q[h, w] . K[k, j] / sqrt(D))).

    Args:
        queries: roped queries of the layer, [Hq, n, D], float32.
        keys: roped keys of the layer, [H, n, D], float32.
    Returns: [H, n - window_size], float32: the window's own columns vote in the softmax but have no score.
    Source: FastKV, arXiv 2502.01068 and its baselines/fastkv/utils.py; SnapKV, arXiv 2404.14469, per KV head.
    """
    num_heads, num_rows, head_dim = queries.shape
    num_kv_heads, window = keys.shape[0], drop.window_size
    group_size = num_heads // num_kv_heads
    num_scored = num_rows - window

    scores = torch.zeros(num_kv_heads, num_scored)
    for head in range(num_heads):
        kv_head = head // group_size
        logits = queries[head, num_scored:] @ keys[kv_head].T / head_dim**0.5  # [W, n]
        for w in range(window):
            logits[w, num_scored + w + 1 :] = -torch.inf
        votes = torch.zeros(num_scored)
        for row in logits.softmax(dim=-1):
            votes += row[:num_scored]
        scores[kv_head] += pool(votes, drop.kernel_size, drop.pooling)
    return scores


def pool(votes: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Maximum or mean of kernel_size columns around each one, [n] -> [n]; outside, the mean counts zeros."""
    radius, num_columns = kernel_size // 2, votes.shape[0]
    padded = F.pad(votes, (radius, radius), value=-torch.inf if pooling == "max" else 0.0)
    shifted = torch.stack([padded[i : i + num_columns] for i in range(kernel_size)])
    return shifted.amax(dim=0) if pooling == "max" else shifted.sum(dim=0) / kernel_size


def select_positions(scores: Sequence[float], positions: Sequence[int], count: int, drop: Drop) -> list[int]:
    """The count positions that stay, ascending: forced ones, then the highest scores, ties by lower position.

    scores[i] belongs to positions[i]; positions beyond the last score must be forced.
    """
    forced = [p for p in positions if drop.is_forced(p)]
    assert len(forced) <= count, f"{len(forced)} positions are forced, more than the {count} that may stay"
    assert all(drop.is_forced(p) for p in positions[len(scores) :]), "a position without a score is not forced"
    rated = [(-score, p) for score, p in zip(scores, positions, strict=False) if not drop.is_forced(p)]
    best = [p for _, p in sorted(rated)][: count - len(forced)]
    return sorted(forced + best)


def rows_after(drop: Drop, ratings: Sequence[Sequence[float]], num_tokens: int) -> int | None:
    """Rows that go on after the last of these layers; None: all it saw.

    Args:
        ratings: of each layer so far the rows' scores, heads added, in order of position.
        num_tokens: tokens of the prompt.
    """
    layer = len(ratings) - 1
    if drop.rank_variance is None:
        return dict(drop.cuts).get(layer)
    if not drop.cuts or len(ratings[-1]) < len(ratings[0]) or layer <= drop.min_tsp_layer:
        return None
    ((latest, num_rows),) = drop.cuts
    if layer == latest or relative_variance(drop, ratings, num_rows, num_tokens) <= drop.rank_variance:
        return num_rows
    return None


def relative_variance(drop: Drop, ratings: Sequence[Sequence[float]], num_rows: int, num_tokens: int) -> float:
    """Mean variance of the ranks of the best rows over the last three layers, in shares of that at min_tsp_layer.

    Source: ASL, arXiv 2601.07667; three layers, and the rows that would go on, are this project's choice.
    """

    def variance(layer: int) -> float:
        ranks = []
        for scores in ratings[layer - 2 : layer + 1]:
            rated = [p for p in range(len(scores)) if not drop.is_forced(p)]
            by_score = sorted(rated, key=lambda p: (-scores[p], p))
            ranks.append({p: rank for rank, p in enumerate(by_score)})
        best = by_score[: num_rows - (num_tokens - len(rated))]
        total = 0.0
        for p in best:
            mean = sum(rank[p] for rank in ranks) / 3
            total += sum((rank[p] - mean) ** 2 for rank in ranks) / 3
        return total / len(best)

    return variance(len(ratings) - 1) / variance(drop.min_tsp_layer)
