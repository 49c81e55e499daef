"""`nemoc report`: what an artifact launches, what that costs, and what compiling said of each kernel."""

from pathlib import Path

from rich.console import Console

from nemoc.artifact_report import (
    ArtifactReport,
    FunctionReport,
    artifact_html,
    kernel_cells,
    read_artifact,
)
from nemoc.page import write_page
from nemoc.terminal import heading, print_table, report, short


def run(folder: Path, *, page: Path | None, prefill: int | None, cached: int | None) -> None:
    """Print the report, and write it as a page where asked to."""
    found = read_artifact(folder, prefill, cached)
    if page is not None:
        write_page(artifact_html(found), page)
    console = report()
    for function in found.functions:
        _print_function(console, function)
    if found.schedules:
        console.print(
            f"\n{len(found.schedules)} kernels are tuned; kernels/schedules.json has them."
        )
    if found.kernels:
        _print_kernels(console, found)


def _print_function(console: Console, function: FunctionReport) -> None:
    launches, phases = len(function.costs.launches), len(function.costs.phases)
    counts = f"{launches} launches in {phases} phases"
    heading(console, f"{function.name}: {counts}; costs at {function.shape}")
    rows = [
        (
            group.title,
            str(group.sites),
            str(group.sites * len(group.kernels)),
            "" if group.flops is None else short(group.flops, "FLOP"),
            "" if group.moved is None else short(group.moved, "B"),
        )
        for group in function.groups
    ]
    columns = ("op", ">sites", ">launches", ">arithmetic", ">moved")
    print_table(console, columns, rows, wrap="op")


def _print_kernels(console: Console, found: ArtifactReport) -> None:
    console.print()
    columns = ("kernel", ">regs", ">spill", ">shared", ">fit", "matrix")
    print_table(console, columns, [kernel_cells(k) for k in found.kernels], wrap="matrix")
    console.print(
        "\nregs, spill: registers and spilled bytes of a thread. shared: bytes of a program.\n"
        "fit: programs on a multiprocessor, and what it has too little of for more.\n"
        "matrix: instructions of matrix units, by what they multiply."
    )
    spilling = sum(k["report"]["spilled"] > 0 for k in found.kernels)
    target = found.manifest.target
    console.print(f"\n{len(found.kernels)} kernels for {target}, {spilling or 'none'} spilling.")
