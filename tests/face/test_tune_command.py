"""`nemoc tune`: what its options ask for, and what it prints. Nothing is tuned."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemoc.__main__ import main
from nemoc.autotune.journal import Journal
from nemoc.autotune.records import Records
from nemoc.autotune.statistics import Interval
from nemoc.autotune.tuner import KernelReport, Tuner
from nemoc.codegen.bench import Outcome
from nemoc.codegen.plan import Kernel as Source
from nemoc.codegen.plan import Plan, Stage
from nemoc.codegen.tunables import Schedule
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


def became_faster(kernel: KernelReport, schedule: Schedule, ratio: float) -> None:
    """Note that a kernel gained."""
    tried(kernel, 1)
    kernel.seconds, kernel.share, kernel.best = 71.1e-6, 0.75, schedule
    kernel.gain = Interval(ratio, ratio - 0.011, ratio + 0.012)


def renamed(kernel: KernelReport, *stages: str) -> KernelReport:
    """A kernel whose plan launches kernels of these names."""
    made = tuple(Stage(Source(name, name, 1), ()) for name in stages)
    return dataclasses.replace(
        kernel, kernel=dataclasses.replace(kernel.kernel, default=Plan(made))
    )


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


LONG = {"panels": 2, "rows": 16, "columns": 8, "distance_of_prefetch": 24, "unroll": 4}


@pytest.mark.parametrize("columns", [80, 40])
def test_no_cell_is_cut_on_narrow_consoles(
    columns: int,
    found: TuneReport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    first = renamed(found.kernels[0], "fused_linear_0260e1a645")
    second = renamed(found.kernels[1], "decode_attention_parts_7c592c7834", "merge_bbe1c93112")
    became_faster(first, LONG, 0.812)
    became_faster(second, {"tile": 4}, 0.934)
    out = printed(dataclasses.replace(found, kernels=(first, second)), capsys)
    head, rule, *lines = out[out.index("decode ") :].splitlines()
    assert head.split() == ["decode", "share", "default", "tried", "tuned", "(95", "%)"]
    table = lines[: lines.index("")]
    assert all(len(line.rstrip()) <= max(columns, len(rule)) for line in (head, *table))
    assert len(rule) <= 80
    numbers = [line.split()[1:] for line in table if "%" in line]
    assert [" ".join(row[-8:]) for row in numbers] == [
        "75% 71.1 µs 3 0.812 (0.801 to 0.824)",
        "75% 71.1 µs 3 0.934 (0.923 to 0.946)",
    ]
    names = "".join(line[: head.index("share")].strip() for line in table).replace(" ", "")
    assert names == "".join(
        (
            "fused_linear_0260e1a645",
            ",".join(f"{k}={v}" for k, v in LONG.items()),
            "decode_attention_parts_7c592c7834+merge_bbe1c93112",
            "tile=4",
        )
    )


def test_headings_are_whole_where_nothing_gained(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    for kernel in found.kernels:
        tried(kernel, 1)
        kernel.seconds, kernel.share, kernel.gain = 1e-3, 0.5, Interval(1.0, 1.0, 1.0)
    out = printed(found, capsys)
    head = next(line for line in out.splitlines() if line.startswith("decode"))
    assert head.split() == ["decode", "share", "default", "tried", "tuned", "(95", "%)"]
    assert out.count("no gain") == 2


def test_each_step_has_a_table_of_its_own(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    for kernel in found.kernels:
        tried(kernel, 1)
    first, second = found.kernels
    prompts = dataclasses.replace(
        second, kernel=dataclasses.replace(second.kernel, function="prefill")
    )
    out = printed(dataclasses.replace(found, kernels=(first, prompts)), capsys)
    decode, prefill = out[out.index("decode  ") :].split("\nprefill ", 1)
    assert first.name in decode and second.name not in decode
    assert second.name in prefill and first.name not in prefill


def test_kernels_that_were_not_reached_are_counted(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = found.kernels
    number = first.study.begin({})
    assert number is not None
    first.study.finish(number, first.name, "ok", ratio=1.0)
    first.gain = Interval(1.0, 1.0, 1.0)
    out = printed(dataclasses.replace(found, finished=False), capsys)
    assert "Kernels not reached: 1 of decode; their defaults were not measured" in out
    assert "The budget ended before the search; a larger one goes on from here" in out
    assert "not searched" in out and second.name not in out


def test_a_step_in_which_nothing_changed_is_said_to_be_so(
    found: TuneReport, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"prefill": Interval(0.9, 0.8, 0.95), "decode": None}
    lines = printed(dataclasses.replace(found, whole=whole), capsys).splitlines()
    assert "decode of the whole model, relative to the defaults: nothing changed" in lines
    assert any(line.endswith("0.900 (0.800 to 0.950), faster") for line in lines)


def test_an_interrupted_run_prints_what_it_found_and_has_the_code_of_interruption(
    found: TuneReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became_faster(found.kernels[0], {"tile": 4}, 0.8)
    told = []

    def tune(source: str, *, interrupt: Callable[[], None], **options: Any) -> TuneReport:
        interrupt()
        told.append(capsys.readouterr().err)
        return dataclasses.replace(found, interrupted=True, finished=False)

    monkeypatch.setattr("nemoc.commands.tune.tune", tune)
    assert main(["tune", "sample", "-q"]) == 130
    assert told == [
        "  interrupted: the best so far is measured once more; control-C again stops at once\n"
    ]
    printed = capsys.readouterr()
    assert "0.800 (0.789 to 0.812)" in printed.out and "tile=4" in printed.out
    assert "Stopped by an interrupt; the same command goes on from here" in printed.out
    assert "The whole model is not compared" in printed.out
    assert "budget ended" not in printed.out
    assert printed.err.strip() == "nemoc: interrupted"


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
