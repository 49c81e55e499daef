"""How long each kernel of a step takes, beside what the roofline allows it."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemoc.autotune.measure import Roofs
from nemoc.runtime.costs import FunctionCosts, OpCost
from nemoc.runtime.step_times import StepTimes


@dataclass(frozen=True)
class KernelGroup:
    """The ops of a function that are carried out by the same kernels.

    Attributes:
        op: what they do.
        weights: what the weights are called that they read, without the layers' numbers.
        kernels: the names of their kernels, in order.
        sites: how many ops these are.
        flops: of all of them.
        moved: bytes that all of them have to read and write. None, as flops are, for an op of a user's own that does
            not say what it costs.
    """

    op: str
    weights: tuple[str, ...]
    kernels: tuple[str, ...]
    sites: int
    flops: float | None
    moved: float | None

    @property
    def title(self) -> str:
        """What they do, with which weights."""
        return f"{self.op} {', '.join(self.weights)}".strip()


@dataclass(frozen=True)
class KernelTime(KernelGroup):
    """The same with the time that they take.

    Attributes:
        seconds: of all of them; launches that run at once share their time as threads do.
        least: seconds that memory and arithmetic allow them, each op by itself; integers are not counted as arithmetic.
            None where it is not known what they cost.
    """

    seconds: float
    least: float | None

    @property
    def roofline(self) -> float | None:
        """The least time over that taken; above 1 where caches have what memory was counted for."""
        if self.least is None or self.seconds == 0.0:
            return None
        return self.least / self.seconds


@dataclass(frozen=True)
class StepReport:
    """A prompt or a token, kernel by kernel: medians of repeated runs.

    Attributes:
        tokens: of the prompt; 1 for a token.
        cached: how many are cached before them.
        seconds: all of it.
        outside: seconds in which nothing was launched: the way into steps and out of them.
        waiting: seconds in which threads waited for each other, a part of a thread counted as a part.
        kernels: the longest first.
    """

    tokens: int
    cached: int
    seconds: float
    outside: float
    waiting: float
    kernels: tuple[KernelTime, ...]


def kernel_groups(costs: FunctionCosts, sizes: Sequence[Mapping[str, int]]) -> list[KernelGroup]:
    """The groups of a function, in order of first launch.

    Args:
        costs: of the function.
        sizes: B, L, C and T of each step that is counted.
    """
    found = []
    for kernels, numbers in _numbers(costs).items():
        ops = [costs.ops[number] for number in numbers]
        found.append(_group(kernels, ops, _costs(ops, sizes)))
    return found


_Costs = list[tuple[OpCost, float, float]]
"""Flops and bytes of each op in each step."""


def _numbers(costs: FunctionCosts) -> dict[tuple[str, ...], list[int]]:
    """The numbers of the ops of each group, by the kernels that they share."""
    names: dict[int, list[str]] = {}
    for launch in costs.launches:
        names.setdefault(launch.op, []).append(launch.kernel)
    groups: dict[tuple[str, ...], list[int]] = {}
    for op, kernels in names.items():
        groups.setdefault(tuple(kernels), []).append(op)
    return groups


def step_report(
    runs: Sequence[Sequence[StepTimes]], cached: int, costs: FunctionCosts, roofs: Roofs
) -> StepReport:
    """What repeated runs say.

    Args:
        runs: each is the steps of a prompt, or the one of a token; all alike, of batch 1.
        cached: tokens before the first of a run.
        costs: of the function that the steps are of.
        roofs: what the device reaches.
    """
    own = dict.fromkeys(range(len(costs.ops)), 0.0)
    summed = [_sums(step.launches for step in run) for run in runs]
    for launch, seconds in zip(costs.launches, zip(*summed, strict=True), strict=True):
        own[launch.op] += statistics.median(seconds)
    sizes = _sizes(runs[0], cached)
    rows = []
    for kernels, numbers in _numbers(costs).items():
        ops = [costs.ops[number] for number in numbers]
        done = _costs(ops, sizes)
        spent = sum(own[number] for number in numbers)
        group = vars(_group(kernels, ops, done))
        rows.append(KernelTime(**group, seconds=spent, least=_least(done, roofs)))
    return StepReport(
        tokens=sum(step.sizes[1] for step in runs[0]),
        cached=cached,
        seconds=statistics.median(sum(step.seconds for step in run) for run in runs),
        outside=statistics.median(
            sum(step.seconds - sum(step.launches) for step in run) for run in runs
        ),
        waiting=statistics.median(sum(step.waiting for step in run) for run in runs),
        kernels=tuple(sorted(rows, key=lambda row: -row.seconds)),
    )


def _sums(steps: Iterable[Sequence[float]]) -> list[float]:
    """Each launch's seconds over several steps."""
    return [sum(seconds) for seconds in zip(*steps, strict=True)]


def _sizes(run: Sequence[StepTimes], cached: int) -> list[dict[str, int]]:
    """B, L, C and T of each step."""
    found = []
    for step in run:
        found.append(dict(zip("BLC", step.sizes, strict=True)) | {"T": cached})
        cached += step.sizes[1]
    return found


def _group(kernels: tuple[str, ...], ops: Sequence[OpCost], costs: _Costs | None) -> KernelGroup:
    return KernelGroup(
        op=ops[0].op,
        weights=tuple(dict.fromkeys(_plain(op.weight) for op in ops if op.weight)),
        kernels=kernels,
        sites=len(ops),
        flops=None if costs is None else sum(flops for _, flops, _ in costs),
        moved=None if costs is None else sum(moved for _, _, moved in costs),
    )


def _costs(ops: Sequence[OpCost], sizes: Sequence[Mapping[str, int]]) -> _Costs | None:
    """What ops cost; none if that is not known of one."""
    found = []
    for op in ops:
        for at in sizes:
            cost = op.at(at)
            if cost is None:
                return None
            found.append((op, *cost))
    return found


def _least(costs: _Costs | None, roofs: Roofs) -> float | None:
    """Seconds that ops take at least."""
    if costs is None:
        return None
    return sum(roofs.seconds(moved, 0.0 if op.integers else flops) for op, flops, moved in costs)


def _plain(weight: str) -> str:
    """A weight's name without the number of its layer, and without what tells stored forms apart."""
    name = re.sub(r"-[0-9a-f]{10}$", "", weight)
    return re.sub(r"^layers\.\d+\.(mixer\.)?|\.weight$", "", name)
