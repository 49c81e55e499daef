"""`nemoc compile`: a source to an artifact on disk."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from nemoc.compiler import compile
from nemoc.error_budget import FP8, NVFP4, Budgeted, Error, calibrate
from nemoc.ir import NemocError
from nemoc.models import open_model
from nemoc.schedules import SCHEDULES
from nemoc.targets import multiplies_fp8, resolve_target
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
            prompts = multiplies_fp8(resolve_target(options["target"]))
            chosen = calibrate(
                model, budget, options.pop("calibration"), options.pop("scope"), show, prompts
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
            (choice.format or "as it is") + (", rows" if choice.prompts else ""),
            short(choice.saved, "B") if choice.saved else "",
        )
        for choice in chosen.choices
    ]
    columns = ("weight", ">KL, nvfp4", ">KL, fp8", "chosen", ">saved")
    print_table(console, columns, rows, wrap="weight")
    saved = sum(choice.saved for choice in chosen.choices)
    console.print(
        f"All together: KL {_error(chosen.error)} on calibration text, {short(saved, 'B')} saved"
    )
    for line in _of_prompts(chosen):
        console.print(line, soft_wrap=True)
    console.print()


def _of_prompts(chosen: Budgeted) -> Iterator[str]:
    """What became of the rows of prompts, and what that costs; nothing where there was nothing to choose."""
    could = sum(choice.kl_prompts is not None for choice in chosen.choices)
    do = sum(choice.prompts for choice in chosen.choices)
    if chosen.prompts is None or not could:
        return
    if do:
        error = _error(chosen.prompts.chosen)
        yield f"Rows of prompts in FP8 too, beside {do} of {could} weights: KL {error}"
    if do < could:
        error = _error(chosen.prompts.all)
        yield f"Rows of prompts in FP8 too, beside all {could}: KL {error}, over the budget"


def _error(error: Error) -> str:
    return f"{error.mean:.2g} ± {error.deviation:.1g}"


def _refuse_both(quantize: str | None) -> None:
    if quantize is not None:
        raise NemocError(f"--quantize {quantize}: expected none beside --error-budget")
