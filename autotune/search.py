"""Which candidates of a kernel are worth trying next.

The default comes first, then what is known to be good elsewhere, then whatever differs from the default in one setting,
since most tunables work alone; after that Optuna's TPE proposes (Bergstra et al., "Algorithms for hyper-parameter
optimization", 2011), and where it repeats itself, whatever has not been tried. Settings that lead to the same kernels
are one candidate.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemoc.autotune.journal import Study, Trial
from nemoc.codegen.lower import Emit
from nemoc.codegen.plan import Plan, RegionError, Site
from nemoc.codegen.tunables import Choices, IllegalSchedule, Schedule, Tunable

_PROPOSALS = 24
"""Proposals that may be known already before something untried is taken."""

_ENUMERATED = 4096
"""Schedules of a space that are gone through to find untried ones."""

_Settings = tuple[tuple[str, Any], ...]

Runs = Callable[[Plan], tuple[str, ...]]
"""The names of the kernels of a plan that have something to do at the sizes that are tuned for."""


@dataclass(frozen=True)
class Space:
    """What a kernel can be.

    Attributes:
        site: what it is for.
        emit: makes the plan of a site, as its choices say.
        tunables: what can be chosen.
        runs: what of a plan runs; none if all of it.
    """

    site: Site
    emit: Emit
    tunables: tuple[Tunable, ...]
    runs: Runs | None = None

    @classmethod
    def of(
        cls, site: Site, emit: Emit, keep_bits: bool = False, runs: Runs | None = None
    ) -> "Space":
        """The space of a site, found by emitting it.

        Args:
            site, emit, runs: as above. What only changes launches that do not run is left out.
            keep_bits: without what may change the order of sums.
        """
        choices = Choices()
        default = emit(dataclasses.replace(site, choices=choices))
        asked = (t for t in choices.asked.values() if len(t.values) > 1)
        space = cls(site, emit, tuple(t for t in asked if t.keeps_bits or not keep_bits), runs)
        if runs is None or len(runs(default)) == len(default.stages):
            return space
        return dataclasses.replace(space, tunables=space._felt())

    @property
    def size(self) -> int:
        """How many schedules there are, legal or not."""
        return math.prod(len(t.values) for t in self.tunables)

    def plan(self, schedule: Schedule) -> Plan | None:
        """The plan under a schedule; none if it is not legal."""
        try:
            return self.emit(dataclasses.replace(self.site, choices=Choices(schedule)))
        except (IllegalSchedule, RegionError):
            return None

    def essential(self, schedule: Schedule) -> dict[str, Any]:
        """A schedule without the settings that change nothing that runs, which nobody has tried."""
        kept = dict(schedule)
        for name in schedule:
            fewer = {k: v for k, v in kept.items() if k != name}
            if self._running(fewer) == self._running(kept):
                kept = fewer
        return kept

    def _felt(self) -> tuple[Tunable, ...]:
        """The tunables that change what runs: by themselves, or beside one that decides which launches do."""
        running = functools.cache(lambda settings: self._running(dict(settings)))
        usual = running(())
        bases: list[_Settings] = [()]
        for change in self.single_changes():
            found = running(tuple(change.items()))
            if found is not None and _stems(found) != _stems(usual or ()):
                bases.append(tuple(change.items()))

        def changes(tunable: Tunable, base: _Settings) -> bool:
            others = (v for v in tunable.values if v != tunable.default)
            rest = tuple(item for item in base if item[0] != tunable.name)
            found = (running((*rest, (tunable.name, v))) for v in others)
            return any(names not in (None, running(base)) for names in found)

        return tuple(t for t in self.tunables if any(changes(t, base) for base in bases))

    def _running(self, schedule: Schedule) -> tuple[str, ...] | None:
        """What runs under a schedule; none if it is not legal."""
        plan = self.plan(schedule)
        if plan is None:
            return None
        return self.runs(plan) if self.runs else tuple(s.kernel.name for s in plan.stages)

    def keeps_bits(self, schedule: Schedule) -> bool:
        """Whether a schedule adds in the order in which the default does."""
        return all(
            t.keeps_bits or schedule.get(t.name, t.default) == t.default for t in self.tunables
        )

    def single_changes(self) -> Iterator[dict[str, Any]]:
        """Schedules that differ from the default in one setting, those next to it first."""
        changes = []
        for tunable in self.tunables:
            middle = tunable.values.index(tunable.default)
            for i, value in enumerate(tunable.values):
                if value != tunable.default:
                    changes.append((abs(i - middle), tunable.name, value))
        for _, name, value in sorted(changes, key=lambda c: c[0]):
            yield {name: value}

    def all_schedules(self) -> Iterator[dict[str, Any]]:
        """Every schedule, legal or not."""
        names = [t.name for t in self.tunables]
        for values in itertools.product(*(t.values for t in self.tunables)):
            yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Candidate:
    """What is tried next.

    Attributes:
        schedule: its settings.
        plan: its kernels.
    """

    schedule: Schedule
    plan: Plan


class Search:
    """The search of one kernel's space.

    Args:
        space: the space.
        study: its trials.
        seeds: schedules to try early.
    """

    def __init__(self, space: Space, study: Study, seeds: Sequence[Schedule] = ()) -> None:
        self.space = space
        self.study = study
        self._early: list[Schedule] = [
            {},
            *map(self._known_settings, seeds),
            *space.single_changes(),
        ]
        self._plans: dict[str, Plan | None] = {}

    def next(self, count: int) -> list[Candidate]:
        """The next candidates, fewer where there are no more."""
        trials = self.study.trials()
        seen = {t.kernels for t in trials}
        for params in self.study.open():
            plan = self._plan(params)
            if plan is not None:
                seen.add(plan.name)
        found: list[Candidate] = []
        for schedule in self._proposals():
            plan = self._plan(schedule)
            if plan is not None and plan.name not in seen:
                seen.add(plan.name)
                # What does not matter has its default: a candidate is one set of settings for all processes.
                found.append(Candidate(schedule_changes(self.space, schedule), plan))
                if len(found) == count:
                    break
        return found

    def _proposals(self) -> Iterator[Schedule]:
        yield from self._early
        yield from self.study.suggestions(_PROPOSALS)
        yield from itertools.islice(self.space.all_schedules(), _ENUMERATED)

    def _plan(self, schedule: Schedule) -> Plan | None:
        key = repr(sorted(self.study.complete(schedule).items()))
        if key not in self._plans:
            self._plans[key] = self.space.plan(schedule)
        return self._plans[key]

    def _known_settings(self, schedule: Schedule) -> Schedule:
        """What a schedule of another kernel means for this one."""
        values = {t.name: t.values for t in self.space.tunables}
        return {k: v for k, v in schedule.items() if v in values.get(k, ())}


def _stems(names: Sequence[str]) -> list[str]:
    """The words for what kernels do, without hashes."""
    return [name.rpartition("_")[0] for name in names]


def expected_gain(trials: Sequence[Trial], untried: int) -> float:
    """By how much of the default's time the best is likely to improve with a few more trials.

    Ratios are taken for normally distributed in their logarithm, with the mean and deviation of those seen but no less
    than 2 % of deviation; the expectation is that of the best of eight draws, as far as so many are left. Whatever the
    distribution, the best of n and k draws is among the last k with a probability of k / (n + k) only.

    Args:
        trials: so far.
        untried: candidates that are left.

    Returns:
        Expected improvement, a part of the default's time; 0 if nothing is left.
    """
    if untried <= 0:
        return 0.0
    logs = [math.log(t.ratio) for t in trials if t.ratio]
    if len(logs) < 4:
        return 0.1
    normal = statistics.NormalDist()
    mean, deviation = statistics.fmean(logs), max(0.02, statistics.stdev(logs))
    best = min(0.0, *logs)
    draws = min(8, untried)
    z = (best - mean) / deviation
    # E[max(0, best − x)] of one draw; of several, at most so many times as much.
    one = deviation * (z * normal.cdf(z) + normal.pdf(z))
    likely = draws / (len(logs) + draws)
    return likely * math.exp(best) * (1.0 - math.exp(-min(draws * one, 1.0)))


def schedule_changes(space: Space, schedule: Schedule) -> dict[str, Any]:
    """The settings of a schedule that differ from the defaults and matter for the kernels."""
    defaults = {t.name: t.default for t in space.tunables}
    changes = {k: v for k, v in schedule.items() if v != defaults.get(k)}
    wanted = space.plan(changes)
    for name in list(changes):
        fewer = {k: v for k, v in changes.items() if k != name}
        if wanted is not None and (plan := space.plan(fewer)) and plan.name == wanted.name:
            changes = fewer
    return changes
