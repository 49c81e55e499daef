"""Decode of the state-space recurrence: the state streams through once, vectorised over its columns N."""

from nemoc.codegen.mixer import Mixer, take_apart
from nemoc.codegen.plan import Plan, Site, Stage
from nemoc.codegen.regions import alone
from nemoc.codegen.tvm.body import ramp
from nemoc.codegen.tvm.mixer_task import MixerTask
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import vector_pieces
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.ir.ops.mamba import SsdUpdate


def emit_ssd_update(site: Site, target: CpuTarget) -> Plan:
    """The plan of an `SsdUpdate`: one task for each head, which updates its state in place."""
    assert isinstance(site.op, SsdUpdate)
    region = alone(site)
    mixer = take_apart(region)
    task = MixerTask("ssd_update", region, target, mixer, heads=1)
    return Plan((write_update(task, target, mixer),), updates=mixer.updates)


def write_update(task: MixerTask, target: CpuTarget, mixer: Mixer) -> Stage:
    """The launch that takes the state through one token.

    Each element of the state is read and written once: S ← S · decay + (dt·x) · b, and its product with c goes into the
    partial sums of y, one per lane.
    """
    w, columns, width = task.writer, mixer.columns, mixer.width
    x, y = w.local("x", task.columns), w.local("y", task.columns)
    b, c = w.local("b", columns), w.local("c", columns)
    for name, tile in (("x", x), ("b", b), ("c", c)):
        task.copy(name, task.row, tile, "0", early=True)
    if mixer.owns_history(task.heads):
        task.shift_history()
    view = task.body.view(mixer.op.state)
    state = w.buffer("state", task.body.arg(mixer.op.state), view)
    pieces = list(vector_pieces(columns, target.lanes if view.strides[-1] == 1 else 1))
    with w.loop("j", task.heads) as j:
        h = w.let("h", f"{task.head} + {j}")
        step = task.scalar("dt", task.row, h)
        exponent = w.value("exponent", f"{step} * {task.scalar('a', '0', h)}")
        decay = VectorMath(w, 1).exp(exponent)
        skip = task.scalar("d", "0", h) if mixer.op.d is not None else ""
        with w.loop("p", width) as p:
            at = w.let("at", f"{j} * {width} + {p}")
            value = w.value("v", f"{x}[{at}]")
            driven = w.value("driven", f"{value} * {step}")
            total = f"{value} * {skip}" if skip else "T.float32(0)"
            for lanes, count, first in pieces:
                sums = w.value("sums", VectorMath(w, lanes).const(0.0), lanes)
                with w.loop("v", count) as v:
                    column = w.let("column", f"{first} + {v} * {lanes}")
                    here = f"{task.n}, {h}, {p}, {column}"
                    kept = f"{w.load(state, here, lanes)} * {decay}"
                    added = f"{b}[{ramp(column, lanes)}] * {driven}"
                    s = w.value("s", f"{kept} + {added}", lanes)
                    if mixer.stores_state:
                        w.store(state, here, s, lanes)
                    w.line(f"{sums} = {sums} + {s} * {c}[{ramp(column, lanes)}]")
                total = w.value("total", f"{total} + {VectorMath(w, lanes).total(sums)}")
            w.line(f"{y}[{at}] = {total}")

    def computed(_: str, column: str, lanes: int) -> str:
        return f"{y}[{ramp(f'{column} - {task.first}', lanes)}]"

    task.store(task.row, computed, target.lanes)
    return task.finish()
