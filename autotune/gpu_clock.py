"""Timing on a GPU: by its own clock, caches cold, contenders in turns; and what the device can do at best."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from nemoc.autotune.measure import Roofs

_CACHE = 512 << 20
"""Bytes that are read before each run, many times what any GPU's caches hold."""

_COPY = 2 << 30
"""Bytes of each of the two buffers of the copy that measures bandwidth, where there is room."""

_SIDE = 8192
"""Rows and columns of the product that measures arithmetic."""

_CYCLES_PER_SECOND = 2.0e9
"""At least the clock rate of any GPU, so that a pause is at least as long as it should be."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 2e-4, 0.1
"""Seconds that the device waits before a run."""

Run = Callable[[], object]
"""Puts work into torch's current stream."""


def nothing() -> None:
    """Puts no work anywhere."""


class Clock(Protocol):
    """Times work on a device."""

    def seconds(self, run: Run, before: Run = nothing) -> float:
        """Seconds of one run, whose work starts and ends on the device; of what is put before it none."""
        ...


class EventClock:
    """The device's clock, with cold caches and without the time that it takes to launch.

    Caches are filled by reading before each run, since what was written would have to go to memory first, at the run's
    expense; and what is put before it may bring some of its data back. Then the device waits for as long as the
    launches take on the host, so that they are queued when the first of them starts: what is measured is the device's
    time, for whoever replays recorded launches. Work that waits for the device in between shows that it does.
    """

    def __init__(self) -> None:
        self._other = torch.zeros(_CACHE // 4, dtype=torch.int32, device="cuda")

    def seconds(self, run: Run, before: Run = nothing) -> float:
        seconds, launching = self._timed(run, before, _SHORTEST_PAUSE)
        if launching > _SHORTEST_PAUSE:
            seconds, _ = self._timed(run, before, min(2 * launching, _LONGEST_PAUSE))
        return seconds

    def _timed(self, run: Run, before: Run, pause: float) -> tuple[float, float]:
        """Seconds of a run on the device, and seconds that the host took to launch it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.amax()
        before()
        torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
        start.record()
        started = time.perf_counter()
        run()
        launching = time.perf_counter() - started
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3, launching


def in_turns(
    runs: Mapping[str, Run], clock: Clock, budget: float = 1.0, fewest: int = 7, most: int = 101
) -> dict[str, tuple[float, ...]]:
    """Seconds of repeated runs, round by round, so that a slow moment hits all of them.

    Args:
        runs: by name; each has run before, so that nothing is compiled any more.
        clock: times a run.
        budget: seconds of device time for all together, from which the number of rounds follows.
        fewest, most: rounds.
    """
    first = sum(clock.seconds(run) for run in runs.values())
    rounds = max(fewest, min(most, int(budget / max(first, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(clock.seconds(run))
    return {name: tuple(times) for name, times in seconds.items()}


def measure_roofs(
    clock: Clock,
    device: torch.device | str = "cuda",
    copied: int = _COPY,
    side: int = _SIDE,
) -> Roofs:
    """What a device reaches in a copy and in a product of bf16, the best of several runs.

    Args:
        clock: times a run.
        device: whose memory is used.
        copied: bytes of the copy's source; read once and written once.
        side: rows and columns of the product.
    """
    if torch.device(device).type == "cuda":
        copied = min(copied, torch.cuda.mem_get_info()[0] // 8)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(left, right, out=product),
    }
    for run in runs.values():
        run()
    found = {name: min(times) for name, times in in_turns(runs, clock).items()}
    return Roofs(2 * copied / found["copy"], 2 * side**3 / found["product"])
