"""`nemoc eval`: what quantizing does to a model, as a table over formats and scopes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from nemoc.calibration import takes_scales
from nemoc.commands.compile import print_choices
from nemoc.compiler import compile, load
from nemoc.error_budget import Budgeted, calibrate
from nemoc.evaluation import Quality, evaluate, weight_bytes
from nemoc.ir import NemocError
from nemoc.models import Model, open_model
from nemoc.passes import Pass, PassContext, run_pipeline
from nemoc.progress import Progress
from nemoc.quality import Window, model_tokenizer, own_text, read_windows
from nemoc.quantizations import QUANTIZATIONS, quantization
from nemoc.runtime import Executable, Tokenizer
from nemoc.runtime.store import is_artifact
from nemoc.targets import multiplies_fp8, resolve_target
from nemoc.terminal import count, print_table, progress, report, short

STORED = "as stored"
"""The row of the model that is not quantized any further."""


@dataclass(frozen=True)
class Settings:
    """How executables are made and run; attributes are as for `nemoc.compiler.compile`."""

    target: str | None
    dtype: str | None
    threads: int | None
    context: int
    calibration: Sequence[Path]

    def compile(self, model: Model, passes: tuple[Pass, ...], show: Progress) -> Executable:
        """The model, quantized by passes."""
        return compile(
            model,
            self.target,
            passes or None,
            dtype=self.dtype,
            max_context=self.context,
            calibration=self.calibration if takes_scales(passes) else (),
            threads=self.threads,
            progress=show,
        )


def run(
    source: str,
    text: Sequence[Path],
    *,
    target: str | None,
    quantize: Sequence[str],
    scope: Sequence[str],
    error_budget: Sequence[float],
    calibration: Sequence[Path],
    against: str | None,
    context: int,
    max_tokens: int | None,
    dtype: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Print the table."""
    settings = Settings(target, dtype, threads, context, calibration)
    budgets: list[Budgeted] = []
    with progress(quiet) as show:
        if is_artifact(Path(source)):
            if quantize or scope or error_budget or target or dtype:
                raise NemocError(
                    f"{source}: it is compiled already, so that there is nothing to quantize"
                )
            rows = {STORED: _Row(load(source, threads, progress=show), None)}
            tokenizer = rows[STORED].executable.tokenizer
            length = min(context, rows[STORED].executable.program.bounds.max_context)
            windows = _windows(source, tokenizer, text, length, max_tokens)
        else:
            model = open_model(source)
            asked = _asked(model, quantize, scope)
            files = text or own_text(model)
            windows = _windows(source, model_tokenizer(model), files, context, max_tokens)
            prompts = multiplies_fp8(resolve_target(target))
            budgets += [
                calibrate(model, x, calibration, progress=show, prompts=prompts)
                for x in error_budget
            ]
            rows = {name: _Row.of(model, p, settings, show) for name, p in asked.items()}
            as_measured = replace(settings, calibration=())  # no static scales
            rows |= {
                f"budget {found.budget:g}": _Row.of(model, found.passes, as_measured, show)
                for found in budgets
            }
        first = rows[STORED].executable
        compared = _compared(source, against, first, settings, show)
        found = evaluate({n: r.executable for n, r in rows.items()}, windows, compared, show)
    console = report()
    for budgeted in budgets:
        print_choices(console, budgeted)
    total = found[STORED]
    console.print(
        f"{source} for {first.program.target}: {count(total.tokens)} tokens ({count(total.bytes)} "
        f"bytes) in {len(windows)} windows of {count(windows[0].tokens)}\n",
        soft_wrap=True,
    )
    _print(console, rows, found, compared is not first)


def _windows(
    source: str,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    context: int,
    max_tokens: int | None,
) -> list[Window]:
    if not files:
        raise NemocError(f"{source}: found no text to measure on, expected --text FILES")
    return read_windows(tokenizer, files, context, max_tokens)


@dataclass(frozen=True)
class _Row:
    """An executable, and the bytes of its weights as their formats have them, if they are known."""

    executable: Executable
    bytes: int | None

    @classmethod
    def of(
        cls, model: Model, passes: tuple[Pass, ...], settings: Settings, show: Progress
    ) -> "_Row":
        step = run_pipeline(model.build_step(), passes, PassContext())
        return cls(settings.compile(model, passes, show), weight_bytes(step))


def _asked(
    model: Model, quantize: Sequence[str], scopes: Sequence[str]
) -> dict[str, tuple[Pass, ...]]:
    """The passes of each row, by its name: nothing, and what was asked for."""
    if scopes and not set(QUANTIZATIONS) & set(quantize):
        raise NemocError(f"--scope {scopes[0]}: expected --quantize {' or '.join(QUANTIZATIONS)}")
    found: dict[str, tuple[Pass, ...]] = {STORED: ()}
    for name in quantize:
        for scope in (scopes if name in QUANTIZATIONS else ()) or (None,):
            label = name if scope is None else f"{name}, {scope}"
            found[label] = quantization(model, name, scope)
    return found


def _compared(
    source: str, against: str | None, first: Executable, settings: Settings, show: Progress
) -> Executable | None:
    """What rows are compared with."""
    if against is None:
        return None if is_artifact(Path(source)) else first
    if is_artifact(Path(against)):
        return load(against, settings.threads, progress=show)
    return settings.compile(open_model(against), (), show)


def _print(
    console: Console, rows: dict[str, _Row], found: dict[str, Quality], compare_first: bool
) -> None:
    base = found[STORED].bits_per_byte
    cells = []
    for name, quality in found.items():
        stored = name == STORED
        size = rows[name].bytes
        changed = "" if stored else f"{round(quality.bits_per_byte / base - 1, 4) + 0.0:+.2%}"
        cells.append(
            (
                name,
                "" if size is None else short(size, "B"),
                f"{quality.bits_per_byte:.4f}",
                changed,
                *(_compared_cells(quality) if compare_first or not stored else ("", "", "")),
            )
        )
    columns = ("weights", ">size", ">bits/byte", ">change", ">KL", ">KL 99%", ">top-1")
    print_table(console, columns, cells, wrap="weights")


def _compared_cells(quality: Quality) -> tuple[str, str, str]:
    if quality.kl is None or quality.kl_99 is None or quality.agreement is None:
        return "", "", ""
    return f"{quality.kl:.2g}", f"{quality.kl_99:.2g}", f"{quality.agreement:.1%}"
