"""Numbers, tables and progress as users see them."""

import io

import pytest
from rich.console import Console

from nemoc.terminal import count, duration, print_table, progress, short, verdict


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "", "999"),
        (1000, "B", "1.00 kB"),
        (31_577_940_288, "", "31.6 G"),
        (1.6e9, "B", "1.60 GB"),
        (123_456_789, "", "123 M"),
        (0.25, "", "0.25"),
    ],
)
def test_short_numbers(number: float, unit: str, text: str) -> None:
    assert short(number, unit) == text


def test_counts_have_separators() -> None:
    assert count(31577940288) == "31,577,940,288"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (1.23e-5, "12.3 µs"),
        (0.0008, "0.8 ms"),
        (0.1372, "137 ms"),
        (12.34, "12.3 s"),
        (185.4, "3 min 05 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_off_a_terminal_are_plain_and_fit() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    print_table(
        console,
        ("name", ">size", "what it is"),
        [("[bold]x[/bold]", "12", "word " * 40), ("y", "3", verdict(False))],
        wrap="what it is",
    )
    text = out.getvalue()
    assert "\x1b" not in text
    assert "MISS" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("wrap", ["name", ""])
def test_tables_that_do_not_fit_are_wider_and_whole(wrap: str) -> None:
    out = io.StringIO()
    rows = [("a_kernel_0123", "1,234.5 µs", "0.812 (0.801 to 0.824)"), ("b", "", "no gain")]
    print_table(Console(file=out, width=24), ("name", ">default", ">tuned"), rows, wrap=wrap)
    head, _, *lines = out.getvalue().splitlines()
    assert head.split() == ["name", "default", "tuned"]
    assert lines[0].endswith("   1,234.5 µs   0.812 (0.801 to 0.824)")
    name = "".join(line.split()[0] for line in lines[:-1])
    assert name == "a_kernel_0123" and lines[-1].split() == ["b", "no", "gain"]


def test_a_column_is_not_narrower_than_its_heading() -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=16), ("x", "schedule"), [("1" * 12, "")], wrap="schedule")
    assert out.getvalue().splitlines()[0].split() == ["x", "schedule"]


def test_progress_in_a_log_is_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show("read", 0, 2)
        show("read", 2, 2)
        show("write", 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["  read", "  write"]


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as show:
        show("read", 0, 2)
    assert capsys.readouterr().err == ""
