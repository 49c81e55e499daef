"""Regions around products with interleaved weights.

What comes before a product is computed for a block of rows, into a local array, from which all of a task's panels read
it; rows that an index chooses are read where they are. Products in integers have it computed in a launch before, which
makes integers of it. What comes behind a product is computed in one of two ways:

- in registers: every result has the product's rows, and an element of it needs only the sum at its own place. The sums
  of a tile become elements of the results before anything is stored.
- by columns: results may have other rows than products (as where those of several experts meet in one token), and there
  may be several products of one width, but an element needs only sums of its own column. A task owns some panels: it
  stores its columns of every product to scratch, and reads nothing else of that when it goes through the results.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import sympy

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, Stage, View
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body, Rows, Source, ramp, rows_view
from nemoc.codegen.tvm.dots import DotProduct, Quads, dot_decoder
from nemoc.codegen.tvm.e2m1 import Decoder
from nemoc.codegen.tvm.int8 import Int8Product, Pairs
from nemoc.codegen.tvm.integers import IntegerRows, Integers
from nemoc.codegen.tvm.linear import (
    PANELS,
    GatheredRows,
    Panels,
    Product,
    RowBlock,
    RowSource,
    Sink,
    StoredRows,
    most_panels,
    obstacle,
    panel_lanes,
    row_blocks,
    rows_in_matrix,
    stored,
    write_groups,
    write_panels,
    write_row_blocks,
)
from nemoc.codegen.tvm.loops import each_vector
from nemoc.codegen.tvm.nvfp4 import FloatProduct, Packed, PackedProduct, packed_bytes
from nemoc.codegen.tvm.place import row_axes
from nemoc.codegen.tvm.row_ops import expect_short, is_short
from nemoc.codegen.tvm.rows import in_place_pairs
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, product
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import (
    CacheWrite,
    DequantizeNvfp4,
    GroupedLinear,
    Linear,
    Reshape,
    RoundToInt8,
    TakeRows,
)
from nemoc.ir.types import Value

_WEIGHT_KIB = Tunable("weight_kib", 384, (96, 192, 384, 768))
"""KiB of weight that a task takes, where there are so many, if it `takes_much`."""

_LEAST_TASKS = 8
"""Tasks at least of a product that computes rows of x for packed weights."""

_LEAST_INTEGER_TASKS = 16
"""Tasks at least of a product in integers: each thread of a few should have several, and pieces stay long."""

_ARRAY_BYTES = 320 << 10
"""Bytes of computed rows of x at once: they lie on the stack."""

Put = Callable[[str, str, str, int], None]
"""Writes what becomes of elements: `(row, column, elements, lanes)`."""


def emit_linear_region(site: Site, target: CpuTarget) -> Plan:
    """The plan of a region with one or more products, in place where that is safe: one launch, and one before for each
    product in integers.

    Raises:
        RegionError: the rest of the region is not before its products, or behind them in neither of the two ways.
        LayoutError: rows of an operand have no common stride.
    """
    reasons = []
    for emit in (_emit_in_registers, _emit_by_columns):
        try:
            return emit(site, target)
        except RegionError as error:
            reasons.append(str(error))
            site.choices.forget()
    raise RegionError("; ".join(dict.fromkeys(reasons)))


def _emit_in_registers(site: Site, target: CpuTarget) -> Plan:
    """The plan where every element of a result needs the sum at its own place."""
    writer = KernelWriter("fused_linear", site.choices)
    body = Body(writer, site, target)
    anchor, *others = _anchors(body, site)
    if others:
        raise RegionError(f"%{others[0].value.name} is a second product")
    results = _Results(body, site, [anchor])
    if results.count != anchor.rows:
        raise RegionError(f"its results have other rows than %{anchor.value.name}")
    if results.whole_rows:
        raise RegionError("its results need whole rows")

    def put(row: str, column: str, sums: str, lanes: int) -> None:
        r, c = writer.let("r", row), writer.let("c", column)
        here = "0" if anchor.rows == 1 else r, c, lanes

        def source(*place: str | int) -> str:
            if place != here:
                raise RegionError(f"%{anchor.value.name} is needed at other places than its own")
            return sums

        results.write(r, c, lanes, {anchor.value: source})

    made = anchor.product(Sink(put, results.lanes(anchor.op)))
    if isinstance(anchor.op, Linear):
        panels = Panels(made.panels, _panels_at_once(made, anchor))
        tasks = write_row_blocks(made, anchor.source, anchor.rows, panels)
    else:
        panels = Panels(made.panels, _most_panels(made, anchor))
        anchor.write(made, panels)
        tasks = panels.tasks
    stages, scratch = _before([anchor])
    return Plan(
        (*stages, writer.finish(tasks)), scratch, in_place=results.in_place, updates=results.updates
    )


def _emit_by_columns(site: Site, target: CpuTarget) -> Plan:
    """The plan where elements of a result need sums of their own column only."""
    writer = KernelWriter("fused_columns", site.choices)
    body = Body(writer, site, target)
    anchors = _anchors(body, site)
    op = anchors[0].op
    if len({(a.op.width, a.op.interleave) for a in anchors}) > 1:
        raise RegionError("its products differ in width or panels")
    results = _Results(body, site, anchors)
    stages, scratch = _before(anchors)
    sums: dict[Value, str] = {}
    for number, anchor in enumerate(anchors, len(scratch)):
        view = rows_view(View.dense(anchor.value.type), Rows.of(anchor.value))
        sums[anchor.value] = writer.buffer("sums", Arg("scratch", number), view)
    products = [a.product(stored(writer, sums[a.value], panel_lanes(op, target))) for a in anchors]
    panels = Panels(products[0].panels, max(map(_most_panels, products, anchors)))
    for anchor, made in zip(anchors, products, strict=True):
        anchor.write(made, panels)
    width = products[0].n
    most = panels.each * op.interleave
    start = writer.let("start", f"task * {most}")
    count = writer.let("count", f"T.min({most}, {width} - {start})")
    with writer.loop("r", size_text(results.count)) as row, body.bindings():
        results.prepare(row)

        def store(at: str, lanes: int) -> None:
            column = writer.let("c", f"{start} + {at}")
            sources = {v: _column_of(writer, v, sums[v], column) for v in sums}
            results.write(row, column, lanes, sources)

        each_vector(writer, count, results.lanes(op), store)
    return Plan(
        (*stages, writer.finish(panels.tasks)),
        (*scratch, *(View.dense(anchor.value.type) for anchor in anchors)),
        in_place=results.in_place,
        updates=results.updates,
    )


def _column_of(writer: KernelWriter, value: Value, buffer: str, own: str) -> Source:
    """Elements of a stored product, as long as they are of one column."""

    def source(row: str, column: str, lanes: int) -> str:
        if column != own:
            raise RegionError(f"%{value.name} is needed at other columns than the result's")
        return writer.load(buffer, f"{row}, {column}", lanes)

    return source


def _panels_at_once(made: Product, anchor: "_Anchor") -> int:
    """Panels of a task: rows of x that it computes serve all of them, and long pieces of a weight are read faster."""
    if not anchor.takes_much:
        return made.writer.pick(PANELS)
    bytes_ = made.writer.pick(_WEIGHT_KIB) << 10
    return min(_most_panels(made, anchor), -(-bytes_ // anchor.panel_bytes))


def _most_panels(made: Product, anchor: "_Anchor") -> int:
    """As many as leave enough tasks; fewer do where rows would be computed for panels of a quarter of the bytes."""
    if anchor.integers:
        return most_panels(made, _LEAST_INTEGER_TASKS)
    if anchor.computes and anchor.is_packed:
        return most_panels(made, _LEAST_TASKS)
    return most_panels(made)


class _Anchor:
    """A product of the region: its operands, declared in the kernel.

    Args:
        body: the region's.
        site: the region.
        op: the product.
        value: its result.
        first: the number of the first scratch tensor that it may have.

    Attributes:
        op, value: as given.
        integers: rows of x, if they are made integers of.
        source: where rows of x come from.

    Raises:
        RegionError: no kernel carries it out, or it needs something that is not computed row by row.
        LayoutError: rows of an operand have no common stride.
    """

    def __init__(
        self, body: Body, site: Site, op: Linear | GroupedLinear, value: Value, first: int
    ) -> None:
        self.op, self.value = op, value
        self.integers: IntegerRows | None = None
        self._body = body
        reason = obstacle(op, body.target)
        if reason is not None or op.interleave == 1:
            raise RegionError(f"no skeleton for {reason or 'a product with plain rows'}")
        self._packed = self._unpacking(op.w)
        self.source: RowSource
        if self._packed:
            self.source, self._kind, self._decoder = self._packed_way(site, first)
        else:
            self.source = row_source(body, op.x)
        self._w = "" if self._packed else self._operand("w", op.w)
        self._offsets = ""
        if isinstance(op, GroupedLinear):
            self._offsets = self._operand("offsets", op.offsets)

    @property
    def rows(self) -> Dim:
        """How many rows it has."""
        return product(self.value.shape[:-1])

    def product(self, sink: Sink) -> Product:
        """The product into a sink."""
        writer, target = self._body.writer, self._body.target
        if self._packed:
            decoder = self._decoder
            return self._kind.of_packed(writer, target, self.op, self._packed, decoder, sink)
        return Product.of(writer, target, self.op, self._w, sink)

    @property
    def computes(self) -> bool:
        """Whether tasks compute rows of x."""
        return isinstance(self.source, _ComputedRows)

    @property
    def takes_much(self) -> bool:
        """Whether tasks take much of a weight: each computes rows for it, or it is read faster in long pieces."""
        return self.computes or self.integers is not None

    @property
    def is_packed(self) -> bool:
        """Whether the weight is stored packed."""
        return self._packed is not None

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel as it is stored."""
        k, b = self.op.w.shape[-2:]
        assert isinstance(k, int) and isinstance(b, int)
        return packed_bytes(k, b) if self._packed else k * b * self.op.w.dtype.bytes

    def write(self, made: Product, panels: Panels) -> None:
        """All rows times the panels of a task."""
        writer = self._body.writer
        if isinstance(self.op, GroupedLinear):
            write_groups(made, self.source, self._offsets, self.op.w.shape[0], panels)
        else:
            rows = writer.let("rows", size_text(self.rows))
            write_panels(made, self.source, "0", rows, panels, "task")

    def _unpacking(self, w: Value) -> Packed | None:
        """A weight that the region unpacks."""
        producer = self._body.graph.producers.get(w)
        if producer is None or not isinstance(producer.op, DequantizeNvfp4):
            return None
        return Packed.of(self._body, producer.op)

    def _packed_way(self, site: Site, first: int) -> tuple[RowSource, type[PackedProduct], Decoder]:
        """In integers where the CPU multiplies words of four bytes, or pairs of bytes and x is rounded to such."""
        body, op = self._body, self.op
        decoder = Decoder.of(body.writer, body.target, op.interleave)
        dots = dot_decoder(body.writer, body.target, op.interleave)
        rounded = self._rounded(op.x)
        x = rounded or op.x
        if dots and (rounded or is_short(Rows.of(x))):
            return self._as_integers(site, x, Quads(1 if rounded else 3), first), DotProduct, dots
        if decoder.multiply and rounded:
            return self._as_integers(site, x, Pairs(), first), Int8Product, decoder
        return row_source(body, op.x), FloatProduct, decoder

    def _as_integers(self, site: Site, x: Value, integers: Integers, first: int) -> RowSource:
        """Rows of x as integers; where an index chooses each row of a table once or more, the table's are made such."""
        body, table, number = self._body, x, None
        if gathered := _gathered(body, x):
            often = sympy.sympify(product(Rows.of(x).lead)) / product(Rows.of(gathered[0]).lead)
            if often.is_number and often >= 1:
                table, number = gathered[0], _number(body, gathered[1])
        self.integers = IntegerRows.of(site, body.target, table, integers, first)
        return self.integers.source(body.writer, number)

    def _rounded(self, x: Value) -> Value | None:
        """What the region rounds to int8 to make x, if by the blocks of weights."""
        body = self._body
        producer = body.graph.producers.get(_seen(body, x))
        match None if producer is None else producer.op:
            case RoundToInt8(block=block) as op if block == BLOCK:
                return op.x
        return None

    def _operand(self, name: str, value: Value) -> str:
        body = self._body
        if not body.is_operand(value):
            raise RegionError(f"{name} of %{self.value.name} is computed in the region")
        return body.writer.buffer(name, body.arg(value), body.view(value))


def _anchors(body: Body, site: Site) -> list[_Anchor]:
    """The products of a region."""
    anchors: list[_Anchor] = []
    for node in body.graph.nodes:
        if isinstance(node.op, Linear | GroupedLinear):
            first = sum(len(a.integers.scratch) for a in anchors if a.integers)
            anchors.append(_Anchor(body, site, node.op, node.results[0], first))
    return anchors


def _before(anchors: list[_Anchor]) -> tuple[list[Stage], tuple[View, ...]]:
    """The launches before the products, and their scratch."""
    made = [a.integers for a in anchors if a.integers]
    return [m.stage for m in made], tuple(view for m in made for view in m.scratch)


def row_source(body: Body, x: Value) -> RowSource:
    """Where rows of a product's operand come from: memory, rows of memory that an index chooses, or computation.

    Raises:
        RegionError: it is not computed row by row.
        LayoutError: rows of an operand have no common stride.
    """
    seen = _seen(body, x)
    if body.is_operand(seen):
        return StoredRows(body.writer, _declare_rows(body, seen))
    if (gathered := _gathered(body, seen)) and body.is_operand(gathered[0]):
        table, index = gathered
        number = _number(body, index)
        return GatheredRows(body.writer, _declare_rows(body, table), number)
    return _ComputedRows(body, Rows.of(x))


def _gathered(body: Body, x: Value) -> tuple[Value, Rows] | None:
    """A table of which x has rows that an index chooses, and the index."""
    producer = body.graph.producers.get(_seen(body, x))
    if producer is None or not isinstance(producer.op, TakeRows):
        return None
    table, index = producer.op.table, Rows(producer.op.index, producer.op.index.shape, 0)
    if table.type.rank != 2 or body.needs_whole_rows(index):
        return None
    return _seen(body, table), index


def _number(body: Body, index: Rows) -> Callable[[str], str]:
    """Writes which row of a table a row is, int32."""
    body.declare(index)
    return lambda row: f'T.Cast("int32", {body.at(index, row, "0", 1)})'


def _seen(body: Body, value: Value) -> Value:
    """What a value is a view of whose rows are the same."""
    while not body.is_operand(value):
        op = body.graph.producers[value].op
        if not isinstance(op, Reshape) or op.x.shape[-1:] != value.shape[-1:]:
            break
        value = op.x
    return value


def _declare_rows(body: Body, value: Value) -> str:
    return body.writer.buffer("x", body.arg(value), rows_view(body.view(value), Rows.of(value)))


class _ComputedRows:
    """Rows that are computed a block at a time, into a local array.

    Args:
        body: the region's.
        rows: the value.
    """

    def __init__(self, body: Body, rows: Rows) -> None:
        expect_short(rows)
        body.declare(rows)
        self._body, self._rows = body, rows

    @contextmanager
    def at_hand(self, first: str, count: str) -> Iterator[RowBlock]:
        """A loop over blocks."""
        body, rows, writer = self._body, self._rows, self._body.writer
        lanes = body.target.lanes
        # One vector more than fills a row: rows a multiple of 4 KiB apart would share cache sets.
        stride = (-(-rows.width // lanes) + 1) * lanes
        most = _rows_at_once(stride)
        computed = writer.matrix("computed", most, stride)
        with row_blocks(writer, first, count, most) as (start, some):
            with writer.loop("r", some) as r, body.bindings():

                def keep(at: str, n: int, elements: str) -> None:
                    writer.line(f"{computed}[{r}, {ramp(at, n)}] = {elements}")

                body.compute(rows, writer.let("row", f"{start} + {r}"), keep)
            yield rows_in_matrix(computed, start, some)


def _rows_at_once(stride: int) -> int:
    """Computed rows that fit: a multiple of the height of as high tiles as possible."""
    fitting = _ARRAY_BYTES // (4 * stride)
    step = next(n for n in (12, 4, 2, 1) if n <= fitting)
    return fitting // step * step


@dataclass(frozen=True)
class _Output:
    """A result as the kernel writes it.

    Attributes:
        rows: what is evaluated for it.
        put: writes where its elements go.
        contiguous: whether neighbouring columns are neighbours in memory.
    """

    rows: Rows
    put: Put
    contiguous: bool


class _Results:
    """The results of a region as rows of a product's width.

    Args:
        body: the region's.
        site: the region.
        anchors: its products.

    Attributes:
        count: how many rows each of them has.
        whole_rows: whether they need something of whole rows.
        in_place: as in `Plan`.
        updates: as in `Plan`.

    Raises:
        RegionError: a result has other rows than others, or is not computed row by row.
        LayoutError: rows of an operand or a result have no common stride.
    """

    def __init__(self, body: Body, site: Site, anchors: list[_Anchor]) -> None:
        self._body = body
        for anchor in anchors:
            body.bind(anchor.value, _not_yet)
        width = anchors[0].op.width
        self.updates: tuple[tuple[int, int], ...] = ()
        self._outputs = []
        for number, value in enumerate(body.graph.outputs):
            op = body.graph.producers[value].op if not body.is_operand(value) else None
            if isinstance(op, CacheWrite):
                self._outputs.append(self._cached(op, _by_width(op.rows, width)))
                self.updates += ((number, body.arg(op.cache).index),)
            else:
                rows = _by_width(value, width)
                self._outputs.append(self._stored(rows, number, site.results[number]))
        wanted = [output.rows for output in self._outputs]
        counts = {product(rows.lead) for rows in wanted}
        if len(counts) > 1:
            raise RegionError("its results have different rows")
        (self.count,) = counts
        body.declare(*wanted)
        self.whole_rows = body.needs_whole_rows(*wanted)
        self.in_place = () if self.whole_rows else self._in_place(site, anchors, wanted)

    def lanes(self, op: Linear | GroupedLinear) -> int:
        """Elements that `write` takes at once: a vector of the product, or 1."""
        lanes = panel_lanes(op, self._body.target)
        wanted = [output.rows for output in self._outputs]
        vectors = op.width != 1 and self._body.lanes(*wanted) >= lanes
        return lanes if vectors and all(output.contiguous for output in self._outputs) else 1

    def prepare(self, row: str) -> None:
        """What is computed once for a row."""
        self._body.prepare(row, *(output.rows for output in self._outputs))

    def write(self, row: str, column: str, lanes: int, sources: Mapping[Value, Source]) -> None:
        """Evaluate elements of all results from the products' sums, then write them."""
        body = self._body
        with body.bindings():
            for value, source in sources.items():
                body.bind(value, source)
            elements = body.all_at([o.rows for o in self._outputs], row, column, lanes)
            for output, element in zip(self._outputs, elements, strict=True):
                output.put(row, column, element, lanes)

    def _stored(self, rows: Rows, number: int, view: View) -> _Output:
        """A result with memory of its own."""
        writer, view = self._body.writer, rows_view(view, rows)
        y = writer.buffer("y", Arg("result", number), view)

        def put(row: str, column: str, element: str, lanes: int) -> None:
            writer.store(y, f"{row}, {column}", element, lanes)

        return _Output(rows, put, view.strides[1] == 1)

    def _cached(self, op: CacheWrite, rows: Rows) -> _Output:
        """Rows that go into a cache."""
        body, writer = self._body, self._body.writer
        if not body.is_operand(op.cache):
            raise RegionError(f"%{op.cache.name} is no operand")
        batch, length = op.rows.shape[:2]
        view = body.view(op.cache)
        _, across = row_axes(view, Rows.of(op.cache, 2))
        joined = View(
            view.dtype, (*view.shape[:2], *across.shape), (*view.strides[:2], *across.strides)
        )
        cache = writer.buffer("cache", body.arg(op.cache), joined)
        lengths = Rows(op.lengths, (batch,), 0)
        body.declare(lengths)
        capacity = size_text(op.cache.shape[1])

        def put(row: str, column: str, element: str, lanes: int) -> None:
            b = writer.let("b", f"{row} // {size_text(length)}")
            known = body.at(lengths, b, "0", 1)
            to = writer.let("to", f"{known} + {row} % {size_text(length)}")
            with writer.block(f"if {to} < {capacity}:"):
                writer.store(cache, f"{b}, {to}, {column}", element, lanes)

        return _Output(rows, put, across.strides[0] == 1)

    def _in_place(
        self, site: Site, anchors: list[_Anchor], wanted: list[Rows]
    ) -> tuple[tuple[int, int], ...]:
        """Results that may be stored over operands: other tasks must not read those."""
        body = self._body
        shared = [v for anchor in anchors for v in anchor.op.operands()]
        unsafe = body.read_elsewhere(*wanted) | _operands_behind(body, shared)
        unsafe |= {operand for _, operand in self.updates}
        return in_place_pairs(site, unsafe)


def _by_width(value: Value, width: Dim) -> Rows:
    """A value as rows of so many elements."""
    for trail in range(1, value.type.rank + 1):
        rows = Rows.of(value, trail)
        if product(rows.row) == width:
            return rows
    raise RegionError(f"%{value.name} has no rows of {width} elements")


def _operands_behind(body: Body, values: list[Value]) -> set[int]:
    """The operands of the region that values are computed from."""
    found: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if body.is_operand(value):
            found.add(body.arg(value).index)
        else:
            waiting.extend(body.graph.producers[value].op.operands())
    return found


def _not_yet(_row: str, _column: str, _lanes: int) -> str:
    raise RegionError("a sum is read before it is made")
