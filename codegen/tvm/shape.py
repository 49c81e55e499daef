"""Moving elements without choosing them: copies under views, concatenation, constants; and sums along an axis."""

from collections.abc import Callable
from dataclasses import dataclass

from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.tvm.elementwise import unflatten
from nemoc.codegen.tvm.loops import (
    Tiles,
    constant,
    count_of,
    each_vector,
    sum_elements,
    vector_lanes,
)
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter, offset_text, size_text
from nemoc.codegen.views import apply_view, merge_axes, reshape_view
from nemoc.ir.dims import Dim, dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.shape import Concat, Full, Sum

_X, _Y = Arg("operand", 0), Arg("result", 0)

_BLOCK = 1024
"""Elements that a task sums at least, where there are as many."""


def emit_view(site: Site, target: CpuTarget) -> Plan:
    """A copy for reshape, permute and slice: where the result cannot be a view, or must be dense."""
    x, y = site.operands[0], site.results[0]
    there = apply_view(site.op, x)
    if there is not None:
        view, offset = there
        return _copy(site.op.mnemonic(), Place(_X, view, offset), Place(_Y, y), target)
    back = reshape_view(y, x.shape)
    if back is not None:
        return _copy(site.op.mnemonic(), Place(_X, x), Place(_Y, back), target)
    return _copy_by_number(x, y)


def emit_concat(site: Site, target: CpuTarget) -> Plan:
    """One launch, in which the tasks of the operands follow one another."""
    op, y = site.op, site.results[0]
    assert isinstance(op, Concat)
    writer = KernelWriter("concat")
    task, start, total = "task", dim(0), dim(0)
    for i, x in enumerate(site.operands):
        offset = dim(start * y.strides[op.axis] * y.dtype.bytes)
        part = Place(_Y, View(y.dtype, x.shape, y.strides), offset)
        copy = BlockCopy(Place(Arg("operand", i), x), part)
        if i > 0:
            task = writer.let("task", f"task - {size_text(total)}")
        with writer.block(f"if {task} < {size_text(copy.tasks)}:"):
            copy.write(writer, task, target)
            writer.line("return 0")
        start, total = dim(start + x.shape[op.axis]), dim(total + copy.tasks)
    return Plan((writer.finish(total),))


def emit_full(site: Site, target: CpuTarget) -> Plan:
    """One value everywhere."""
    op = site.op
    assert isinstance(op, Full)
    (view,) = merge_axes([site.results[0]])
    tiles = Tiles(product(view.shape[:-1]), view.shape[-1])
    lanes = vector_lanes([view], target)
    writer = KernelWriter("full")
    y = writer.buffer("y", _Y, view)
    with tiles.loop(writer) as (row, start, count):
        lead = unflatten(writer, row, view.shape[:-1])

        def fill(at: str, n: int) -> None:
            index = ", ".join([*lead, f"{start} + {at}"])
            writer.store(y, index, constant(op.value, op.dtype, n), n)

        each_vector(writer, count, lanes, fill)
    return Plan((writer.finish(tiles.tasks),))


def emit_sum(site: Site, target: CpuTarget) -> Plan:
    """Sum along an axis: of many columns at once where the other axes are contiguous, else of each by itself."""
    op, x, y = site.op, site.operands[0], site.results[0]
    assert isinstance(op, Sum)
    others = [i for i in range(x.rank) if i != op.axis]
    rest = View(x.dtype, y.shape, tuple(x.strides[i] for i in others))
    rest, y = merge_axes([rest, y])
    contiguous = y.shape[-1] != 1 and rest.strides[-1] == y.strides[-1] == 1
    emit = _sum_columns if contiguous else _sum_rows
    return Plan((emit(x.shape[op.axis], x.strides[op.axis], rest, y, target),))


@dataclass(frozen=True)
class Place:
    """A part of a tensor: a view that begins `offset` bytes behind the tensor's first element."""

    arg: Arg
    view: View
    offset: Dim = 0

    def buffer(self, writer: KernelWriter, hint: str, view: View) -> str:
        """Declare the part under a view that describes the same elements."""
        return writer.buffer(hint, self.arg, view, offset_text(self.offset) if self.offset else "")


class BlockCopy:
    """A copy of bits from one place to another of the same shape, cut into tasks."""

    def __init__(self, source: Place, result: Place) -> None:
        self._places = source, result
        self._views = merge_axes([source.view, result.view])
        *outer, width = self._views[0].shape
        self._outer = tuple(outer)
        self._tiles = Tiles(product(outer), width)

    @property
    def tasks(self) -> Dim:
        """How many tasks there are."""
        return self._tiles.tasks

    def write(self, writer: KernelWriter, task: str, target: CpuTarget) -> None:
        """The statements of one task."""
        x, y = (
            place.buffer(writer, hint, view)
            for place, hint, view in zip(self._places, ("x", "y"), self._views, strict=True)
        )
        with self._tiles.loop(writer, task) as (row, start, count):
            lead = unflatten(writer, row, self._outer)
            copy = copier(writer, x, lead, y, lead, start)
            each_vector(writer, count, vector_lanes(self._views, target), copy)


def copier(
    writer: KernelWriter, x: str, from_: list[str], y: str, to: list[str], start: str
) -> Callable[[str, int], None]:
    """A body for `each_vector` that copies between rows of two buffers, given their leading indices."""

    def copy(at: str, lanes: int) -> None:
        loaded = writer.load(x, ", ".join([*from_, f"{start} + {at}"]), lanes, raw=True)
        writer.store(y, ", ".join([*to, f"{start} + {at}"]), loaded, lanes, raw=True)

    return copy


def _copy(stem: str, source: Place, result: Place, target: CpuTarget) -> Plan:
    writer = KernelWriter(stem)
    copy = BlockCopy(source, result)
    copy.write(writer, "task", target)
    return Plan((writer.finish(copy.tasks),))


def _copy_by_number(x: View, y: View) -> Plan:
    """Element by element in row-major order, for two strided layouts of different shapes."""
    writer = KernelWriter("reshape")
    tiles = Tiles(x.elements, 1)
    source, result = writer.buffer("x", _X, x), writer.buffer("y", _Y, y)
    with tiles.loop(writer) as (number, _, _):
        at, to = (unflatten(writer, number, view.shape) for view in (x, y))
        writer.store(result, ", ".join(to), writer.load(source, ", ".join(at), raw=True), raw=True)
    return Plan((writer.finish(tiles.tasks),))


def _sum_columns(size: Dim, step: Dim, rest: View, y: View, target: CpuTarget) -> Stage:
    """Vectors of sums: y[..., j] = Σᵢ x[i, ..., j]."""
    writer = KernelWriter("sum")
    x_view = View(rest.dtype, (size, *rest.shape), (step, *rest.strides))
    x, result = writer.buffer("x", _X, x_view), writer.buffer("y", _Y, y)
    tiles = Tiles(product(y.shape[:-1]), y.shape[-1])
    with tiles.loop(writer) as (row, start, count):
        lead = unflatten(writer, row, y.shape[:-1])

        def add(at: str, lanes: int) -> None:
            index = ", ".join([*lead, f"{start} + {at}"])
            zero = constant(0.0, y.dtype, lanes)
            total = writer.value("total", zero, lanes, COMPUTE_NAMES[y.dtype])
            with writer.loop("i", size_text(size)) as i:
                writer.line(f"{total} = {total} + {writer.load(x, f'{i}, {index}', lanes)}")
            writer.store(result, index, total, lanes)

        each_vector(writer, count, vector_lanes([rest, y], target), add)
    return writer.finish(tiles.tasks)


def _sum_rows(size: Dim, step: Dim, rest: View, y: View, target: CpuTarget) -> Stage:
    """One sum after another: y[...] = Σᵢ x[..., i]."""
    writer = KernelWriter("sum")
    x_view = View(rest.dtype, (*rest.shape, size), (*rest.strides, step))
    x, result = writer.buffer("x", _X, x_view), writer.buffer("y", _Y, y)
    lanes = vector_lanes([x_view], target) if rest.dtype == DType.F32 else 1
    together = max(1, _BLOCK // size) if isinstance(size, int) else 1
    tiles = Tiles(y.elements, 1, together)
    with tiles.loop(writer) as (row, _, _):
        index = unflatten(writer, row, y.shape)

        def term(at: str, n: int) -> str:
            return writer.load(x, ", ".join([*index, at]), n)

        total = sum_elements(writer, count_of(writer, size), lanes, rest.dtype, term)
        writer.store(result, ", ".join(index), total)
    return writer.finish(tiles.tasks)
