"""`nemoc tune`: faster schedules for a model's kernels, within a budget."""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from nemoc.autotune.statistics import Interval
from nemoc.autotune.tuner import KernelReport, Told
from nemoc.ir import NemocError
from nemoc.terminal import duration, heading, print_table, progress, report, stages
from nemoc.tune_report import write_report
from nemoc.tuning import TuneReport, tune
from nemoc.workload import Workload

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

_EVERY = 10.0
"""Seconds between two lines of progress where nothing moves."""


def run(
    source: str,
    *,
    budget: str,
    prefill: int,
    cached: int,
    batch: int,
    steps: tuple[str, ...],
    records: Path | None,
    page: Path | None,
    no_compare: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Tune, and say what became faster.

    Raises:
        KeyboardInterrupt: tuning was interrupted; what it found until then is kept, and was printed.
    """
    with progress(quiet) as show, _telling(quiet) as tell:
        found = tune(
            source,
            budget=seconds_of(budget),
            workload=Workload(prefill, cached, batch, steps or ("prefill", "decode")),
            records=records,
            compare=not no_compare,
            tell=tell,
            interrupt=_interrupted,
            progress=show,
            **options,
        )
    console = report()
    print_report(console, found)
    if page is not None:
        write_report(found, page)
        console.print(f"{page}: the same with plots", soft_wrap=True)
    if found.interrupted:
        raise KeyboardInterrupt  # which a script sees by the exit code


def seconds_of(text: str) -> float:
    """The seconds of a time such as 90, 90s, 10m or 1.5h.

    Raises:
        NemocError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0.0:
        raise NemocError(f"--budget {text}: expected a time such as 90s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def print_report(console: Console, found: TuneReport) -> None:
    """What tuning came to, kernel by kernel and for the model."""
    _print_kernels(console, found)
    tried = sum(len(k.study.trials()) for k in found.kernels)
    faults = sum(t.outcome != "ok" for k in found.kernels for t in k.study.trials())
    before = f", {duration(found.earlier)} before" if found.earlier else ""
    console.print(
        f"\n{tried} candidates of {len(found.kernels)} kernels, {faults} of them faulty; "
        f"{duration(found.spent)} now{before}"
    )
    ranked = [(k, k.order) for k in found.kernels if k.order is not None]
    if ranked:
        heading(console, "How well predicted times rank what was measured (Spearman)")
        orders = [
            (k.kernel.function, stages(k.name), str(len(k.study.trials())), f"{o:.2f}")
            for k, o in ranked
        ]
        columns = ("step", "kernel", ">tried", ">correlation")
        print_table(console, columns, orders, wrap="kernel")
    for message, count in _faults(found):
        console.print(f"{count} faulty: {message}", soft_wrap=True)
    for line in _ending(found):
        console.print(line, soft_wrap=True)
    for step, interval in found.whole.items():
        about = f"{step} of the whole model, relative to the defaults"
        console.print(f"{about}: {_verdict(interval)}", soft_wrap=True)
    if not any(k.best for k in found.kernels):
        console.print("No gain over the defaults: they stay as they are")


def _print_kernels(console: Console, found: TuneReport) -> None:
    """A table for each step: its kernels that were tried, but for those that are next to nothing of it.

    What a kernel became stands below its name, since a schedule is longer than a line has room for.
    """
    by = found.device.predicted_by
    times = f"predicted times ({by}), nothing was measured" if by else "time"
    heading(console, f"Kernels on {found.device.name}; {times} relative to the default")
    shown = [
        k
        for k in found.kernels
        if k.reached and k.space.tunables and (k.share >= 0.005 or not k.seconds)
    ]
    for i, step in enumerate(dict.fromkeys(k.kernel.function for k in shown)):
        rows = [_cells(k, bool(by)) for k in shown if k.kernel.function == step]
        columns = (step, ">share", ">default", ">tried", "predicted" if by else "tuned (95 %)")
        if i:
            console.print()
        print_table(console, columns, rows, wrap=step)


def _cells(kernel: KernelReport, predicted: bool) -> tuple[str, ...]:
    name, schedule = stages(kernel.name), _settings(kernel)
    return (
        f"{name}\n{schedule}" if schedule else name,
        f"{kernel.share:.0%}",
        duration(kernel.seconds) if kernel.seconds else "",
        str(len(kernel.study.trials())),
        _gain(kernel, predicted),
    )


def _settings(kernel: KernelReport) -> str:
    return ", ".join(f"{name}={value}" for name, value in kernel.best.items())


def _ending(found: TuneReport) -> Iterator[str]:
    """Why the search ended, unless nothing was left to search, and what it did not come to."""
    if found.interrupted:
        yield "Stopped by an interrupt" + (
            "" if found.finished else "; the same command goes on from here"
        )
        if any(k.best for k in found.kernels):
            yield "The whole model is not compared: what kernels gained alone is kept"
    elif not found.finished:
        yield "The budget ended before the search; a larger one goes on from here"
    if found.not_reached:
        counts = ", ".join(f"{n} of {step}" for step, n in found.not_reached.items())
        yield f"Kernels not reached: {counts}; their defaults were not measured, shares leave them out"


def _faults(found: TuneReport, most: int = 3) -> list[tuple[str, int]]:
    """What is wrong with candidates, the commonest first, and with how many."""
    trials = (t for kernel in found.kernels for t in kernel.study.trials())
    return Counter(t.message for t in trials if t.outcome != "ok").most_common(most)


def _gain(kernel: KernelReport, predicted: bool) -> str:
    if kernel.gain is None:
        return "not measured"
    if not kernel.best:
        return "no gain" if kernel.searched else "not searched"
    return f"{kernel.gain.ratio:.2f}" if predicted else str(kernel.gain)


def _verdict(interval: Interval | None) -> str:
    if interval is None:
        return "nothing changed"
    if interval.is_gain:
        return f"{interval}, faster"
    if interval.is_loss:
        return f"{interval}, slower: its kernels keep their defaults"
    return f"{interval}, no difference beyond doubt"


def _interrupted() -> None:
    """Answer control-C at once: what comes now may take a while, also where no progress is shown."""
    print(
        "  interrupted: the best so far is measured once more; control-C again stops at once",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _telling(quiet: bool) -> Iterator[Callable[[Told], None]]:
    """Lines on stderr about how the search goes."""
    if quiet:
        yield lambda told: None
        return
    last = 0.0

    def tell(told: Told) -> None:
        nonlocal last
        if time.monotonic() - last < _EVERY and not sys.stderr.isatty():
            return
        last = time.monotonic()
        print(f"  {_line(told)}", file=sys.stderr)

    yield tell


def _line(told: Told) -> str:
    gains = ", ".join(f"{step} {gain:.1%}" for step, gain in sorted(told.gain.items()))
    return (
        f"{told.kernel.partition('+')[0]}: {told.best:.3f} of the default after {told.done}; "
        f"kernel time saved so far: {gains}; {duration(max(0.0, told.left))} left"
    )
