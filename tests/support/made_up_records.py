"""Kernels whose tunables and times tests make up, with records of them."""

import math
from collections.abc import Callable, Mapping, Sequence

from nemoc.autotune.records import Record, compact
from nemoc.autotune.search import Space
from nemoc.codegen.plan import Kernel, Plan, Site, Stage, kernel_name
from nemoc.codegen.tunables import Schedule, Setting, Tunable
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Linear
from support.kernels import value

DEVICE = "cpu:made-up, 2 threads"
TOOLS = "apache-tvm 0.27.0"


def site(features: int = 64, width: int = 32) -> Site:
    """A product by a weight [features, width]."""
    op = Linear(value(DType.F32, 4, width), value(DType.F32, features, width), interleave=1)
    return Site.dense(op)


def space(
    *tunables: Tunable,
    legal: Callable[[Schedule], bool] = lambda schedule: True,
    keep_bits: bool = False,
    where: Site | None = None,
) -> Space:
    """A space with these tunables, of which some schedules may not be legal."""

    def emit(site: Site) -> Plan:
        settings = {t.name: site.choices.pick(t) for t in tunables}
        site.choices.require(legal(settings), "the test says so")
        name = kernel_name("product", repr((site.key, sorted(settings.items()))))
        return Plan((Stage(Kernel(name, "", 1), ()),))

    return Space.of(where or site(), emit, keep_bits)


def record(
    shape: Sequence[int],
    time: Callable[[Sequence[int], Schedule], float],
    tunables: Sequence[Tunable],
    tried: Sequence[Mapping[str, Setting]],
    **fields: object,
) -> Record:
    """What tuning a shape leaves behind, where a schedule takes so much time."""
    defaults = {t.name: t.default for t in tunables}

    def ratio(changes: Mapping[str, Setting]) -> float:
        return time(shape, defaults | dict(changes)) / time(shape, defaults)

    best = min([{}, *tried], key=ratio)
    values: dict[str, object] = {
        "kernel": f"product_{'x'.join(map(str, shape))}",
        "device": DEVICE,
        "tools": TOOLS,
        "structure": "linear(f32[#,#])",
        "shape": tuple(shape),
        "sizes": {"B": 1, "L": 256, "C": 257},
        "schedule": dict(best),
        "numerics": "same",
        "ratio": ratio(best),
        "low": ratio(best) * 0.99,
        "high": ratio(best) * 1.01,
        "seconds": (1e-3, 1e-3 * ratio(best)),
        "trials": 1 + len(tried),
        "origin": "measured",
        "machine": "a machine that tests made up",
        "date": "2026-11-01T12:00:00+00:00",
        "defaults": defaults,
        "tried": compact([({}, 1.0), *((c, ratio(c)) for c in tried)]),
    }
    return Record(**(values | fields))  # type: ignore[arg-type]


def valley(optimum: float, setting: float, depth: float = 0.1) -> float:
    """A time that is least at an optimum, by powers of two."""
    return math.exp(depth * (math.log2(setting + 1) - optimum) ** 2)
