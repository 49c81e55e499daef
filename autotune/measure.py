"""Timing on machines that are never quiet.

Candidates run in turn, round by round, so that a slow minute hits all of them; what is reported is the median, with
the spread beside it. Ratios of medians of one run are worth quoting, absolute figures of two runs are not comparable.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median run."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


_PAUSE = 0.02
"""Seconds before each run, after which threads sleep that the run before has left spinning: those of torch's functions
do for some 8 ms, and would be charged to whoever comes next."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables round by round, with a short pause before each run.

    Args:
        candidates: what to run, by name; each call is one run.
        rounds: timed runs of each.
        warmup: untimed runs of each before the first round.
        clock: seconds; tests hand in their own.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(_PAUSE)
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


@dataclass(frozen=True)
class Roofs:
    """What a device reaches, measured.

    Attributes:
        bandwidth: bytes per second to and from memory.
        arithmetic: floating-point operations per second.
    """

    bandwidth: float
    arithmetic: float

    def seconds(self, moved: float, flops: float) -> float:
        """The shortest time for that many bytes and operations, if both are done at once."""
        return max(moved / self.bandwidth, flops / self.arithmetic)


def measured_roofs(threads: int, size: int = 1 << 28, rounds: int = 5) -> Roofs:
    """What so many threads reach with plain reading, and with torch's product of square matrices of f32.

    Each is the best of the rounds. Products of other sizes may be faster than torch's of these.

    Args:
        threads: of torch.
        size: bytes that are read.
        rounds: of each.
    """
    before, n = torch.get_num_threads(), 2048
    torch.set_num_threads(threads)
    try:
        a = torch.rand(n, n)
        product = interleaved({"product": lambda: a @ a}, rounds)["product"]
        return Roofs(read_bandwidth(size, rounds), 2 * n**3 / min(product.seconds))
    finally:
        torch.set_num_threads(before)


def read_bandwidth(size: int = 1 << 30, rounds: int = 5) -> float:
    """Bytes per second that torch's threads read from memory: sums over a buffer larger than the caches.

    The best of the rounds, since it stands for what the machine can do.
    """
    buffer = torch.ones(size // 4, dtype=torch.float32)
    timing = interleaved({"read": buffer.sum}, rounds)["read"]
    return size / min(timing.seconds)
