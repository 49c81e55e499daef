"""Moving elements chosen by an index: bits are copied, whatever they mean."""

from nemoc.codegen.plan import Arg, Plan, Site, View
from nemoc.codegen.tvm.elementwise import unflatten
from nemoc.codegen.tvm.loops import Tiles, each_vector, vector_lanes
from nemoc.codegen.tvm.shape import copier
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter
from nemoc.codegen.views import merge_axes
from nemoc.ir.dims import product

_RESULT = Arg("result", 0)

_BLOCK = 256
"""Single elements that a task of `take_along` gathers."""


def emit_take_rows(site: Site, target: CpuTarget) -> Plan:
    """result[i..., :] = table[index[i...], :]; small rows several to a task, large ones in parts."""
    table, index = site.operands
    result = site.results[0]
    picked, lead = merge_axes([index, _axes(result, 0, index.rank)])
    from_row, to_row = merge_axes(
        [_axes(table, 1, table.rank), _axes(result, index.rank, result.rank)]
    )
    tiles = Tiles(product((*lead.shape, *to_row.shape[:-1])), to_row.shape[-1])

    writer = KernelWriter("take_rows")
    x = writer.buffer("table", site.arg("table"), join(_axes(table, 0, 1), from_row))
    i = writer.buffer("index", site.arg("index"), picked)
    y = writer.buffer("y", _RESULT, join(lead, to_row))
    with tiles.loop(writer) as (row, start, count):
        to = unflatten(writer, row, (*lead.shape, *to_row.shape[:-1]))
        at = _load_index(writer, i, to[: lead.rank], index)
        copy = copier(writer, x, [at, *to[lead.rank :]], y, to, start)
        each_vector(writer, count, vector_lanes([from_row, to_row], target), copy)
    return Plan((writer.finish(tiles.tasks),))


def emit_take_along(site: Site, target: CpuTarget) -> Plan:
    """result[..., j] = x[..., index[..., j]], element by element."""
    x, index = site.operands
    result = site.results[0]
    views = (x, index, result)
    leads = merge_axes([_axes(v, 0, v.rank - 1) for v in views])
    rows = leads[0].shape
    width = index.shape[-1]
    tiles = Tiles(product(rows), width, _BLOCK)

    writer = KernelWriter("take_along")
    source, i, y = (
        writer.buffer(hint, arg, join(lead, _axes(view, view.rank - 1, view.rank)))
        for hint, arg, lead, view in zip(
            ("x", "index", "y"),
            (site.arg("x"), site.arg("index"), _RESULT),
            leads,
            views,
            strict=True,
        )
    )
    with tiles.loop(writer) as (row, start, count):
        lead = unflatten(writer, row, rows)
        with writer.loop("j", count) as j:
            at = _load_index(writer, i, [*lead, f"{start} + {j}"], index)
            chosen = writer.load(source, ", ".join([*lead, at]), raw=True)
            writer.store(y, ", ".join([*lead, f"{start} + {j}"]), chosen, raw=True)
    return Plan((writer.finish(tiles.tasks),))


def emit_take_last(site: Site, target: CpuTarget) -> Plan:
    """x [B, L, H], valid [B]: result[b] = x[b, max(valid[b] − 1, 0)]."""
    x, valid = site.operands
    result = site.results[0]
    tiles = Tiles(x.shape[0], x.shape[2])

    writer = KernelWriter("take_last")
    source = writer.buffer("x", site.arg("x"), x)
    lengths = writer.buffer("valid", site.arg("valid"), valid)
    y = writer.buffer("y", _RESULT, result)
    with tiles.loop(writer) as (b, start, count):
        last = writer.value("last", f"T.max({writer.load(lengths, b)} - 1, 0)", 1, "int32")
        copy = copier(writer, source, [b, last], y, [b], start)
        each_vector(writer, count, vector_lanes([x, result], target), copy)
    return Plan((writer.finish(tiles.tasks),))


def join(lead: View, rest: View) -> View:
    """One view with the axes of both."""
    return View(rest.dtype, lead.shape + rest.shape, lead.strides + rest.strides)


def _axes(view: View, start: int, stop: int) -> View:
    """The view along some of its axes."""
    return View(view.dtype, view.shape[start:stop], view.strides[start:stop])


def _load_index(writer: KernelWriter, index: str, at: list[str], view: View) -> str:
    """An element of an index as an int32 variable."""
    loaded = writer.load(index, ", ".join(at))
    wide = COMPUTE_NAMES[view.dtype] != "int32"
    return writer.value("pick", f'T.Cast("int32", {loaded})' if wide else loaded, 1, "int32")
