"""Kernels that exist on paper only, for tests of tuning: their times follow from their settings."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nemoc.autotune.records import Device
from nemoc.autotune.tuner import Kernel
from nemoc.codegen.bench import Finding
from nemoc.codegen.plan import Kernel as Source
from nemoc.codegen.plan import Plan, Site, Stage
from nemoc.codegen.tunables import Tunable
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Linear
from nemoc.ir.types import TensorType, Value

DEVICE = Device("paper:1, 1 thread", "pencil 1", "a sheet")

TILE = Tunable("tile", 2, (1, 2, 4, 8))
UNROLL = Tunable("unroll", 1, (1, 2, 4))
CHAINS = Tunable("chains", 1, (1, 2), keeps_bits=False)
DEAD = Tunable("dead", 0, (0, 1))
"""A choice that leads to the same kernel either way."""


def site(width: int) -> Site:
    """A site that differs from others in its width."""
    x = Value("x", TensorType(DType.F32, (B, L, width)))
    w = Value("w", TensorType(DType.F32, (8, width)))
    return Site.dense(Linear(x, w))


def emit(given: Site) -> Plan:
    """A plan that says what was chosen; tiles of 8 cannot be unrolled by 4."""
    choices = given.choices
    tile, unroll, chains, _ = (choices.pick(t) for t in (TILE, UNROLL, CHAINS, DEAD))
    choices.require(not (tile == 8 and unroll == 4), "a tile of 8 unrolled by 4")
    text = f"{given.operands[0].shape[-1]} tile {tile} unroll {unroll} chains {chains}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Plan((Stage(Source(f"paper_{digest}", text, 1), ()),))


def settings_of(plan: Plan) -> dict[str, int]:
    """What a plan says."""
    words = plan.stages[0].kernel.source.split()[1:]
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def paper_seconds(settings: Mapping[str, int]) -> float:
    """Time of a kernel: best with tiles of 4 unrolled by 2 in 2 chains."""
    seconds = (
        1e-3 * (1.0 + 0.2 * abs(settings["tile"] - 4)) * (1.0 + 0.1 * abs(settings["unroll"] - 2))
    )
    return seconds * (0.8 if settings["chains"] == 2 else 1.0)


@dataclass
class PaperBench:
    """Runs kernels on paper.

    Attributes:
        seconds: the time of settings.
        faults: what is wrong with some settings.
        tried: the name of every plan that was compiled, in order.
        before_timing: called before times are given.
    """

    seconds: Callable[[Mapping[str, int]], float] = paper_seconds
    faults: Callable[[Mapping[str, int]], Finding | None] = lambda settings: None
    tried: list[str] = field(default_factory=list)
    before_timing: Callable[[Sequence[Plan]], None] = lambda plans: None

    def compile(self, plans: Sequence[Plan]) -> dict[str, Finding]:
        self.tried.extend(plan.name for plan in plans[1:])
        found = {plan.name: self.faults(settings_of(plan)) for plan in plans}
        return {n: f for n, f in found.items() if f is not None and f.outcome == "compile"}

    def check(self, plan: Plan) -> Finding:
        fault = self.faults(settings_of(plan))
        return fault or Finding("ok", equal=settings_of(plan)["chains"] == 1)

    def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]] | Finding:
        self.before_timing(plans)
        return [
            [self.seconds(settings_of(plan)) * (1.0 + 0.001 * (i % 3)) for i in range(rounds)]
            for plan in plans
        ]


def paper_kernel(width: int, bench: PaperBench, launches: int = 1) -> Kernel:
    """A kernel that is measured on paper."""
    given = site(width)
    return Kernel(given, emit(given), "decode", launches, {"B": 1, "L": 1, "C": 8}, lambda: bench)
