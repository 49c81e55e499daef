"""`nemoc verify`: each pass, each kernel and the whole model; an artifact; or a reproducer again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from nemoc.ir import NemocError
from nemoc.passes.reproducer import is_reproducer
from nemoc.runtime.store import is_artifact
from nemoc.terminal import duration, heading, print_table, progress, report, verdict
from nemoc.verification import (
    VerifyReport,
    VerifyRow,
    replay_reproducer,
    verify_artifact,
    verify_model,
)

_TITLES = {
    "pass": "Passes: the graph before against the graph after",
    "kernel": "Kernels: generated code against the ops it stands for",
    "model": "Model: the executable against eager PyTorch",
    "quantized": "Model: the executable against the interpreter, both quantized",
    "artifact": "Artifact: its files, and its code against its own graphs",
}


def run(source: str, quiet: bool, options: dict[str, Any]) -> int:
    """Print what was checked; 1 when something missed its bound, or when a reproducer still fails."""
    path = Path(source)
    if is_reproducer(path):
        return _replay(path, options["plugins"])
    with progress(quiet) as show:
        if is_artifact(path):
            _refuse(source, options)
            found = verify_artifact(path, show, options["plugins"])
        else:
            found = verify_model(source, progress=show, **options)
    return _print(found)


def _replay(folder: Path, plugins: tuple[str, ...]) -> int:
    reproducer, found = replay_reproducer(folder, plugins)
    console = report()
    console.print(f"{reproducer.place}, {reproducer.change}", soft_wrap=True)
    if found is None:
        console.print(f"passes now; it was: changes {reproducer.verdict}", soft_wrap=True)
        return 0
    again = "" if str(found) == reproducer.verdict else f" (it was: {reproducer.verdict})"
    console.print(
        f"declares {reproducer.effect} but changes {found}{again}",
        soft_wrap=True,
    )
    return 1


def _refuse(source: str, options: dict[str, Any]) -> None:
    """An artifact is compiled already."""
    for name in ("target", "pipeline", "quantize", "scope"):
        if options[name] is not None:
            raise NemocError(f"{source}: --{name} needs a model, found an artifact")


def _print(found: VerifyReport) -> int:
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
