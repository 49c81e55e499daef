"""Regions around a state-space recurrence: the convolution before it and the gate and norm behind it, in one launch.

A task owns some heads of a group, and convolves the channels that these read: neither the convolved channels nor dt nor
y reach memory. Further launches are needed in two cases. Where a group is divided, its tasks read the same old rows of
b's and c's history, so that the next ones are written behind them. And results that need more of a token than one task
has, as norms of wider groups do, are computed from y row by row.
"""

from nemoc.codegen.mixer import Mixer, take_apart
from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body, Rows, rows_view
from nemoc.codegen.tvm.conv import shift_state
from nemoc.codegen.tvm.loops import each_vector
from nemoc.codegen.tvm.mixer_task import MixerTask, Y, heads_per_task
from nemoc.codegen.tvm.scan import write_scan
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.update import write_update
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import product
from nemoc.ir.ops import SsdScan

_STATE_KIB = Tunable("state_kib", 256, (64, 128, 256, 512))
"""KiB of state that a task of a scan keeps on its stack at most, unless a single head has more."""


def emit_conv_scan(site: Site, target: CpuTarget) -> Plan:
    """The plan of a region whose anchor is an `SsdScan` or an `SsdUpdate`; it updates its states in place.

    Raises:
        RegionError: the region has more in it than such a kernel can do; the message says what.
        LayoutError: an operand's tokens have no common stride.
    """
    mixer = take_apart(site)
    scan = isinstance(mixer.op, SsdScan)
    room = mixer.heads
    if scan and mixer.conv is not None:
        state = int(site.choices.pick(_STATE_KIB)) << 10
        room = state // (4 * mixer.width * mixer.columns)
    heads = heads_per_task(mixer, room)
    whole = {
        i: rows for i, rows in mixer.rows.items() if not mixer.by_column(rows, heads * mixer.width)
    }
    task = MixerTask(
        "conv_scan" if scan else "conv_update", site, target, mixer, heads, scratch=bool(whole)
    )
    stages = [write_scan(task, target, mixer) if scan else write_update(task, target, mixer)]
    if whole:
        stages.append(_whole_rows(site, target, mixer, whole))
    if mixer.stores_history and mixer.conv is not None and not mixer.owns_history(heads):
        stages.append(shift_state(site, target, mixer.conv))
    scratch = (View.dense(mixer.y.value.type),) if whole else ()
    return Plan(tuple(stages), scratch, updates=mixer.updates)


def _whole_rows(site: Site, target: CpuTarget, mixer: Mixer, wanted: dict[int, Rows]) -> Stage:
    """The launch that computes results of whole rows from y in scratch, a task for each token."""
    w = KernelWriter("from_y")
    body = Body(w, site, target)
    y = w.buffer("y", Y, rows_view(View.dense(mixer.y.value.type), mixer.y))
    body.bind(mixer.y.value, lambda row, at, n: w.load(y, f"{row}, {at}", n))
    body.declare(*wanted.values())
    buffers = {
        i: w.buffer("out", Arg("result", i), rows_view(site.results[i], rows))
        for i, rows in wanted.items()
    }
    body.prepare("task", *wanted.values())
    for i, rows in wanted.items():

        def store(at: str, n: int, i: int = i, rows: Rows = rows) -> None:
            w.store(buffers[i], f"task, {at}", body.at(rows, "task", at, n), n)

        most = target.lanes if site.results[i].strides[-1] == 1 else 1
        each_vector(w, rows.width, min(most, body.lanes(rows)), store)
    return w.finish(product(mixer.y.own))
