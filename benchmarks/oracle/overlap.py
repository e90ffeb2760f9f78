"""How far two choices of kept entries agree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

# Two ways to add the same float32 numbers differ by up to 1e-5 of a score in late layers.
TIE = 1e-5

Kept = Sequence[Sequence[Sequence[int]]]  # [L][H][K] positions
Scores = Sequence[Sequence[Sequence[float]]]  # [L][H][N]


@dataclass(frozen=True)
class Disagreement:
    """One (prompt, layer, KV head) whose sets differ.

    Fields:
        prompt, layer, head: which one.
        only_ours, only_theirs: positions, ascending.
        score_gap: how far the judge's best entry we dropped is rated above its worst entry that only we kept, as a
            share of the former; None where the counts differ and a swap says nothing.
    """

    prompt: int
    layer: int
    head: int
    only_ours: list[int]
    only_theirs: list[int]
    score_gap: float | None

    @property
    def is_tie(self) -> bool:
        return self.score_gap is not None and self.score_gap <= TIE


@dataclass
class Agreement:
    """Overlaps of many pairs of sets; `overlaps` has one number per (prompt, layer, KV head)."""

    overlaps: list[float] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.overlaps) / len(self.overlaps)

    @property
    def minimum(self) -> float:
        return min(self.overlaps)

    @property
    def share_identical(self) -> float:
        return 1 - len(self.disagreements) / len(self.overlaps)

    @property
    def num_ties(self) -> int:
        return sum(disagreement.is_tie for disagreement in self.disagreements)


def overlap(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """|ours & theirs| / max(|ours|, |theirs|)."""
    return len(set(ours) & set(theirs)) / max(len(set(ours)), len(set(theirs)))


def add_prompt(agreement: Agreement, prompt: int, ours: Kept, theirs: Kept, scores: Scores, layers: range) -> None:
    """Count one prompt's sets.

    Args:
        agreement: takes the result.
        prompt: its number in reports.
        ours, theirs: kept positions of all layers.
        scores: the judge's rating of all entries.
        layers: those to compare.

    Raises:
        ValueError: the two sides have other layers or heads.
    """
    for layer in layers:
        for head, (mine, other) in enumerate(zip(ours[layer], theirs[layer], strict=True)):
            agreement.overlaps.append(overlap(mine, other))
            only_ours, only_theirs = sorted(set(mine) - set(other)), sorted(set(other) - set(mine))
            if only_ours or only_theirs:
                gap = score_gap(scores[layer][head], only_ours, only_theirs)
                agreement.disagreements.append(Disagreement(prompt, layer, head, only_ours, only_theirs, gap))


def score_gap(scores: Sequence[float], only_ours: Sequence[int], only_theirs: Sequence[int]) -> float | None:
    """See `Disagreement`."""
    if len(only_ours) != len(only_theirs):
        return None
    best = max(scores[position] for position in only_theirs)
    return (best - min(scores[position] for position in only_ours)) / abs(best)
