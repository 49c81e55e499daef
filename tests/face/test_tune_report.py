"""The report of tuning: a page that stands for itself, with every kernel, whatever journals and records say."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from nemoc.autotune.journal import Journal, Trial
from nemoc.autotune.records import Device
from nemoc.autotune.statistics import Interval
from nemoc.autotune.tuner import Finding, Tuner
from nemoc.codegen.tunables import Tunable
from nemoc.ir.errors import NemocError
from nemoc.tune_report import explained_variance, report_html, write_report
from nemoc.tuning import TuneReport
from support.page import BAD, Page
from support.paper_kernels import PaperBench, emit, paper_kernel


def tuned(
    folder: Path,
    bench: PaperBench | None = None,
    function: str = "decode",
    device: Device | None = None,
    whole: Mapping[str, Interval] | None = None,
) -> TuneReport:
    """What tuning three kernels on paper comes to."""
    device = device or Device("paper:1, 1 thread", "pencil 1", "a sheet")
    bench = bench or PaperBench()
    kernels = [
        dataclasses.replace(paper_kernel(width, bench, launches=width), function=function)
        for width in (16, 32, 48)
    ]
    made = Tuner(kernels, emit, device, Journal(folder / "journal.log"), keep_bits=False)
    made.run(math.inf)
    return TuneReport(
        kernels=tuple(made.reports),
        device=device,
        records=made.results(),
        gains=made.gains(),
        whole=whole or {},
        spent=61.5,
        earlier=0.0,
        finished=True,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    """A run in which every kernel became faster."""
    return tuned(tmp_path_factory.mktemp("tuned"))


def test_every_kernel_is_there_with_what_came_of_it(report: TuneReport) -> None:
    head, *rows = Page(report_html(report)).cells["kernels"]
    assert head[:3] == ["Step", "Kernel", "Launches"]
    assert [row[1] for row in rows] == [k.name for k in report.kernels]
    for kernel, row in zip(report.kernels, rows, strict=True):
        assert row[2] == str(kernel.kernel.launches)
        assert row[3] == f"{kernel.share:.1%}"
        assert row[5] == str(kernel.gain)
        assert row[6] == "tile=4, unroll=2, chains=2"
        assert row[7] == str(len(kernel.study.trials()))


def test_page_needs_nothing_from_elsewhere(report: TuneReport) -> None:
    compared = dataclasses.replace(report, whole={"decode": Interval(0.7, 0.68, 0.72)})
    page = Page(report_html(compared))
    tags = {tag for tag, _ in page.attributes}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "img"})
    identifiers = [a["id"] for _, a in page.attributes if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in page.attributes:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            link = attributes.get(name) or "#kernels"
            assert link.startswith("#") and link[1:] in identifiers
        clip = attributes.get("clip-path")
        assert clip is None or clip[len("url(#") : -1] in identifiers


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    def faults(settings: Mapping[str, int]) -> Finding | None:
        return Finding("crash", message=BAD) if settings["tile"] == 8 else None

    device = Device(f"paper {BAD}", BAD, BAD)
    bench = PaperBench(faults=faults)
    whole = {BAD: Interval(1.0, 0.9, 1.1)}
    text = report_html(tuned(tmp_path, bench, function=BAD, device=device, whole=whole))
    assert "<script" not in text
    assert "<img" not in text
    page = Page(text)
    for attributes in (a for _, a in page.attributes):
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count(BAD) >= 10  # as people see it, labels of plots too


def test_faults_are_counted_by_kind(tmp_path: Path) -> None:
    def faults(settings: Mapping[str, int]) -> Finding | None:
        if settings["tile"] == 8:
            return Finding("wrong", message="error 0.5")
        return Finding("compile", message="no") if settings["unroll"] == 4 else None

    report = tuned(tmp_path, PaperBench(faults=faults))
    page = Page(report_html(report))
    trials = report.kernels[0].study.trials()
    wrong = sum(t.outcome == "wrong" for t in trials)
    compile_ = sum(t.outcome == "compile" for t in trials)
    assert wrong and compile_
    assert set(page.cells["kernels"][1][8].split(", ")) == {
        f"{wrong} wrong",
        f"{compile_} compile",
    }
    assert "error 0.5" in page.text


def test_no_gain_is_a_result(tmp_path: Path) -> None:
    def slower(settings: Mapping[str, int]) -> float:
        return 1e-3 if settings == {"tile": 2, "unroll": 1, "chains": 1} else 2e-3

    page = Page(report_html(tuned(tmp_path, PaperBench(slower))))
    assert [row[5] for row in page.cells["kernels"][1:]] == ["no gain over the default"] * 3
    summary = dict(row for row in page.cells["summary"] if len(row) == 2)
    assert summary["Whole model"].startswith("no gain over the default")
    assert summary["Numerics"] == "every bit of every result is kept"
    assert "0 kernels became faster" in summary["Kernels"]


def test_summary_says_what_became_of_the_model(report: TuneReport) -> None:
    whole = {"decode": Interval(0.7, 0.68, 0.72), "prefill": Interval(0.99, 0.97, 1.02)}
    page = Page(report_html(dataclasses.replace(report, whole=whole)))
    summary = dict(row for row in page.cells["summary"] if len(row) == 2)
    assert summary["Whole model, decode"] == "0.700 (0.680 to 0.720) of the time before: faster"
    assert "no gain over the default" in summary["Whole model, prefill"]
    assert summary["Numerics"].startswith("3 of 3 tuned kernels add in another order")
    assert summary["Time spent"].startswith("1 min 01 s now")


def test_coverage_tells_tried_values_from_others(report: TuneReport) -> None:
    page = Page(report_html(report))
    kernel = report.kernels[0]
    assert f"{len(kernel.study.trials())} of {kernel.space.size} schedules tried" in page.text
    untried = [a for _, a in page.attributes if a.get("class") == "untried"]
    tried = {(t.name, v) for t in kernel.space.tunables for v in t.values} - {
        (name, v) for trial in kernel.study.trials() for name, v in trial.schedule.items()
    }
    assert len(untried) == 3 * len(tried)


def test_a_step_in_which_nothing_changed_is_said_to_be_so_and_not_drawn(
    report: TuneReport,
) -> None:
    whole = {"prefill": Interval(0.7, 0.68, 0.72), "decode": None}
    page = Page(report_html(dataclasses.replace(report, whole=whole)))
    assert [row for row in page.cells["summary"] if row[0].startswith("Whole model")] == [
        ["Whole model, decode", "nothing changed"],
        ["Whole model, prefill", "0.700 (0.680 to 0.720) of the time before: faster"],
    ]
    assert "with intervals of 95 %" in page.text
    unchanged = dataclasses.replace(report, whole={"decode": None})
    assert "with intervals of 95 %" not in Page(report_html(unchanged)).text


@pytest.mark.parametrize(
    ("finished", "interrupted", "words"),
    [
        (True, False, "nothing more is expected of any kernel"),
        (False, False, "the budget ended before the search"),
        (False, True, "stopped by an interrupt"),
    ],
)
def test_why_the_search_ended_is_said(
    finished: bool, interrupted: bool, words: str, report: TuneReport
) -> None:
    ended = dataclasses.replace(report, finished=finished, interrupted=interrupted)
    assert words in Page(report_html(ended)).text


def test_kernels_that_were_not_reached_are_counted_and_named(tmp_path: Path) -> None:
    made = Tuner(
        [paper_kernel(width, PaperBench()) for width in (16, 32, 48)],
        emit,
        Device("paper:1, 1 thread", "pencil 1", "a sheet"),
        Journal(tmp_path / "journal.log"),
    )
    made.run(-math.inf)
    found = TuneReport(
        tuple(made.reports), made._device, made.results(), {}, {}, 1.0, 0.0, finished=False
    )
    page = Page(report_html(found))
    assert found.not_reached == {"decode": 2}
    assert "2 kernels: their defaults were not measured" in page.text
    assert [row[5] for row in page.cells["kernels"][1:]] == [
        "not searched",
        "not reached",
        "not reached",
    ]


def test_equal_runs_have_equal_reports(report: TuneReport, tmp_path: Path) -> None:
    path = tmp_path / "tune.html"
    write_report(report, path)
    assert path.read_text() == report_html(report)


def test_report_that_cannot_be_written_is_one_line(report: TuneReport, tmp_path: Path) -> None:
    with pytest.raises(NemocError, match=r"none/tune\.html: cannot be written"):
        write_report(report, tmp_path / "none" / "tune.html")


A, B, C = (Tunable(name, 0, (0, 1, 2)) for name in "abc")


def trial(number: int, schedule: Mapping[str, int], ratio: float | None) -> Trial:
    outcome = "ok" if ratio else "crash"
    return Trial(number, schedule, f"k{number}", outcome, ratio, (), True, 0.0, "")  # type: ignore[arg-type]


def test_what_explains_times_is_told_from_what_does_not() -> None:
    grid = [{"a": a, "b": b, "c": 0} for a in range(3) for b in range(3)]
    trials = [trial(i, s, math.exp(0.3 * s["a"] + 0.001 * i)) for i, s in enumerate(grid)]
    found = explained_variance([*trials, trial(9, {"a": 0, "b": 0, "c": 1}, None)], (A, B, C))
    assert found["a"] > 0.99
    assert found["b"] == 0.0
    assert "c" not in found  # only one of its values ran right
    assert explained_variance(trials[:7], (A, B, C)) == {}
    assert explained_variance([trial(i, s, 1.0) for i, s in enumerate(grid)], (A, B)) == {}
