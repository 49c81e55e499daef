"""How long a launch takes on a GPU, by a closed form: to rank schedules for a GPU that is not at hand.

A launch has n programs, of which a multiprocessor holds as many as its occupancy says; the busiest of M
multiprocessors carries out r = ⌈n / M⌉ of them, so that whatever does not divide evenly is waited for.

    arithmetic   r · flops / (rate / M · fill · warps)
    memory       the longest of
                 traffic / (bandwidth · 0.9 · run),  r · loaded / port,  r · loaded · latency / flight
    time         launch + the longer of both + the shorter one / (1 + ahead · resident) + spills

- rate is that of the slowest kind of matrix instruction in the code; f32 as tf32 takes three products. Where a product
  has no matrix instruction, it is that of vectors. fill = h / (h + 16) with h = rows · columns / (rows + columns) of
  the tile: what a tile makes of its operands grows with its sides. warps: the part of four that are resident.
- traffic is what the launch has to read and write at least: each operand as far as its op looks at it. That what
  several programs load comes from memory once only, and otherwise from a cache that is fast enough for `port`, is
  assumed. run = bytes / (bytes + 16) for rows of so many bytes one behind the other.
- flight is the bytes that a multiprocessor has asked for and not received: of a loop of products as many iterations as
  are loaded ahead, at least one, and of others no more than threads can hold; of as many programs as are resident.
- Spilled registers go through a cache each time around the loop.

Nothing of this was fitted to measurements. Clocks, banks, the order of programs and everything between products
(exponentials of a softmax, say) are left out, so times are rough; what counts is which of two schedules of one kernel
is faster.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from nemoc.codegen.plan import Arg, Plan, Site, Stage
from nemoc.codegen.triton.binary import Binary, Report
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir.dims import B, C, Dim, L, T

_Sizes = Mapping[sympy.Symbol, int]

MODEL = "closed form 1"
"""What predictions are of; raised whenever they would be others."""

LAUNCH = 1.5e-6
"""Seconds that a launch takes within a recorded graph, whatever it does."""

_LATENCY = 0.7e-6
"""Seconds from asking memory to receiving, under load."""

_PORT = 64
"""Bytes that a multiprocessor takes from the cache that all share, each cycle."""

_PEAK = 0.9
"""Part of the nominal bandwidth that the best kernels see."""

_HELD = 128
"""Bytes that a thread can have asked for outside of pipelined loops: 32 registers."""

_PARTITIONS = 4
"""Warps that it takes to have all matrix units of a multiprocessor at work."""


@dataclass(frozen=True)
class Rates:
    """What a GPU's arithmetic can do, nominally, without sparsity.

    Attributes:
        matrix: operations per second of its newest matrix instruction on bf16.
        vector: operations per second on f32 without matrix units.
        clock: cycles per second.
        older: what `mma.sync` reaches of `matrix`.
    """

    matrix: float
    vector: float
    clock: float
    older: float = 1.0


RATES = {
    "cuda:sm_80": Rates(312e12, 19.5e12, 1.41e9),
    "cuda:sm_90": Rates(989e12, 67e12, 1.75e9, older=0.62),
    "cuda:sm_100": Rates(2250e12, 75e12, 1.85e9, older=0.25),
    "cuda:sm_120": Rates(500e12, 125e12, 2.4e9),
    "hip:gfx942": Rates(1307e12, 163e12, 2.1e9),
    "hip:gfx950": Rates(2300e12, 157e12, 2.4e9),
}
"""By target, of the device that `GpuTarget` has the other figures of."""

_SPEEDS = {
    "tf32": 1 / 6,
    "f32": 1 / 8,
    "f64": 1 / 16,
    "e4m3": 2.0,
    "e5m2": 2.0,
    "s8": 2.0,
    "i8": 2.0,
    "f8f6f4": 2.0,
    "mxf8f6f4": 2.0,
    "e2m1": 4.0,
    "mxf4": 4.0,
    "mxf4nvf4": 4.0,
}
"""Speed relative to bf16 by the last word of a matrix instruction's kind; f32 as tf32 three times over."""


def plan_seconds(
    site: Site,
    plan: Plan,
    binaries: Sequence[Binary],
    target: GpuTarget,
    sizes: Mapping[str, int],
) -> float:
    """Seconds of a plan's launches, one after the other.

    Args:
        site: what the plan is of.
        plan: the launches.
        binaries: the code of each.
        target: what for; one of `RATES`.
        sizes: B, L and C; what is cached fills the cache together with the new tokens.
    """
    env: _Sizes = {B: sizes["B"], L: sizes["L"], C: sizes["C"], T: sizes["C"] - sizes["L"]}
    return sum(
        launch_seconds(_demand(site, plan, stage, env), binary, target)
        for stage, binary in zip(plan.stages, binaries, strict=True)
    )


@dataclass(frozen=True)
class Demand:
    """What a launch asks of a GPU, in numbers.

    Attributes:
        programs: that have something to do.
        traffic: bytes of all programs that have to go to and from memory.
        flops, loaded, steps, tile, run: of a program, as in `Work`.
        stages: iterations that a loop of products loads ahead, itself included.
    """

    programs: int
    traffic: float
    flops: float = 0.0
    loaded: float = 0.0
    steps: float = 1.0
    tile: tuple[int, int] = (0, 0)
    run: int = 0
    stages: int = 1


def launch_seconds(demand: Demand, binary: Binary, target: GpuTarget) -> float:
    """Seconds of a launch; 0 where no program has anything to do.

    Args:
        demand: what it asks for.
        binary: its code.
        target: the GPU; one of `RATES`.
    """
    if demand.programs == 0:
        return 0.0
    rates, parts = RATES[target.name], target.multiprocessors
    rounds = math.ceil(demand.programs / parts)
    resident = min(max(1, binary.report.occupancy.programs), rounds)
    ahead = max(1, demand.stages - 1) if demand.tile[0] else 1
    port = _PORT * rates.clock
    together = min(1.0, resident * binary.warps / _PARTITIONS)
    rate = _rate(binary.report, rates) / parts * _fill(demand.tile) * together
    arithmetic = rounds * demand.flops / rate
    flight = demand.loaded / demand.steps * ahead
    if not demand.tile[0]:
        flight = min(flight, binary.threads * _HELD)
    flight = min(demand.loaded, flight) * resident
    memory = max(
        demand.traffic / (target.bandwidth * _PEAK * _contiguous(demand.run)),
        rounds * demand.loaded / port,
        rounds * demand.loaded * _LATENCY / flight if flight else 0.0,
    )
    spills = rounds * binary.report.spilled * binary.threads * demand.steps / port
    hidden = min(arithmetic, memory) / (1 + ahead * resident)
    return LAUNCH + max(arithmetic, memory) + hidden + spills


def _demand(site: Site, plan: Plan, stage: Stage, env: _Sizes) -> Demand:
    """What a launch asks for at given sizes; of a lowering that does not say so, an even share of the traffic."""
    kernel = stage.kernel
    assert isinstance(kernel, GpuKernel)

    def at(value: Dim) -> float:  # what an op reads may be an expectation
        return float(value if isinstance(value, int) else value.evalf(subs=env))

    traffic = sum(at(_bytes(site, plan, arg)) for arg in dict.fromkeys(stage.args))
    programs, work = at(kernel.tasks), kernel.work
    if work is None:
        return Demand(int(programs), traffic, loaded=traffic / max(1, programs))
    if programs and work.programs is not None:
        programs = at(work.programs)
    return Demand(
        int(programs),
        traffic,
        at(work.flops),
        at(work.loaded),
        max(1.0, at(work.steps)),
        work.tile,
        work.run,
        kernel.stages,
    )


def _bytes(site: Site, plan: Plan, arg: Arg) -> Dim:
    """Bytes of a tensor that go through memory at least."""
    if arg.kind == "scratch":
        view = plan.scratch[arg.index]
        return view.elements * view.dtype.bytes
    return (site.op.reads() if arg.kind == "operand" else site.op.writes())[arg.index]


def _rate(report: Report, rates: Rates) -> float:
    """Operations per second of the slowest products of a kernel."""
    speeds = [
        rates.matrix * _SPEEDS.get(re.split(r"[._:]", kind)[-1], 1.0) * _family(kind, rates)
        for kind, _ in report.matrix
    ]
    return min([*speeds, *([rates.vector] if report.plain or not speeds else [])])


def _family(kind: str, rates: Rates) -> float:
    return rates.older if kind.startswith("mma.sync") else 1.0


def _fill(tile: tuple[int, int]) -> float:
    """What matrix units make of a tile of sums."""
    rows, columns = tile
    if not rows:
        return 1.0
    mean = rows * columns / (rows + columns)
    return mean / (mean + 16)


def _contiguous(run: int) -> float:
    """What memory makes of accesses to so many bytes at a time."""
    return run / (run + 16) if run else 1.0
