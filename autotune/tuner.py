"""Tuning a set of kernels within a budget.

Each kernel's default is measured first, which says what part of the model it is; where the budget does not suffice for
all, those are to which a roofline leaves most time, and the others wait for the next run. Then, batch by batch, the
kernel from which most is expected for the time that its candidates take gets its next ones: its part of the model,
times what a few more candidates are likely to gain, which is no more than a roofline leaves. A kernel is settled when
that is next to nothing. What looks best is measured again against the default, since the best of many noisy
measurements looks better than it is, and only a gain that this bears out is claimed.

Everything is in the journal as soon as it is known, so a run may end at any moment, and goes on where it ended.
"""

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nemoc.autotune.journal import Journal, Study, Trial
from nemoc.autotune.predict import seeds
from nemoc.autotune.records import Device, Record, Records, compact, structure_of
from nemoc.autotune.search import (
    Candidate,
    Runs,
    Search,
    Space,
    expected_gain,
    schedule_changes,
)
from nemoc.autotune.statistics import Interval, rank_correlation, ratio_of_times
from nemoc.codegen.bench import Bench, Finding
from nemoc.codegen.lower import Emit
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.tunables import Schedule

BATCH = 6
"""Candidates that are compiled and measured together."""

_FIRST = 2
"""Defaults that are compiled together before it is known how long one takes."""

_WORTH = 1e-3
"""Part of the model's time that a batch must be expected to gain."""

_TOLD_APART = 0.97
"""Ratio up to which a prediction says that a candidate is faster at all."""

_RANKED = 5
"""Candidates from which on it is said how well predictions rank them."""

_LEAST_COST = 0.05
"""Seconds that a candidate is taken to need at least."""

_FINALISTS = 3
"""Candidates that are measured again at the end."""

_ROUNDS, _FINAL_ROUNDS = (7, 40), (20, 60)
"""Fewest and most rounds of a batch, and of the last measurement."""

_BATCH_SECONDS, _FINAL_SECONDS = 1.0, 3.0
"""What their rounds should take together."""

_ROUND_SECONDS = 0.012
"""What a round of one candidate takes besides the kernel: caches are emptied first."""


_NO_GAIN: dict[str, Any] = {"schedule": {}, "equal": True, "ratio": 1.0, "low": 1.0, "high": 1.0}
"""What is noted as concluded of a kernel whose default stays."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that a model launches.

    Attributes:
        site: the op and its views.
        default: its plan where nothing is tuned.
        function: the step that launches it.
        launches: how often, in one step.
        sizes: B, L and C for which it is tuned.
        bench: opens what measures it.
        runs: what of a plan has something to do at these sizes; none if all of it.
        least: seconds that it takes at least on the device whatever its schedule is, by a roofline; 0 where nobody
            knows.
        predicts: the predicted seconds of a plan; none where nothing predicts them, or nothing else is known.
        cached: tokens that came before the step's first, T.
    """

    site: Site
    default: Plan
    function: str
    launches: int
    sizes: Mapping[str, int]
    bench: Callable[[], Bench]
    runs: Runs | None = None
    least: float = 0.0
    predicts: Callable[[Plan], float] | None = None
    cached: int = 0


@dataclass
class KernelReport:
    """How tuning of one kernel went.

    Attributes:
        kernel: the kernel.
        study: its trials.
        space: what it can be.
        seconds: median of the default; 0 while it is unknown.
        share: its part of the time of its function's tuned kernels, as far as their defaults were measured.
        settled: whether nothing more is to be expected of it.
        best: the schedule that is fastest, empty for the default.
        gain: how its time compares with the default's; none until it has been measured at the end, and where the
            default has no time.
        equal: whether its results have the bits of the default's.
        order: how well predicted times rank its candidates: Spearman's rank correlation with what was measured; none
            where nothing predicts them or there are too few candidates.
    """

    kernel: Kernel
    study: Study
    space: Space
    seconds: float = 0.0
    share: float = 0.0
    settled: bool = False
    best: Schedule = field(default_factory=dict)
    gain: Interval | None = None
    equal: bool = True
    order: float | None = None

    @property
    def name(self) -> str:
        """The name of its default plan."""
        return self.kernel.default.name

    @property
    def reached(self) -> bool:
        """Whether anything of it has been tried, the default first."""
        return bool(self.study.trials())

    @property
    def searched(self) -> bool:
        """Whether something else than its default has been tried, or nothing was expected of that."""
        return self.settled or len(self.study.trials()) > 1

    def take(self, concluded: Mapping[str, Any]) -> None:
        """Take over what its study has noted as concluded."""
        self.best, self.equal = concluded["schedule"], concluded["equal"]
        self.gain = Interval(concluded["ratio"], concluded["low"], concluded["high"])


@dataclass(frozen=True)
class Told:
    """What a run says of itself while it goes on.

    Attributes:
        kernel: the kernel at hand.
        best: the least ratio to its default so far.
        done: candidates tried of it.
        gain: expected part of the model's time that is gained so far, by function.
        left: seconds of the budget.
    """

    kernel: str
    best: float
    done: int
    gain: Mapping[str, float]
    left: float


class Tuner:
    """Tunes kernels.

    Args:
        kernels: what there is.
        emit: makes plans of sites.
        device: what they are for.
        journal: where trials are kept.
        records: known results, from which to predict where to begin.
        keep_bits: without what may change the order of sums.
        prepare: compiles the defaults of kernels, all at once where that is quicker.
        tell: told after each batch.
        interrupt: called when an interrupt has ended the search, before the best is measured again.
        clock: seconds; tests hand in their own.

    Attributes:
        reports: how tuning of each kernel goes.
        interrupted: whether an interrupt has ended the search.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        emit: Emit,
        device: Device,
        journal: Journal,
        records: Records | None = None,
        keep_bits: bool = True,
        prepare: Callable[[Sequence[Kernel]], None] = lambda kernels: None,
        tell: Callable[[Told], None] = lambda told: None,
        interrupt: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._prepare, self._tell, self._clock = device, prepare, tell, clock
        self._interrupt, self.interrupted = interrupt, False
        self._keep_bits = keep_bits
        self._records = records or Records()
        self._searches: dict[str, Search] = {}
        self.reports = [self._report(kernel, emit, journal) for kernel in kernels]

    @property
    def identity(self) -> str:
        """A hash of which kernels there are, and for what they are tuned."""
        return hashlib.sha256("\n".join(sorted(self._searches)).encode()).hexdigest()

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is expected of any kernel, as far as the journal knows."""
        return all(r.study.about.get("settled") for r in self.reports if r.space.tunables)

    def run(self, deadline: float, spent: Callable[[], None] = lambda: None) -> None:
        """Measure until nothing more is expected, or the clock is at the deadline.

        What looks best is measured at the end whatever the deadline; so it is when an interrupt (control-C) ends the
        search. Another one is raised.

        Args:
            deadline: on the clock. A default whose turn does not come before is left to the next run, but one is
                measured whatever the deadline.
            spent: called whenever some time has been spent.
        """
        for report in self.reports:
            report.study.recover()
        try:
            self._measure_defaults(deadline, spent)
            self._share_out()
            self._search(deadline, spent)
        except KeyboardInterrupt:
            self.interrupted = True
            self._share_out()
            self._interrupt()
        for report in self.reports:
            if self._default_trial(report) is None:
                continue  # not reached, or another process is at it: who knows what is to be expected
            report.settled = self._promise(report) < _WORTH
            self._conclude(report)
            spent()

    def results(self) -> Records:
        """What was found, as records."""
        return Records(self._record(report) for report in self.reports if report.gain is not None)

    def withdraw(self, function: str) -> None:
        """Take back what was found of a function's kernels, since the whole model does not bear it out.

        Should more of them be tried, it may be found again.
        """
        for report in self.reports:
            if report.kernel.function == function and report.best:
                done = _NO_GAIN | {"trials": len(report.study.trials())}
                report.study.note("concluded", done)
                report.take(done)

    def gains(self) -> dict[str, float]:
        """The part of each function's tuned kernels' time that the best candidates save."""
        saved: dict[str, float] = {}
        for report in self.reports:
            ratio = report.gain.ratio if report.gain else self._best(report)
            function = report.kernel.function
            saved[function] = saved.get(function, 0.0) + report.share * (1.0 - min(1.0, ratio))
        return saved

    def _report(self, kernel: Kernel, emit: Emit, journal: Journal) -> KernelReport:
        space = Space.of(kernel.site, emit, self._keep_bits, kernel.runs)
        structure, shape = structure_of(kernel.site)
        symbols = {**kernel.sizes, "T": kernel.cached}
        sizes = ",".join(f"{k}={v}" for k, v in sorted(symbols.items()))
        numerics = "same" if self._keep_bits else "any"
        where = f"{self._device.name} | {self._device.machine} | {self._device.tools}"
        name = f"{where} | {numerics} | {sizes} | {kernel.default.name}"
        if self._device.predicted_by:
            name = f"{self._device.predicted_by} | {name}"
        about = {"structure": structure, "shape": list(shape), "function": kernel.function}
        study = journal.study(name, space.tunables, about)
        report = KernelReport(kernel, study, space)
        relatives = self._records.relatives(structure, self._device.name)
        self._searches[name] = Search(space, study, seeds(relatives, shape, space))
        return report

    def _measure_defaults(self, deadline: float, spent: Callable[[], None]) -> None:
        """Measure what defaults are not measured yet until the deadline, but one whatever that is.

        Some are compiled together, since that is quicker: twice as many each time, as far as they are expected to be
        measured by the deadline.
        """
        waiting = []
        for report in self.reports:
            self._take_default(report)
            if self._default_trial(report) is None:
                waiting.append(report)
        if not waiting:
            return
        waiting = self._by_least_share(waiting)
        started, done, any_known = self._clock(), 0, len(waiting) < len(self.reports)
        size = _FIRST if started < deadline else 1
        while done < len(waiting) and not self._is_over(deadline, any_known):
            together = waiting[done : done + size]
            self._prepare([report.kernel for report in together])
            for report in together:
                if self._is_over(deadline, any_known):
                    return
                self._try(report, [Candidate({}, report.kernel.default)])
                self._take_default(report)
                spent()
                done, any_known = done + 1, True
            now = self._clock()
            fitting = (deadline - now) * done / max(now - started, _LEAST_COST)
            size = int(max(1, min(2 * size, fitting)))

    def _is_over(self, deadline: float, any_known: bool) -> bool:
        return any_known and self._clock() >= deadline

    def _by_least_share(self, reports: Sequence[KernelReport]) -> list[KernelReport]:
        """Kernels by the part of their function's time that a roofline leaves them, the largest first."""
        totals: dict[str, float] = {}
        for kernel in (report.kernel for report in self.reports):
            least = kernel.least * kernel.launches
            totals[kernel.function] = totals.get(kernel.function, 0.0) + least

        def share(report: KernelReport) -> float:
            kernel = report.kernel
            return kernel.least * kernel.launches / (totals[kernel.function] or 1.0)

        return sorted(reports, key=share, reverse=True)

    def _search(self, deadline: float, spent: Callable[[], None]) -> None:
        """Try candidates of whatever kernel most is expected from, until the deadline or nothing is."""
        while self._clock() < deadline:
            promising = [r for r in self.reports if self._promise(r) >= _WORTH]
            if not promising:
                return
            self._batch(max(promising, key=self._worth), deadline)
            spent()

    def _take_default(self, report: KernelReport) -> None:
        """Take over what the journal knows of a kernel's default."""
        default = self._default_trial(report)
        if default is not None and default.seconds:
            report.seconds = statistics.median(default.seconds)
        report.settled = bool(report.study.about.get("settled"))

    def _default_trial(self, report: KernelReport) -> Trial | None:
        """The trial of the default, if it was tried."""
        found = (t for t in report.study.trials() if t.kernels == report.name)
        return next(found, None)

    def _share_out(self) -> None:
        totals: dict[str, float] = {}
        for report in self.reports:
            totals[report.kernel.function] = totals.get(report.kernel.function, 0.0) + _whole(
                report
            )
        for report in self.reports:
            report.share = _whole(report) / (totals[report.kernel.function] or 1.0)

    def _promise(self, report: KernelReport) -> float:
        """Part of its function's time that the next candidates of a kernel are expected to gain."""
        if report.settled or not report.seconds or not report.space.tunables:
            return 0.0
        trials = report.study.trials()
        untried = report.space.size - len(trials)
        room = 1.0 - report.kernel.least / report.seconds
        return report.share * max(0.0, min(room, expected_gain(trials, untried)))

    def _worth(self, report: KernelReport) -> float:
        """What is expected of a kernel for each second; one that nothing was tried of yet goes first."""
        costs = [t.cost for t in report.study.trials() if t.kernels != report.name]
        cost = statistics.fmean(costs) if costs else 0.0
        return self._promise(report) / max(_LEAST_COST, cost)

    def _batch(self, report: KernelReport, deadline: float) -> None:
        candidates = self._searches[report.study.name].next(BATCH)
        if not candidates:
            report.settled = True
            return
        self._try(report, candidates)
        trials = report.study.trials()
        told = Told(
            report.name, self._best(report), len(trials), self.gains(), deadline - self._clock()
        )
        self._tell(told)

    def _try(self, report: KernelReport, candidates: Sequence[Candidate]) -> None:
        """Take candidates through compiling, checking and timing; each leaves a trial."""
        started, study = self._clock(), report.study
        opened = [(study.begin(c.schedule), c) for c in candidates]
        mine = [(number, c) for number, c in opened if number is not None]
        if not mine:
            return

        def cost() -> float:
            return (self._clock() - started) / len(mine)

        bench = report.kernel.bench()
        plans = {c.plan.name: c.plan for _, c in mine}
        compiled = bench.compile([report.kernel.default, *plans.values()])
        right: list[tuple[int, Candidate, Finding]] = []
        for number, candidate in mine:
            name = candidate.plan.name
            finding = compiled.get(name) or bench.check(candidate.plan)
            if finding.outcome == "ok":
                right.append((number, candidate, finding))
            else:
                study.finish(number, name, finding.outcome, cost=cost(), message=finding.message)
        self._time(report, bench, right, cost)

    def _time(
        self,
        report: KernelReport,
        bench: Bench,
        right: Sequence[tuple[int, Candidate, Finding]],
        cost: Callable[[], float],
    ) -> None:
        """Time checked candidates beside the default; one by one where they fail together."""
        study, default = report.study, report.kernel.default
        if not right:
            return
        others = [c.plan for _, c, _ in right if c.plan.name != default.name]
        rounds = _rounds(report.seconds, len(others) + 1, _ROUNDS, _BATCH_SECONDS)
        times = bench.time([default, *others], rounds, seed=right[0][0])
        if isinstance(times, Finding):
            if len(right) > 1:
                for one in right:
                    self._time(report, bench, [one], cost)
                return
            number, candidate, _ = right[0]
            study.finish(
                number, candidate.plan.name, times.outcome, cost=cost(), message=times.message
            )
            return
        by_name = dict(zip([default.name, *(p.name for p in others)], times, strict=True))
        for number, candidate, finding in right:
            seconds = by_name[candidate.plan.name]
            study.finish(
                number,
                candidate.plan.name,
                "ok",
                ratio=ratio_of_times(seconds, by_name[default.name]).ratio,
                seconds=seconds,
                equal=finding.equal,
                cost=cost(),
            )

    def _conclude(self, report: KernelReport) -> None:
        """Measure the best again, unless that was done with the same candidates or the default has no time."""
        if report.settled:
            report.study.note("settled", True)
        if not report.seconds:
            return
        trials = report.study.trials()
        done = report.study.about.get("concluded")
        if done is None or done["trials"] != len(trials):
            last = self._last_measurement(report, trials)
            if last is None:
                return  # the next run measures again
            done = last | {"trials": len(trials)}
            report.study.note("concluded", done)
        report.order = _order(report, trials)
        report.take(done)

    def _last_measurement(
        self, report: KernelReport, trials: Sequence[Trial]
    ) -> dict[str, Any] | None:
        """The finalists beside the default: the fastest that is faster beyond doubt, else the default.

        None if that could not be measured.
        """
        faster = sorted(
            (
                t
                for t in trials
                if t.ratio is not None and t.ratio < 1.0 and (t.equal or not self._keep_bits)
            ),
            key=lambda t: t.ratio or 0,
        )
        plans = [(t, report.space.plan(t.schedule)) for t in faster[:_FINALISTS]]
        finalists = [(t, plan) for t, plan in plans if plan is not None]
        if not finalists:
            return _NO_GAIN
        bench = report.kernel.bench()
        together = [report.kernel.default, *(plan for _, plan in finalists)]
        if bench.compile(together):
            return _NO_GAIN
        rounds = _rounds(report.seconds, len(together), _FINAL_ROUNDS, _FINAL_SECONDS)
        times = bench.time(together, rounds, seed=len(trials))
        if isinstance(times, Finding):
            return None
        compared = [
            (ratio_of_times(seconds, times[0]), trial)
            for seconds, (trial, _) in zip(times[1:], finalists, strict=True)
        ]
        interval, trial = min(compared, key=lambda c: c[0].ratio)
        if not interval.is_gain or interval.ratio > self._least_claim:
            return _NO_GAIN
        return {
            "schedule": report.space.essential(schedule_changes(report.space, trial.schedule)),
            "equal": trial.equal,
            **dataclasses.asdict(interval),
        }

    @property
    def _least_claim(self) -> float:
        """The largest ratio that is claimed as a gain."""
        return _TOLD_APART if self._device.predicted_by else 1.0

    def _best(self, report: KernelReport) -> float:
        ratios = [t.ratio for t in report.study.trials() if t.ratio is not None]
        return min([1.0, *ratios])

    def _record(self, report: KernelReport) -> Record:
        assert report.gain is not None
        structure, shape = structure_of(report.kernel.site)
        space, trials = report.space, report.study.trials()
        defaults = {t.name: t.default for t in space.tunables}
        same = report.equal and space.keeps_bits(report.best)
        return Record(
            kernel=report.name,
            device=self._device.name,
            tools=self._device.tools,
            structure=structure,
            shape=shape,
            sizes=dict(report.kernel.sizes),
            schedule=dict(report.best),
            numerics="same" if same else "any",
            ratio=report.gain.ratio,
            low=report.gain.low,
            high=report.gain.high,
            seconds=(report.seconds, report.seconds * report.gain.ratio),
            trials=len(trials),
            origin=self._device.origin,
            machine=self._device.machine,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            defaults=defaults,
            tried=compact((_changes(t, defaults), t.ratio) for t in trials if t.ratio is not None),
        )


def _changes(trial: Trial, defaults: Schedule) -> Schedule:
    """The settings of a trial that differ from the defaults, whether they matter or not."""
    return {k: v for k, v in trial.schedule.items() if v != defaults.get(k)}


def _order(report: KernelReport, trials: Sequence[Trial]) -> float | None:
    """How well predicted times rank a kernel's candidates."""
    predicts = report.kernel.predicts
    timed = [t for t in trials if t.seconds]
    if predicts is None or len(timed) < _RANKED:
        return None
    plans = {t.number: report.space.plan(t.schedule) for t in timed}
    pairs = [
        (predicts(plan), statistics.median(t.seconds))
        for t in timed
        if (plan := plans[t.number]) is not None
    ]
    found = rank_correlation(*zip(*pairs, strict=True)) if len(pairs) >= _RANKED else math.nan
    return None if math.isnan(found) else found


def _whole(report: KernelReport) -> float:
    """Seconds of a step that a kernel takes."""
    return report.seconds * report.kernel.launches


def _rounds(seconds: float, together: int, bounds: tuple[int, int], wanted: float) -> int:
    """Rounds that take about as long as wanted."""
    each = together * (seconds + _ROUND_SECONDS)
    return int(min(max(wanted / each, bounds[0]), bounds[1]))
