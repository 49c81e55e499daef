"""`nemoc bench`: how fast an artifact is here, how fast it could be at most, and which kernels take the time."""

import json
from pathlib import Path

from rich.console import Console

from nemoc.artifact_report import artifact_html, read_artifact
from nemoc.compiler import load
from nemoc.kernel_times import KernelTime, StepReport
from nemoc.measurement import BenchReport, bench
from nemoc.page import write_page
from nemoc.runtime.files import expect_writable, replacing_file
from nemoc.terminal import duration, heading, print_table, progress, report, short

_SHOWN = 0.005
"""Part of a step's time from which a kernel has a line of its own."""


def run(
    artifact: Path,
    *,
    prefill: int,
    decode: int,
    json_file: Path | None,
    page: Path | None,
    threads: int | None,
    resident: bool,
    plugins: tuple[str, ...],
    quiet: bool,
) -> None:
    """Print medians, and write them as JSON and as a page where asked to."""
    for path in (json_file, page):
        if path is not None:
            expect_writable(path)
    shown = read_artifact(artifact, prefill, prefill + decode // 2) if page is not None else None
    with progress(quiet) as show:
        executable = load(artifact, threads, resident, show, plugins=plugins)
        found = bench(executable, prefill=prefill, decode=decode)
    _print(found)
    if json_file is not None:
        with replacing_file(json_file) as file:
            file.write((json.dumps(found.to_json(), indent=2) + "\n").encode())
    if shown is not None and page is not None:
        write_page(artifact_html(shown, found), page)


def _print(found: BenchReport) -> None:
    console = report()
    rows = [
        (f"prefill of {found.prefill_tokens} tokens", f"{found.prefill_tokens_per_second:.1f}"),
        (f"decode of {found.decode_tokens} tokens", f"{found.decode_tokens_per_second:.1f}"),
    ]
    print_table(console, ("median of interleaved rounds", ">tokens/s"), rows)
    roofs = found.roofs
    console.print(
        f"\n{found.device} here: {short(roofs.bandwidth, 'B')}/s from memory, "
        f"{short(roofs.arithmetic, 'FLOP')}/s in a large product."
    )
    if found.decode_bytes_per_token is not None:
        console.print(
            f"Decoding reads {short(found.decode_bytes_per_token, 'B')} a token, "
            f"{found.bandwidth_share:.0%} of what memory gives."
        )
    for name, step in found.steps.items():
        what = f"A {_WORDS[name]}" + (f" of {step.tokens} tokens" if name == "prefill" else "")
        _print_step(console, what, step, outside=not found.one_by_one)
    if found.steps:
        _explain(console, found)


def _print_step(console: Console, what: str, step: StepReport, outside: bool) -> None:
    behind = f" behind {step.cached}" if step.cached else ""
    heading(console, f"{what}{behind}: {duration(step.seconds)}")
    long = [k for k in step.kernels if k.seconds >= _SHOWN * step.seconds]
    rest = step.kernels[len(long) :]
    rows = [_cells(kernel, step) for kernel in long]
    if rest:
        seconds = sum(kernel.seconds for kernel in rest)
        sites = sum(kernel.sites for kernel in rest)
        rows.append(("others", str(sites), *_time(seconds, step), "", "", ""))
    if outside:
        rows.append(("outside kernels", "", *_time(step.outside, step), "", "", ""))
    columns = ("op", ">sites", ">time", ">share", ">GB/s", ">GFLOP/s", ">roofline")
    print_table(console, columns, rows, wrap="op")


def _cells(kernel: KernelTime, step: StepReport) -> tuple[str, ...]:
    return (
        kernel.title,
        str(kernel.sites),
        *_time(kernel.seconds, step),
        _rate(kernel.moved, kernel.seconds),
        _rate(kernel.flops, kernel.seconds),
        "" if kernel.roofline is None else f"{kernel.roofline:.0%}",
    )


def _time(seconds: float, step: StepReport) -> tuple[str, str]:
    return duration(seconds), f"{seconds / step.seconds:.1%}"


def _rate(amount: float | None, seconds: float) -> str:
    """Billions a second."""
    return "" if not amount or not seconds else f"{amount / seconds / 1e9:.1f}"


def _explain(console: Console, found: BenchReport) -> None:
    console.print(
        "\nroofline: the time that memory and arithmetic allow over that taken. More than\n"
        "100%: caches had what was read, or kernels multiply faster than that product."
    )
    if not found.one_by_one:
        waiting = ", ".join(
            f"{step.waiting / step.seconds:.0%} of a {_WORDS[name]}"
            for name, step in found.steps.items()
        )
        console.print(f"Within kernels threads wait for each other: {waiting}.")
    else:
        console.print(
            "Kernels were launched one by one: each has in it the way to the next, and they\n"
            "take longer together than when they are launched ahead."
        )


_WORDS = {"prefill": "prompt", "decode": "token"}
"""What each function takes."""
