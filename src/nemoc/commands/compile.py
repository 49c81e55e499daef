"""`nemoc compile`: a source to an artifact on disk."""

import time
from pathlib import Path
from typing import Any

from nemoc.compiler import compile
from nemoc.models import open_model
from nemoc.terminal import duration, progress, report, short


def run(source: str, output: Path, quiet: bool, options: dict[str, Any]) -> None:
    """Compile, and say what came out."""
    started = time.perf_counter()
    model = open_model(source)
    with progress(quiet) as show:
        executable = compile(model, destination=output, progress=show, **options)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    console = report()
    for note in model.notes:
        console.print(f"note: {note}")
    took = duration(time.perf_counter() - started)
    console.print(
        f"{output}: {model.name} for {executable.program.target}, {short(size, 'B')}, in {took}",
        soft_wrap=True,
    )
