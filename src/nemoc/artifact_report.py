"""What an artifact consists of: what each function launches, what that costs, and what compiling said of kernels."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoc.compiler import PIPELINES
from nemoc.gpu import REPORT
from nemoc.ir import NemocError
from nemoc.kernel_times import KernelGroup, KernelTime, StepReport, kernel_groups
from nemoc.measurement import BenchReport
from nemoc.page import render
from nemoc.remarks import Shape
from nemoc.runtime.costs import FunctionCosts, read_costs
from nemoc.runtime.manifest import WEIGHTS, Manifest, read_manifest
from nemoc.runtime.program import DECODE, PREFILL
from nemoc.runtime.store import read_content
from nemoc.schedules import SCHEDULES
from nemoc.terminal import count, duration, short

_TOKENS = 256
"""Tokens of a prompt, and before the token that is decoded, where nobody says."""


@dataclass(frozen=True)
class FunctionReport:
    """What a function launches.

    Attributes:
        name: of the function.
        steps: those for which costs are given together: a long prompt takes several.
        costs: its launches, and the ops behind them.
        groups: the ops by their kernels, in order of first launch.
    """

    name: str
    steps: tuple[Shape, ...]
    costs: FunctionCosts
    groups: tuple[KernelGroup, ...]

    @property
    def shape(self) -> str:
        """The steps in words."""
        tokens = sum(step.tokens for step in self.steps)
        together = f" in {len(self.steps)} steps" if len(self.steps) > 1 else ""
        return f"{Shape(self.steps[0].batch, tokens, self.steps[0].cached)}{together}"


@dataclass(frozen=True)
class ArtifactReport:
    """What an artifact consists of.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        pipelines: the passes that made it, a line for each function; empty if they are not known.
        functions: those for which there is a shape.
        schedules: of kernels that are not the defaults, as `kernels/schedules.json` has them.
        kernels: what compiling said of each kernel for a GPU, as `kernels/report.json` has it; empty for others.
    """

    folder: Path
    manifest: Manifest
    pipelines: tuple[str, ...]
    functions: tuple[FunctionReport, ...]
    schedules: tuple[Mapping[str, Any], ...]
    kernels: tuple[Mapping[str, Any], ...]


def read_artifact(
    folder: Path, tokens: int | None = None, cached: int | None = None
) -> ArtifactReport:
    """Read what an artifact says of itself; weights are not looked at.

    Args:
        folder: the artifact.
        tokens: of the prompt for which costs are given; None for 256, or as many as it takes.
        cached: tokens behind which the token is decoded for which they are; None likewise.

    Raises:
        NemocError: it is none, launches nothing, takes fewer tokens, or is damaged.
    """
    manifest = read_manifest(folder)
    costs = read_costs(folder, manifest)
    if costs is None:
        raise NemocError(f"{folder}: is for {manifest.target}, which launches no kernels")
    context = manifest.bounds.max_context
    tokens = min(_TOKENS, context) if tokens is None else tokens
    cached = min(_TOKENS, context - 1) if cached is None else cached
    wanted = ((f"a prompt of {tokens}", tokens), (f"a token behind {cached}", cached + 1))
    for what, number in wanted:
        if number > context:
            raise NemocError(f"{folder}: holds {context} tokens, {what} is beyond that")
    chunk = manifest.bounds.chunk(1)
    prompt = [Shape(1, min(chunk, tokens - at), at) for at in range(0, tokens, chunk)]
    steps = {PREFILL: tuple(prompt), DECODE: (Shape(1, 1, cached),)}
    found = []
    for name, taken in steps.items():
        function = costs.functions[name]
        groups = kernel_groups(function, list(map(_sizes, taken)))
        found.append(FunctionReport(name, taken, function, tuple(groups)))
    return ArtifactReport(
        folder,
        manifest,
        tuple(_text(folder, manifest, PIPELINES).splitlines()),
        tuple(found),
        tuple(_json(folder, manifest, SCHEDULES) or ()),
        tuple(_json(folder, manifest, REPORT) or ()),
    )


def _text(folder: Path, manifest: Manifest, name: str) -> str:
    """The text of a file as it was written; empty where there is no such file."""
    if name not in manifest.files:
        return ""
    return read_content(folder, name, manifest.files[name]).decode("utf-8", "replace")


def _json(folder: Path, manifest: Manifest, name: str) -> Any:
    """The data in a file as nemoc wrote it; none where there is no such file."""
    text = _text(folder, manifest, name)
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise NemocError(f"{folder / name}: is not JSON") from None


def _sizes(shape: Shape) -> dict[str, int]:
    return {symbol.name: size for symbol, size in shape.sizes.items()}


def artifact_html(report: ArtifactReport, measured: BenchReport | None = None) -> str:
    """The report as a page.

    Args:
        report: of the artifact.
        measured: times of its kernels, whose shapes the report has.
    """
    manifest = report.manifest
    return render(
        "artifact_report.html",
        name=report.folder.name,
        target=manifest.target,
        bounds=manifest.bounds,
        tools=", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
        weights=short(manifest.files[WEIGHTS].size, "B"),
        size=short(sum(file.size for file in manifest.files.values()), "B"),
        files=len(manifest.files) + 1,
        pipelines=[line.partition(": ")[::2] for line in report.pipelines],
        functions=[_section(f, measured) for f in report.functions],
        measured=measured,
        one_by_one=measured is not None and measured.one_by_one,
        share="" if measured is None else _percent(measured.bandwidth_share),
        bandwidth="" if measured is None else f"{short(measured.roofs.bandwidth, 'B')}/s",
        arithmetic="" if measured is None else f"{short(measured.roofs.arithmetic, 'FLOP')}/s",
        schedules=[_schedule(entry) for entry in report.schedules],
        kernels=[kernel_cells(kernel) for kernel in report.kernels],
    )


def _section(function: FunctionReport, measured: BenchReport | None) -> dict[str, Any]:
    """A function as the page shows it."""
    step = measured.steps.get(function.name) if measured is not None else None
    groups = function.groups if step is None else step.kernels
    ops = function.costs.ops
    return {
        "name": function.name,
        "shape": function.shape,
        "launches": len(function.costs.launches),
        "phases": len(function.costs.phases),
        "flops": short(sum(group.flops or 0.0 for group in groups), "FLOP"),
        "moved": short(sum(group.moved or 0.0 for group in groups), "B"),
        "step": None if step is None else _step(step),
        "groups": [_cells(group, step) for group in groups],
        "order": [
            [(launch.kernel, ops[launch.op].op, ops[launch.op].weight) for launch in phase]
            for phase in function.costs.phases
        ],
        "forms": _forms(function.costs),
    }


def _step(step: StepReport) -> dict[str, str]:
    return {
        "time": duration(step.seconds),
        "outside": duration(step.outside),
        "waiting": _percent(step.waiting / step.seconds),
    }


def _cells(group: KernelGroup, step: StepReport | None) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "title": group.title,
        "kernels": group.kernels,
        "sites": group.sites,
        "flops": "not known" if group.flops is None else short(group.flops, "FLOP"),
        "moved": "not known" if group.moved is None else short(group.moved, "B"),
    }
    if step is not None and isinstance(group, KernelTime):
        cells |= {
            "time": duration(group.seconds),
            "share": f"{group.seconds / step.seconds:.1%}",
            "roofline": _percent(group.roofline),
        }
    return cells


def _percent(part: float | None) -> str:
    return "not known" if part is None else f"{part:.0%}"


def _forms(costs: FunctionCosts) -> list[tuple[str, tuple[str, ...], int]]:
    """Distinct ops with their closed forms, and how many of each there are."""
    counted: dict[tuple[str, tuple[str, ...]], int] = {}
    for op in costs.ops:
        key = (op.op, op.forms or ("not known",) * 3)
        counted[key] = counted.get(key, 0) + 1
    return [(op, forms, number) for (op, forms), number in counted.items()]


def _schedule(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    settings = ", ".join(f"{name}={value}" for name, value in entry["schedule"].items())
    return entry["kernel"], settings, entry["origin"]


_LIMITS = {"registers": "regs", "shared memory": "shared", "tensor memory": "tmem"}
"""What there is too little of, in short."""


def kernel_cells(kernel: Mapping[str, Any]) -> tuple[str, ...]:
    """What compiling said of a kernel for a GPU: name, registers, spilled bytes, shared memory, how many fit, matrix
    instructions."""
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
