"""`nemoc compile`: a source to an artifact on disk."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from nemoc.compiler import compile
from nemoc.error_budget import FP8, NVFP4, Budgeted, calibrate
from nemoc.ir import NemocError
from nemoc.models import open_model
from nemoc.schedules import SCHEDULES
from nemoc.terminal import duration, heading, print_table, progress, report, short


def run(source: str, output: Path, quiet: bool, options: dict[str, Any]) -> None:
    """Compile, and say what came out."""
    started = time.perf_counter()
    model, console = open_model(source), report()
    budget = options.pop("error_budget")
    if options["records"] == "none":
        options["records"] = []
    with progress(quiet) as show:
        if budget is not None:
            _refuse_both(options["quantize"])
            chosen = calibrate(
                model, budget, options.pop("calibration"), options.pop("scope"), show
            )
            options["quantize"] = chosen.passes
            print_choices(console, chosen)
        executable = compile(model, destination=output, progress=show, **options)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    for note in (*model.notes, *predicted_notes(output)):
        console.print(f"note: {note}", soft_wrap=True)
    took = duration(time.perf_counter() - started)
    console.print(
        f"{output}: {model.name} for {executable.program.target}, {short(size, 'B')}, in {took}",
        soft_wrap=True,
    )


def predicted_notes(artifact: Path) -> Iterator[str]:
    """What an artifact says of schedules that nobody has measured."""
    path = artifact / SCHEDULES
    entries = json.loads(path.read_text()) if path.exists() else []
    ratios = [entry["ratio"] for entry in entries if entry["origin"] == "predicted"]
    if ratios:
        yield (
            f"kernels with predicted schedules, not measured ones: {len(ratios)}, expected at "
            f"{min(ratios):.2f} to {max(ratios):.2f} of the default's time: {path}"
        )


def print_choices(console: Console, chosen: Budgeted) -> None:
    """What an error budget led to, weight by weight."""
    heading(console, f"Formats within a KL of {chosen.budget:g} nats; KL of each alone")
    rows = [
        (
            choice.name.removesuffix(".weight").replace(".mixer.", "."),
            *(f"{choice.kl[f]:.1e}" if f in choice.kl else "" for f in (NVFP4, FP8)),
            choice.format or "as it is",
            short(choice.saved, "B") if choice.saved else "",
        )
        for choice in chosen.choices
    ]
    columns = ("weight", ">KL, nvfp4", ">KL, fp8", "chosen", ">saved")
    print_table(console, columns, rows, wrap="weight")
    saved = sum(choice.saved for choice in chosen.choices)
    console.print(
        f"All together: KL {chosen.kl:.2g} ± {chosen.kl_error:.1g} on calibration text, "
        f"{short(saved, 'B')} saved\n"
    )


def _refuse_both(quantize: str | None) -> None:
    if quantize is not None:
        raise NemocError(f"--quantize {quantize}: expected none beside --error-budget")
