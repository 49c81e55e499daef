"""`nemoc tune`: what its options ask for, and what it prints. Nothing is tuned."""

from pathlib import Path
from typing import Any

import pytest

from nemoc.__main__ import main
from nemoc.autotune.journal import Journal
from nemoc.autotune.records import Records
from nemoc.autotune.tuner import KernelReport, Tuner
from nemoc.codegen.bench import Outcome
from nemoc.commands.tune import print_report
from nemoc.terminal import report
from nemoc.tuning import TuneReport
from nemoc.workload import Workload
from support.paper_kernels import DEVICE, PaperBench, emit, paper_kernel

SPEARMAN = "How well predicted times rank what was measured (Spearman)"


@pytest.fixture
def found(tmp_path: Path) -> TuneReport:
    """What tuning two kernels comes to before anything was tried."""
    kernels = [paper_kernel(width, PaperBench()) for width in (16, 32)]
    made = Tuner(kernels, emit, DEVICE, Journal(tmp_path / "journal.log"))
    return TuneReport(tuple(made.reports), DEVICE, Records(), {}, {}, 1.0, 0.0, True)


def tried(kernel: KernelReport, tile: int, outcome: Outcome = "ok", message: str = "") -> None:
    """Note that kernels with tiles of this size ended so, of which there are three."""
    for unroll in (1, 2, 4):
        number = kernel.study.begin({"tile": tile, "unroll": unroll})
        assert number is not None
        ratio = 1.0 if outcome == "ok" else None
        kernel.study.finish(number, f"k{number}", outcome, ratio=ratio, message=message)


def printed(found: TuneReport, capsys: pytest.CaptureFixture[str]) -> str:
    print_report(report(), found)
    return capsys.readouterr().out


def test_commonest_faults_are_named_with_their_number(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = found.kernels
    long = "an illegal memory access was encountered in [a kernel], " * 3
    tried(first, 1, "wrong", "relative error inf")
    tried(first, 2, "crash", long)
    tried(first, 4)
    tried(second, 2, "crash", long)
    tried(second, 4, "crash", long)
    tried(second, 8, "wrong", "relative error inf")
    lines = printed(found, capsys).splitlines()
    assert [line for line in lines if " faulty: " in line] == [
        f"9 faulty: {long}",
        "6 faulty: relative error inf",
    ]
    assert "18 candidates of 2 kernels, 15 of them faulty" in "\n".join(lines)


def test_rare_faults_are_left_out(found: TuneReport, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = found.kernels
    for kernel in found.kernels:
        for tile, message in ((1, "a"), (2, "b"), (4, "c")):
            tried(kernel, tile, "wrong", message)
    tried(second, 8, "wrong", "a")
    tried(first, 8, "hang", "rare")
    lines = printed(found, capsys).splitlines()
    assert [line for line in lines if " faulty: " in line] == [
        "9 faulty: a",
        "6 faulty: b",
        "6 faulty: c",
    ]


def test_without_faults_none_is_named(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(found.kernels[0], 1)
    out = printed(found, capsys)
    assert "0 of them faulty" in out and " faulty: " not in out


def test_order_of_predictions_is_printed_where_it_is_known(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = found.kernels
    tried(second, 1)
    second.order = -0.256
    head, _, table = printed(found, capsys).partition(SPEARMAN)
    assert second.name in head and first.name not in table
    (row,) = (line.split() for line in table.splitlines() if second.name in line)
    assert row == ["decode", second.name, "3", "-0.26"]


def test_an_order_of_nothing_is_printed_too(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    found.kernels[0].order = 0.0
    assert SPEARMAN in printed(found, capsys)


def test_without_an_order_there_is_no_table(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(found.kernels[0], 1)
    assert "Spearman" not in printed(found, capsys)


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        ("", Workload(256, 256, batch=1, functions=("prefill", "decode"))),
        ("--batch 4 --step decode", Workload(batch=4, functions=("decode",))),
        ("--step prefill", Workload(functions=("prefill",))),
        ("--step decode --step prefill", Workload(functions=("decode", "prefill"))),
        ("--prefill 16 --cached 8", Workload(prefill=16, cached=8)),
    ],
)
def test_workload_is_what_was_asked_for(
    arguments: str,
    work: Workload,
    found: TuneReport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, Workload]] = []

    def tune(source: str, *, workload: Workload, **options: Any) -> TuneReport:
        asked.append((source, workload))
        return found

    monkeypatch.setattr("nemoc.commands.tune.tune", tune)
    assert main(["tune", "sample", *arguments.split(), "-q"]) == 0
    assert asked == [("sample", work)]
    assert f"Kernels on {DEVICE.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--batch 0", "--batch"), ("--step train", "'train' is not one of")],
)
def test_workloads_that_do_not_exist_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "sample", *arguments.split(), "-q"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
