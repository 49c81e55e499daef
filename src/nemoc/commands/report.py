"""`nemoc report`: what compiling said of each kernel of an artifact for a GPU."""

import json
from pathlib import Path
from typing import Any

from nemoc.gpu import REPORT
from nemoc.ir import NemocError
from nemoc.runtime.manifest import read_manifest
from nemoc.runtime.store import checked_path
from nemoc.terminal import count, print_table, report


def run(folder: Path) -> None:
    """Print a line for each kernel, and how many there are of what should not be."""
    manifest = read_manifest(folder)
    if REPORT not in manifest.files:
        raise NemocError(
            f"{folder}: is for {manifest.target}, which has no report of kernels; those for GPUs have"
        )
    path = checked_path(folder, REPORT, manifest.files[REPORT])
    kernels = json.loads(path.read_text())
    console = report()
    columns = ("kernel", ">regs", ">spill", ">shared", ">fit", "matrix")
    print_table(console, columns, [_cells(k) for k in kernels], wrap="matrix")
    console.print(
        "\nregs, spill: registers and spilled bytes of a thread. shared: bytes of a program.\n"
        "fit: programs on a multiprocessor, and what it has too little of for more.\n"
        "matrix: instructions of matrix units, by what they multiply."
    )
    spilling = sum(k["report"]["spilled"] > 0 for k in kernels)
    console.print(f"\n{len(kernels)} kernels for {manifest.target}, {spilling or 'none'} spilling.")


_LIMITS = {"registers": "regs", "shared memory": "shared", "tensor memory": "tmem"}
"""What there is too little of, in short."""


def _cells(kernel: dict[str, Any]) -> tuple[str, ...]:
    found = kernel["report"]
    occupancy = found["occupancy"]
    matrix = [f"{number} {_short(kind)}" for kind, number in found["matrix"]]
    return (
        kernel["symbol"],
        count(found["registers"]),
        count(found["spilled"]),
        str(kernel["shared"]),
        f"{occupancy['programs']} {_LIMITS.get(occupancy['limit'], occupancy['limit'])}",
        ", ".join([*matrix, *(f"none for {p}" for p in found["plain"])]),
    )


def _short(kind: str) -> str:
    """A kind of instructions without its middle: `wgmma.bf16` for `wgmma.mma_async.bf16`."""
    first, *_, last = kind.split(".")
    return f"{first}.{last}"
