"""`nemoc verify`: each pass, each kernel and the whole model against eager PyTorch."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from nemoc.terminal import duration, heading, print_table, progress, report, verdict
from nemoc.verification import VerifyRow, verify_model

_TITLES = {
    "pass": "Passes: the graph before against the graph after",
    "kernel": "Kernels: generated code against the ops it stands for",
    "model": "Model: the executable against eager PyTorch",
}


def run(source: str, quiet: bool, options: dict[str, Any]) -> int:
    """Print what was checked; 1 when something missed its bound."""
    with progress(quiet) as show:
        found = verify_model(source, progress=show, **options)
    console = report()
    for kind in _TITLES:
        print_rows(console, kind, found.rows)
    misses = sum(not row.ok for row in found.rows)
    console.print(f"\n{len(found.rows)} checks, {misses or 'no'} misses.")
    return 1 if misses else 0


def print_rows(console: Console, kind: str, rows: Iterable[VerifyRow]) -> None:
    """The rows of one kind as a table; nothing when there are none."""
    shown = [row for row in rows if row.kind == kind]
    if not shown:
        return
    heading(console, _TITLES[kind])
    # A kernel's name begins with its op; what else it was made for fills a line of its own.
    named = kind == "kernel"
    cells = [
        (
            row.name,
            *(() if named else (row.detail,)),
            number(row.error),
            number(row.bound),
            verdict(row.ok),
        )
        for row in shown
    ]
    columns = (kind, *(() if named else ("what",)), ">error", ">bound", "")
    print_table(console, columns, cells, wrap=kind if named else "what")
    took = duration(sum(row.seconds for row in shown))
    console.print(f"in {took}")


def number(error: float) -> str:
    """A relative error; 0 means equal bits."""
    return "0" if error == 0 else f"{error:.1e}"
