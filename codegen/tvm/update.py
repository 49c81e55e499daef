"""Decode of the state-space recurrence: the state streams through once, vectorised over its columns N."""

from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import vector_pieces
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import product
from nemoc.ir.ops.mamba import SsdUpdate

_Y = Arg("result", 0)
_NEXT = Arg("result", 1)


def emit_ssd_update(site: Site, target: CpuTarget) -> Plan:
    """The plan of an `SsdUpdate`: one task for each head; the new state may take the old one's place.

    Each element of the state is read and written once: S ← S · decay + (dt·x) · b, and its product with c goes into the
    partial sums of y, one per lane.
    """
    assert isinstance(site.op, SsdUpdate)
    w = KernelWriter("ssd_update")
    names = ("x", "dt", "a", "b", "c", *(("d",) if site.has("d") else ()), "state")
    args = [*map(site.arg, names), _Y, _NEXT]
    x, dt, a, b, c, *d, state, y, following = (w.buffer(str(v), v, site.view(v)) for v in args)
    batch, heads, rows = site.view(_Y).shape
    groups, columns = site.view(site.arg("b")).shape[1:]
    n = w.let("n", f"task // {heads}")
    h = w.let("h", f"task % {heads}")
    g = w.let("g", f"{h} // {int(heads) // int(groups)}")
    step = w.value("step", f"{dt}[{n}, {h}]")
    decay = VectorMath(w, 1).exp(w.value("exponent", f"{step} * {a}[{h}]"))
    streams = (site.view(v) for v in (site.arg("b"), site.arg("c"), site.arg("state"), _NEXT))
    widest = target.lanes if all(v.strides[-1] == 1 for v in streams) else 1
    pieces = list(vector_pieces(int(columns), widest))
    with w.loop("p", rows) as p:
        value = w.value("v", f"{x}[{n}, {h}, {p}]")
        driven = w.value("driven", f"{value} * {step}")
        total = f"{value} * {d[0]}[{h}]" if d else "T.float32(0)"
        for lanes, count, first in pieces:
            sums = w.value("sums", VectorMath(w, lanes).const(0.0), lanes)
            with w.loop("j", count) as j:
                at = w.let("at", f"{first} + {j} * {lanes}")
                kept = f"{w.load(state, f'{n}, {h}, {p}, {at}', lanes)} * {decay}"
                added = f"{w.load(b, f'{n}, {g}, {at}', lanes)} * {driven}"
                s = w.value("s", f"{kept} + {added}", lanes)
                w.store(following, f"{n}, {h}, {p}, {at}", s, lanes)
                w.line(f"{sums} = {sums} + {s} * {w.load(c, f'{n}, {g}, {at}', lanes)}")
            total = w.value("total", f"{total} + {VectorMath(w, lanes).total(sums)}")
        w.line(f"{y}[{n}, {h}, {p}] = {total}")
    return Plan((w.finish(product((batch, heads))),), in_place=state_in_place(site))


def state_in_place(site: Site) -> tuple[tuple[int, int], ...]:
    """The plan's `in_place` for a state op: result 1 may take the state's memory, where it lies the same."""
    state = site.arg("state")
    return ((1, state.index),) if site.view(state) == site.view(_NEXT) else ()
