"""Tuning on paper: what is tried with which budget, what is claimed, and what is left when a run ends early."""

import dataclasses
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from nemoc.autotune.journal import Journal
from nemoc.autotune.statistics import rank_correlation, ratio_of_times
from nemoc.autotune.tuner import BATCH, Told, Tuner
from nemoc.codegen.bench import Finding
from nemoc.codegen.plan import Plan
from support.paper_kernels import DEVICE, PaperBench, emit, paper_kernel, paper_seconds, settings_of

EVER = float("inf")
LEGAL = 2 * (4 * 3 - 1)
"""Distinct legal kernels of a paper site."""


def tuner(
    folder: Path,
    bench: PaperBench,
    widths: Sequence[int] = (16,),
    keep_bits: bool = False,
    told: list[Told] | None = None,
) -> Tuner:
    return Tuner(
        [paper_kernel(width, bench) for width in widths],
        emit,
        DEVICE,
        Journal(folder / "journal.log"),
        keep_bits=keep_bits,
        tell=(told if told is not None else []).append,
    )


def test_best_schedule_is_found_and_recorded(tmp_path: Path) -> None:
    made = tuner(tmp_path, PaperBench())
    made.run(EVER)
    (record,) = made.results()
    assert record.schedule == {"tile": 4, "unroll": 2, "chains": 2}
    assert record.ratio == pytest.approx(0.8 / (1.4 * 1.1), rel=0.01)
    assert record.high < 1.0
    assert (record.numerics, record.origin) == ("any", "measured")
    assert made.gains()["decode"] == pytest.approx(1 - record.ratio, rel=0.01)


def test_what_the_whole_model_does_not_bear_out_is_taken_back_for_good(tmp_path: Path) -> None:
    made = tuner(tmp_path, PaperBench())
    made.run(EVER)
    made.withdraw("prefill")  # another function
    (claimed,) = made.results()
    assert claimed.schedule
    made.withdraw("decode")
    again = tuner(tmp_path, PaperBench())
    again.run(EVER)
    for run in (made, again):
        (record,) = run.results()
        assert (record.schedule, record.numerics) == ({}, "same")
        assert (record.ratio, record.low, record.high) == (1.0, 1.0, 1.0)
        assert record.trials == claimed.trials


def test_tuning_that_keeps_bits_tries_nothing_else(tmp_path: Path) -> None:
    bench = PaperBench()
    made = tuner(tmp_path, bench, keep_bits=True)
    made.run(EVER)
    assert all(settings_of(p)["chains"] == 1 for p in _plans(made))
    (record,) = made.results()
    assert (record.numerics, record.schedule) == ("same", {"tile": 4, "unroll": 2})


def test_no_candidate_is_measured_twice(tmp_path: Path) -> None:
    bench = PaperBench()
    made = tuner(tmp_path, bench)
    made.run(EVER)
    kernels = [t.kernels for t in made.reports[0].study.trials()]
    assert len(kernels) == len(set(kernels))


def test_second_run_spends_nothing(tmp_path: Path) -> None:
    tuner(tmp_path, PaperBench()).run(EVER)
    bench = PaperBench()
    again = tuner(tmp_path, bench)
    assert again.is_settled
    again.run(EVER)
    assert bench.tried == []
    (record,) = again.results()
    assert record.schedule == {"tile": 4, "unroll": 2, "chains": 2}


def test_machines_of_one_device_name_share_no_trials(tmp_path: Path) -> None:
    tuner(tmp_path, PaperBench()).run(EVER)
    bench = PaperBench()
    other = Tuner(
        [paper_kernel(16, bench)],
        emit,
        dataclasses.replace(DEVICE, machine="another sheet"),
        Journal(tmp_path / "journal.log"),
        keep_bits=False,
    )
    assert not other.is_settled and other.reports[0].study.trials() == []
    other.run(EVER)
    assert len(set(bench.tried)) == LEGAL
    (record,) = other.results()
    assert (record.device, record.machine) == (DEVICE.name, "another sheet")
    assert len(tuner(tmp_path, PaperBench()).reports[0].study.trials()) == LEGAL


def test_deadline_ends_the_search_and_the_next_run_goes_on(tmp_path: Path) -> None:
    seconds = itertools.count()
    made = Tuner(
        [paper_kernel(16, PaperBench())],
        emit,
        DEVICE,
        Journal(tmp_path / "journal.log"),
        keep_bits=False,
        clock=lambda: float(next(seconds)),
    )
    made.run(deadline=12.0)
    some = {t.kernels for t in made.reports[0].study.trials()}
    assert 1 < len(some) < LEGAL and not made.reports[0].settled
    bench = PaperBench()
    tuner(tmp_path, bench).run(EVER)
    assert some.isdisjoint(bench.tried[: LEGAL - len(some)])


def test_default_that_is_best_is_the_result(tmp_path: Path) -> None:
    def slower(settings: Mapping[str, int]) -> float:
        default = settings == {"tile": 2, "unroll": 1, "chains": 1}
        return 1e-3 if default else 1.3e-3

    made = tuner(tmp_path, PaperBench(slower))
    made.run(EVER)
    (record,) = made.results()
    assert record.schedule == {} and record.ratio == 1.0 and record.numerics == "same"


@pytest.mark.parametrize(("part", "tried"), [(1.01, 1), (0.5, LEGAL)])
def test_only_the_default_is_tried_of_a_kernel_that_is_at_its_roof(
    part: float, tried: int, tmp_path: Path
) -> None:
    bench = PaperBench()
    kernel = paper_kernel(16, bench)
    least = part * paper_seconds(settings_of(kernel.default))
    made = Tuner(
        [dataclasses.replace(kernel, least=least)],
        emit,
        DEVICE,
        Journal(tmp_path / "journal.log"),
        keep_bits=False,
    )
    made.run(EVER)
    assert made.is_settled
    assert len(set(bench.tried)) == tried


def test_gain_that_is_noise_is_not_claimed(tmp_path: Path) -> None:
    """Every candidate is as fast as the default; the best of many lucky measurements is found out."""
    noise = random.Random(7)

    class Noisy(PaperBench):
        def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]]:
            return [[1e-3 * noise.lognormvariate(0, 0.05) for _ in range(rounds)] for _ in plans]

    claimed = 0
    for number in range(6):
        made = tuner(tmp_path / str(number), Noisy())
        made.run(EVER)
        claimed += bool(next(iter(made.results())).schedule)
    assert claimed <= 2


def test_budget_goes_to_the_kernel_that_is_most_of_the_model(tmp_path: Path) -> None:
    bench = PaperBench()
    told: list[Told] = []
    kernels = [paper_kernel(16, bench, launches=1), paper_kernel(32, bench, launches=50)]
    journal = Journal(tmp_path / "journal.log")
    made = Tuner(kernels, emit, DEVICE, journal, keep_bits=False, tell=told.append)
    made.run(EVER)
    assert told[0].kernel == kernels[1].default.name
    assert made.reports[1].share == pytest.approx(50 / 51)


@pytest.mark.parametrize("kind", ["compile", "wrong", "crash", "hang", "memory"])
def test_faulty_candidates_are_named_and_never_chosen(kind: str, tmp_path: Path) -> None:
    def faults(settings: Mapping[str, int]) -> Finding | None:
        if settings["tile"] != 4:
            return None
        return Finding(kind, message=f"planted {kind}")  # type: ignore[arg-type]

    made = tuner(tmp_path, PaperBench(faults=faults))
    made.run(EVER)
    (record,) = made.results()
    assert record.schedule.get("tile") != 4
    faulty = [t for t in made.reports[0].study.trials() if t.outcome == kind]
    assert faulty and {t.message for t in faulty} == {f"planted {kind}"}


def test_candidate_that_fails_among_others_is_found(tmp_path: Path) -> None:
    """One that is right alone, but brings its process down when it is timed."""

    class Fragile(PaperBench):
        def time(
            self, plans: Sequence[Plan], rounds: int, seed: int
        ) -> list[list[float]] | Finding:
            if any(settings_of(plan)["tile"] == 4 for plan in plans):
                return Finding("crash", message="ended with SIGSEGV")
            return super().time(plans, rounds, seed)

    made = tuner(tmp_path, Fragile())
    made.run(EVER)
    outcomes = {t.schedule["tile"]: t.outcome for t in made.reports[0].study.trials()}
    assert outcomes == {1: "ok", 2: "ok", 4: "crash", 8: "ok"}


@pytest.mark.parametrize("kind", ["compile", "wrong", "crash"])
def test_kernel_whose_default_fails_is_left_alone(kind: str, tmp_path: Path) -> None:
    """It has no time that anything could be compared with: no record says otherwise, and nothing is tried again."""

    def faults(settings: Mapping[str, int]) -> Finding | None:
        default = settings == {"tile": 2, "unroll": 1, "chains": 1}
        return Finding(kind, message="planted") if default else None  # type: ignore[arg-type]

    made = tuner(tmp_path, PaperBench(faults=faults))
    made.run(EVER)
    assert len(made.results()) == 0 and made.is_settled
    assert [t.outcome for t in made.reports[0].study.trials()] == [kind]
    bench = PaperBench(faults=faults)
    tuner(tmp_path, bench).run(EVER)
    assert bench.tried == []


def test_kernel_that_another_process_has_begun_is_not_settled(tmp_path: Path) -> None:
    other = tuner(tmp_path, PaperBench())
    assert other.reports[0].study.begin({}) == 0
    made = tuner(tmp_path, PaperBench())
    made.run(EVER)
    assert len(made.results()) == 0 and not made.is_settled


def test_candidate_that_does_not_keep_bits_after_all_is_not_taken_where_it_must(
    tmp_path: Path,
) -> None:
    """Whatever a tunable says of itself, what counts is what was seen."""

    class Liar(PaperBench):
        def check(self, plan: Plan) -> Finding:
            return Finding("ok", equal=settings_of(plan)["tile"] != 4)

    made = tuner(tmp_path, Liar(), keep_bits=True)
    made.run(EVER)
    (record,) = made.results()
    assert record.numerics == "same" and record.schedule == {"unroll": 2}


PAIRS = ((2, 1), (2, 2), (4, 1), (1, 1), (8, 1), (4, 2))
"""Tile and unroll of some kernels, the default's first."""


def predicted(
    folder: Path, predicts: Callable[[Plan], float] | None, right: Sequence[tuple[int, int]] = PAIRS
) -> Tuner:
    """A tuner that has run, of one kernel with these predictions. What has one of these tiles and unrolls is right,
    nothing else is, and nothing is tried that changes bits."""

    def faults(settings: Mapping[str, int]) -> Finding | None:
        is_right = (settings["tile"], settings["unroll"]) in right
        return None if is_right else Finding("wrong", message="planted")

    kernel = dataclasses.replace(paper_kernel(16, PaperBench(faults=faults)), predicts=predicts)
    made = Tuner([kernel], emit, DEVICE, Journal(folder / "journal.log"), keep_bits=True)
    made.run(EVER)
    return made


@pytest.mark.parametrize(("sign", "order"), [(1, 1.0), (-1, -1.0)])
def test_predictions_are_ranked_against_what_was_measured(
    sign: int, order: float, tmp_path: Path
) -> None:
    """Only order counts, not how far times lie apart."""

    def predicts(plan: Plan) -> float:
        return sign * (1e3 * paper_seconds(settings_of(plan))) ** 9

    for _ in range(2):  # a second run has nothing left to measure
        (report,) = predicted(tmp_path, predicts).reports
        assert report.order == pytest.approx(order)


@pytest.mark.parametrize(("count", "is_ranked"), [(4, False), (5, True)])
def test_few_candidates_rank_nothing(count: int, is_ranked: bool, tmp_path: Path) -> None:
    """Nothing is predicted of a candidate that was not timed: it may not even compile."""
    right, asked = PAIRS[:count], set()

    def predicts(plan: Plan) -> float:
        settings = settings_of(plan)
        asked.add((settings["tile"], settings["unroll"]))
        return paper_seconds(settings)

    (report,) = predicted(tmp_path, predicts, right).reports
    outcomes = [t.outcome for t in report.study.trials()]
    assert outcomes.count("ok") == count and "wrong" in outcomes
    assert (report.order is not None) is is_ranked
    assert asked == (set(right) if is_ranked else set())


def test_without_a_telling_prediction_there_is_no_order(tmp_path: Path) -> None:
    assert predicted(tmp_path / "none", None).reports[0].order is None
    assert predicted(tmp_path / "constant", lambda plan: 1.0).reports[0].order is None


def interrupted_at(number: int) -> PaperBench:
    """A bench that is interrupted as it is about to time for that time."""
    turns = itertools.count(1)

    def interrupt(plans: Sequence[Plan]) -> None:
        if next(turns) == number:
            raise KeyboardInterrupt

    return PaperBench(before_timing=interrupt)


def test_interrupt_ends_the_search_with_what_is_best_so_far(tmp_path: Path) -> None:
    made = tuner(tmp_path, interrupted_at(3))
    made.run(EVER)
    (record,) = made.results()
    assert record.ratio < 1.0 and not made.reports[0].settled


def test_an_interrupt_is_told_of_before_the_best_is_measured_again(tmp_path: Path) -> None:
    """A real one, from the keyboard, comes as this signal."""
    events: list[str] = []

    def note(plans: Sequence[Plan]) -> None:
        events.append("timing")
        if len(events) == 3:
            signal.raise_signal(signal.SIGINT)

    made = Tuner(
        [paper_kernel(16, PaperBench(before_timing=note))],
        emit,
        DEVICE,
        Journal(tmp_path / "journal.log"),
        keep_bits=False,
        interrupt=lambda: events.append("told"),
    )
    # Whoever runs tests side by side has them ignore it.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        made.run(EVER)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert made.interrupted
    assert events == ["timing", "timing", "timing", "told", "timing"]


def test_a_second_interrupt_is_raised_at_once(tmp_path: Path) -> None:
    timings = 0

    def interrupt(plans: Sequence[Plan]) -> None:
        nonlocal timings
        timings += 1
        if timings >= 3:
            raise KeyboardInterrupt

    made = tuner(tmp_path, PaperBench(before_timing=interrupt))
    with pytest.raises(KeyboardInterrupt):
        made.run(EVER)
    assert timings == 4
    again = tuner(tmp_path, PaperBench())
    assert len(again.reports[0].study.trials()) > 1
    again.run(EVER)
    assert again.is_settled and not again.interrupted


def test_an_interrupt_among_the_defaults_leaves_the_others_to_the_next_run(tmp_path: Path) -> None:
    made = tuner(tmp_path, interrupted_at(2), widths=(16, 32, 48))
    made.run(EVER)
    assert made.interrupted and not made.is_settled
    assert [r.reached for r in made.reports] == [True, False, False]
    again = tuner(tmp_path, PaperBench(), widths=(16, 32, 48))
    again.run(EVER)
    # The second was in flight, and this process, whose trial it is, has not ended.
    assert [r.reached for r in again.reports] == [True, False, True]


@dataclasses.dataclass
class Clock:
    """A clock that goes on where it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def on_the_clock(
    folder: Path, clock: Clock, leasts: Sequence[float], prepared: list[int] | None = None
) -> tuple[Tuner, PaperBench]:
    """A tuner of as many kernels with these least times; each measurement takes a second of the clock."""

    def take(plans: Sequence[Plan]) -> None:
        clock.now += 1.0

    bench = PaperBench(before_timing=take)
    kernels = [
        dataclasses.replace(paper_kernel(16 * i, bench), least=least)
        for i, least in enumerate(leasts, start=1)
    ]
    made = Tuner(
        kernels,
        emit,
        DEVICE,
        Journal(folder / "journal.log"),
        keep_bits=False,
        prepare=lambda kernels: (prepared if prepared is not None else []).append(len(kernels)),
        clock=clock,
    )
    return made, bench


LEASTS = (1e-4, 5e-4, 2e-4, 4e-4, 3e-4)


def test_defaults_are_measured_until_the_deadline_by_their_least_times(tmp_path: Path) -> None:
    made, _ = on_the_clock(tmp_path, Clock(), LEASTS)
    made.run(deadline=3.0)
    assert [r.reached for r in made.reports] == [False, True, False, True, True]
    assert [len(r.study.trials()) for r in made.reports] == [0, 1, 0, 1, 1]
    assert [r.share for r in made.reports] == pytest.approx([0.0, 1 / 3, 0.0, 1 / 3, 1 / 3])
    assert not made.is_settled
    assert len(made.results()) == 3


def test_defaults_that_were_not_reached_are_all_that_the_next_run_measures_of_defaults(
    tmp_path: Path,
) -> None:
    on_the_clock(tmp_path, Clock(), LEASTS)[0].run(deadline=3.0)
    made, bench = on_the_clock(tmp_path, Clock(), LEASTS)
    made.run(deadline=2.0)
    assert all(r.reached for r in made.reports)
    assert made.reports[0].share == pytest.approx(1 / 5)
    assert bench.tried == [made.reports[i].name for i in (2, 0)]


def test_share_of_a_step_says_whose_default_comes_first(tmp_path: Path) -> None:
    """A short step's largest kernel comes before the second one of a long step."""
    made, _ = on_the_clock(tmp_path, Clock(), (3e-4, 7e-4, 1e-5))
    made.reports[2].kernel = dataclasses.replace(made.reports[2].kernel, function="prefill")
    made.run(deadline=2.0)
    assert [r.reached for r in made.reports] == [False, True, True]


def test_launches_count_for_whose_default_comes_first(tmp_path: Path) -> None:
    made, _ = on_the_clock(tmp_path, Clock(), (3e-4, 7e-4))
    made.reports[0].kernel = dataclasses.replace(made.reports[0].kernel, launches=5)
    made.run(deadline=1.0)
    assert [r.reached for r in made.reports] == [True, False]


def test_one_default_is_measured_whatever_the_deadline(tmp_path: Path) -> None:
    prepared: list[int] = []
    made, bench = on_the_clock(tmp_path, Clock(1.0), LEASTS, prepared)
    made.run(deadline=0.0)
    assert bench.tried == [made.reports[1].name] and prepared == [1]
    again, bench = on_the_clock(tmp_path, Clock(1.0), LEASTS, prepared)
    again.run(deadline=0.0)
    assert bench.tried == [] and prepared == [1]


def test_defaults_are_compiled_more_at_a_time_as_far_as_they_fit(tmp_path: Path) -> None:
    ever: list[int] = []
    on_the_clock(tmp_path / "ever", Clock(), [1e-4] * 12, ever)[0].run(EVER)
    assert ever == [2, 4, 6]
    soon: list[int] = []
    on_the_clock(tmp_path / "soon", Clock(), [1e-4] * 12, soon)[0].run(deadline=5.0)
    assert soon == [2, 3]


def test_run_killed_ten_times_tries_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    whole = tuner(tmp_path / "whole", PaperBench(), widths=(16, 32))
    whole.run(EVER)
    log = tmp_path / "tried.txt"
    _in_forks(
        tmp_path / "killed",
        log,
        """
chance = random.Random(3)
for _ in range(10):
    pid = start(0.02)
    time.sleep(chance.uniform(0.05, 0.5))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
assert os.waitpid(start(0.0), 0)[1] == 0
""",
    )
    resumed = tuner(tmp_path / "killed", PaperBench(), widths=(16, 32))
    for report, other in zip(resumed.reports, whole.reports, strict=True):
        trials = report.study.trials()
        assert {t.kernels for t in trials} == {t.kernels for t in other.study.trials()}
        assert len(trials) == len({t.kernels for t in trials})
    # What was paid for twice was in flight when a run was killed: at most a batch each time.
    tried = log.read_text().split()
    assert len(tried) - len(set(tried)) <= 10 * BATCH


def test_two_processes_share_a_journal(tmp_path: Path) -> None:
    log = tmp_path / "tried.txt"
    _in_forks(
        tmp_path / "shared",
        log,
        """
for pid in (start(0.01), start(0.01)):
    assert os.waitpid(pid, 0)[1] == 0
""",
    )
    found = tuner(tmp_path / "shared", PaperBench(), widths=(16, 32))
    for report in found.reports:
        kernels = [t.kernels for t in report.study.trials()]
        assert len(kernels) == len(set(kernels)) > LEGAL // 2
    done = {t.kernels for r in found.reports for t in r.study.trials()}
    assert set(log.read_text().split()) <= done


_FORKS = """
import os, random, signal, sys, time
from pathlib import Path
from nemoc.autotune.journal import Journal
from nemoc.autotune.tuner import Tuner
from support.paper_kernels import DEVICE, PaperBench, emit, paper_kernel

folder, log = Path(sys.argv[1]), Path(sys.argv[2])

def start(seconds):
    pid = os.fork()
    if pid:
        return pid

    def slow(plans):
        time.sleep(seconds)
        with log.open("a") as file:
            file.writelines(plan.name + "\\n" for plan in plans[1:])
        time.sleep(seconds)

    try:
        bench = PaperBench(before_timing=slow)
        kernels = [paper_kernel(width, bench) for width in (16, 32)]
        Tuner(kernels, emit, DEVICE, Journal(folder / "journal.log"), keep_bits=False).run(float("inf"))
        os._exit(0)
    except BaseException:
        os._exit(1)
"""
"""Tunings in forks of one process, which has imported everything: `start` begins one that takes some time a batch."""


def _in_forks(folder: Path, log: Path, statements: str) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.environ["PYTHONPATH"], tests]))
    command = [sys.executable, "-c", _FORKS + statements, str(folder), str(log)]
    subprocess.run(command, env=environment, check=True, timeout=200)


def _plans(made: Tuner) -> list[Plan]:
    space = made.reports[0].space
    plans = (space.plan(t.schedule) for t in made.reports[0].study.trials())
    return [plan for plan in plans if plan is not None]


@pytest.mark.parametrize("truth", [0.9, 1.0, 1.2])
def test_interval_holds_the_true_ratio(truth: float) -> None:
    chance = np.random.default_rng(5)
    inside = 0
    for seed in range(40):
        moment = chance.lognormal(0.0, 0.3, 25)  # slow moments hit both
        others = moment * chance.lognormal(0.0, 0.05, 25)
        times = truth * moment * chance.lognormal(0.0, 0.05, 25)
        interval = ratio_of_times(times.tolist(), others.tolist(), seed)
        inside += interval.low <= truth <= interval.high
        assert interval.low <= interval.ratio <= interval.high
    assert inside >= 35


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 2, 3, 4), (-1, 10, 11, 1e9), 1.0),
        ((3, 1, 4, 2), (30, 10, 40, 20), 1.0),
        ((1, 2, 3, 4), (8, 4, 2, 1), -1.0),
        # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5).
        ((1, 7, 7, 9), (1, 2, 3, 4), math.sqrt(0.9)),
        # Ranks 2, 2, 2, 4 and 1.5, 3.5, 1.5, 3.5: 2 / sqrt(3 · 4).
        ((5, 5, 5, 6), (1, 2, 1, 2), 1 / math.sqrt(3)),
    ],
)
def test_rank_correlation(a: Sequence[float], b: Sequence[float], expected: float) -> None:
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert rank_correlation(b, a) == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [((2, 2, 2), (1, 2, 3)), ((1,), (2,)), ((), ())])
def test_what_has_no_order_correlates_with_nothing(a: Sequence[float], b: Sequence[float]) -> None:
    assert math.isnan(rank_correlation(a, b))
    assert math.isnan(rank_correlation(b, a))


def test_paper_times_have_one_best() -> None:
    assert paper_seconds({"tile": 4, "unroll": 2, "chains": 2}) == pytest.approx(0.8e-3)


def test_records_of_a_run_are_json(tmp_path: Path) -> None:
    made = tuner(tmp_path, PaperBench())
    made.run(EVER)
    (record,) = made.results()
    assert json.loads(json.dumps(record.to_json()))["device"] == DEVICE.name
