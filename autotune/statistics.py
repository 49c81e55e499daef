"""What a comparison of measured times allows one to claim."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence of intervals."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A ratio of times, and where it lies with confidence `LEVEL`.

    Attributes:
        ratio: the median over rounds of one's time by the other's; below 1, the first is faster.
        low, high: the ends of the interval.
    """

    ratio: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Whether the first is faster beyond doubt."""
        return self.high < 1.0

    @property
    def is_loss(self) -> bool:
        """Whether it is slower beyond doubt."""
        return self.low > 1.0

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_of_times(times: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """How times compare with others of the same rounds: the median of their ratios.

    The interval is the bootstrap's (Efron, "Bootstrap methods: another look at the jackknife", 1979): percentiles of
    the medians of rounds drawn with replacement. Rounds are pairs, since a slow moment of the machine hits both.

    Args:
        times, others: seconds, one of each for each round.
        seed: of the draws.
    """
    logs = np.log(np.asarray(times)) - np.log(np.asarray(others))
    draws = np.random.default_rng(seed).integers(0, len(logs), (_RESAMPLES, len(logs)))
    medians = np.median(logs[draws], axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(
        math.exp(statistics.median(logs.tolist())), math.exp(float(low)), math.exp(float(high))
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two series of equal length: 1 if they order alike, -1 if the other way round.

    Equal numbers share a rank. NaN where one of them is constant, or has less than two numbers.
    """
    if min(len(set(a)), len(set(b))) < 2:
        return math.nan
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """The place of each number in order, the mean place of equal ones."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[number]
