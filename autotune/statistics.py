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
