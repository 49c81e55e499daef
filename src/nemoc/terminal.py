"""What commands print: reports to stdout as tables that fit 80 columns, progress to stderr.

On a terminal tables have colours and progress is a moving bar; elsewhere both are plain text, and progress is one
line for each finished stage, so that logs stay readable.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from nemoc.progress import Progress

GOOD, BAD = "green", "bold red"
"""Styles; a report without colours says the same."""

_GAP = 3
"""Characters between two columns of a table."""

_NARROW = 8
"""Characters to which a column whose cells may break is narrowed, if it must be."""


def report() -> Console:
    """The console for a command's answer."""
    return Console(highlight=False, markup=False, emoji=False)


def heading(console: Console, text: str) -> None:
    """A section's title."""
    console.print()
    console.print(text, style="bold")


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    wrap: str = "",
) -> None:
    """Print a table as wide as the console. Where whole cells do not fit it, lines are longer: none is ever cut.

    Args:
        console: where.
        columns: headings; one that starts with `>` belongs to a right-aligned column.
        rows: cells.
        wrap: the heading of the column whose cells may break over lines; every other stays whole.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    least = _GAP * (len(columns) - 1)
    for i, column in enumerate(columns):
        name = column.removeprefix(">")
        width = max(map(_width, (name, *(row[i] for row in rows))))
        if name == wrap:
            width = min(width, max(_NARROW, _width(name)))
        table.add_column(
            name,
            justify="right" if column != name else "left",
            no_wrap=name != wrap,
            min_width=width,
            overflow="fold",
        )
        least += width
    for row in rows:
        table.add_row(*row)
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _width(cell: str | Text) -> int:
    """Characters of a cell's longest line."""
    return max(map(cell_len, str(cell).splitlines()), default=0)


def verdict(ok: bool, yes: str = "ok", no: str = "MISS") -> Text:
    """A word that says whether something holds."""
    return Text(yes, GOOD) if ok else Text(no, BAD)


def count(number: int) -> str:
    """An integer with separators: `31,577,940,288`."""
    return f"{number:,}"


def stages(plan: str) -> str:
    """The name of a kernel's plan, such that it breaks over lines between what it launches."""
    return plan.replace("+", " + ")


def short(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: `1.60 GB` for `short(1.6e9, "B")`."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{_digits(number / size)} {prefix}{unit}".strip()
    text = f"{number:.0f}" if float(number).is_integer() else _digits(number)
    return f"{text} {unit}".strip()


def _digits(number: float) -> str:
    return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f}"


def duration(seconds: float) -> str:
    """A time: `12.3 µs`, `0.8 ms`, `137 ms`, `12.3 s`, `3 min 05 s`."""
    if 0.0 < seconds < 1e-4:
        return f"{seconds * 1e6:.1f} µs"
    if seconds < 1.0:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr while the block runs.

    Args:
        quiet: show nothing.
    """
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _Moving(bars)
    else:
        stages = _Lines()
        yield stages
        stages.finish()


def _bars() -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class _Moving:
    """Bars on a terminal, one for each stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._bars.update(task, completed=1, total=1)
                self._bars.stop_task(task)
            self._tasks[stage] = self._bars.add_task(stage, total=None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)


class _Lines:
    """One line for each finished stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.finish()
            self._stage, self._started = stage, time.perf_counter()

    def finish(self) -> None:
        """End the stage at hand."""
        if self._stage:
            took = duration(time.perf_counter() - self._started)
            print(f"  {self._stage}: {took}", file=sys.stderr)
        self._stage = ""
