"""Scores of answers, summed up with what chance allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Summary:
    """Mean of scores in [0, 1] and its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int


def summarise(scores: Sequence[float]) -> Summary:
    """Mean and interval: Wilson's for right and wrong answers, the normal one, cut to [0, 1], for others."""
    n, mean = len(scores), fmean(scores)
    if set(scores) <= {0.0, 1.0}:
        middle = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n * n))
    else:
        middle, half = mean, Z_95 * stdev(scores) / sqrt(n)
    return Summary(mean, max(middle - half, 0.0), min(middle + half, 1.0), n)
