"""`nemoc quantize`: a source to a checkpoint that others load."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemoc.calibration import measured_scales
from nemoc.ir import NemocError
from nemoc.models import Model, Written, open_model, write_gguf, write_release
from nemoc.models.gguf_writer import GgufType
from nemoc.models.release import LAYOUTS, Layout
from nemoc.runtime.files import replacing_directory, replacing_file
from nemoc.terminal import count, duration, progress, report, short

Writer = Callable[[Model, Path, Callable[[int, int], None]], Written]
"""Writes a model under a new name, and tells the bytes that it has written, and those of all."""


def run(
    source: str,
    output: Path,
    format: str,
    scope: str,
    type: GgufType,
    calibration: Sequence[Path],
    quiet: bool,
) -> None:
    """Write, and say what came out.

    Raises:
        NemocError: the source or the scope is none, or the output exists or cannot be written.
    """
    started = time.perf_counter()
    _check(format, type, calibration)
    if os.path.lexists(output):
        raise NemocError(f"{output}: exists, and is not replaced")
    model = open_model(source)
    with progress(quiet) as show:
        scales = measured_scales(model, calibration, show) if calibration else None
        write = _writer(format, scope, type, scales)
        written = write(model, output, lambda done, total: show("writing weights", done, total))
    console = report()
    for note in written.notes:
        console.print(f"note: {note}", soft_wrap=True)
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files)
    took = duration(time.perf_counter() - started)
    console.print(
        f"{output}: {model.name}, {count(written.quantized)} matrices quantized, "
        f"{short(size, 'B')}, in {took}",
        soft_wrap=True,
    )


def _check(format: str, type: GgufType, calibration: Sequence[Path]) -> None:
    if format in LAYOUTS and type != "nvfp4":
        raise NemocError(f"--type {type}: found format {format}, expected gguf")
    if format not in LAYOUTS and calibration:
        raise NemocError(f"--calibration: found format {format}, expected {' or '.join(LAYOUTS)}")


def _writer(format: str, scope: str, type: GgufType, scales: Mapping[str, float] | None) -> Writer:
    layouts: dict[str, Layout] = {layout: layout for layout in LAYOUTS}
    if format not in layouts:
        return lambda model, path, advance: _file(model, path, type, scope, advance)
    layout = layouts[format]
    return lambda model, path, advance: _directory(model, path, layout, scope, scales, advance)


def _directory(
    model: Model,
    path: Path,
    layout: Layout,
    scope: str,
    scales: Mapping[str, float] | None,
    advance: Callable[[int, int], None],
) -> Written:
    with replacing_directory(path, replaceable=lambda path: False) as folder:
        return write_release(model, folder, layout, scope, input_scales=scales, advance=advance)


def _file(
    model: Model, path: Path, type: GgufType, scope: str, advance: Callable[[int, int], None]
) -> Written:
    with replacing_file(path) as file:
        return write_gguf(model, file, type, scope, advance=advance)
