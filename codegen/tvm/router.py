"""Regions that choose experts: the product that scores them, what is computed from a row of scores, and the sorting of
the choices.

A task takes a block of rows: what comes before the product goes into a tile of whole rows, the sums of all panels into
another, and the rest follows row by row. Sorting needs the choices of all rows. It is a launch of one task, and a part
of the first launch where that is one task too: in a step of one token, whose rows are the sequences of a batch.
"""

from dataclasses import dataclass

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body, Rows, ramp
from nemoc.codegen.tvm.linear import (
    Element,
    Product,
    RowBlock,
    Sink,
    obstacle,
    panel_lanes,
    rows_in_matrix,
)
from nemoc.codegen.tvm.loops import each_vector
from nemoc.codegen.tvm.routing import write_group_by
from nemoc.codegen.tvm.row_ops import expect_short
from nemoc.codegen.tvm.rows import RowStore, declare_stores, rows_of, write_row
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, product, symbols_of
from nemoc.ir.graph import Graph
from nemoc.ir.ops import GroupBy, GroupedLinear, Linear
from nemoc.ir.types import Value

_ROWS = Tunable("rows", 12, (12, 24, 48))
"""Rows of a block: a multiple of those of the highest tile of a product."""

_FEW = 64
"""Rows that one task does, where their number is fixed."""


def emit_router(site: Site, target: CpuTarget) -> Plan:
    """The plan of a region with one product whose rows are looked at as a whole, and at most one sorting of choices.

    Raises:
        RegionError: the region is something else.
        LayoutError: rows of an operand have no common stride.
    """
    parts = _Parts.of(body_of(site))
    reason = obstacle(parts.linear, target)
    if reason is not None:
        raise RegionError(reason)
    choices, scratch = _choices(parts, site)
    writer = KernelWriter("router", site.choices)
    body = Body(writer, site, target)
    block = _Block(body, site, parts, choices)
    blocks = ceil_div(parts.count, block.rows)
    if parts.is_small:
        with writer.loop("t", size_text(blocks)) as t:
            block.write(t)
        if choices is not None:
            _write_sorting(body, site, parts, choices)
        return Plan((writer.finish(1),), scratch)
    block.write("task")
    stages = [writer.finish(blocks)]
    if choices is not None:
        writer = KernelWriter("sort_choices")
        _write_sorting(Body(writer, site, target), site, parts, choices)
        stages.append(writer.finish(1))
    return Plan(tuple(stages), scratch)


@dataclass(frozen=True)
class _Parts:
    """What a region consists of.

    Attributes:
        linear, scores: the product, and its result.
        sort, slots: the sorting of choices and its results, if there is one.
        early: results of the region that are computed from a row without its scores.
        late: results that need the scores.
        sorted: results behind the sorting, each with the one of `slots` that it is computed from.
    """

    linear: Linear
    scores: Value
    sort: GroupBy | None
    slots: tuple[Value, ...]
    early: tuple[Rows, ...]
    late: tuple[Rows, ...]
    sorted: tuple[tuple[Value, Value], ...]

    @classmethod
    def of(cls, graph: Graph) -> "_Parts":
        """Take a body apart.

        Raises:
            RegionError: it is no router.
        """
        linear, scores = _product(graph)
        sort, slots = _sorting(graph)
        made = _made_from(graph, (scores, *slots))
        count = product(scores.shape[:-1])
        early: list[Rows] = []
        late: list[Rows] = []
        behind: list[tuple[Value, Value]] = []
        for value in dict.fromkeys(graph.outputs):
            after = [slot for slot in slots if slot in made[value]]
            if len(after) > 1:
                raise RegionError(f"%{value.name} needs slots in two orders")
            if after:
                behind.append((value, after[0]))
            else:
                (late if scores in made[value] else early).append(_each_row(value, count))
        return cls(linear, scores, sort, slots, tuple(early), tuple(late), tuple(behind))

    @property
    def count(self) -> Dim:
        """How many rows of scores there are."""
        return product(self.scores.shape[:-1])

    @property
    def is_small(self) -> bool:
        """Whether one task does all rows: the sequences of a batch in a step of one token, or a few."""
        if isinstance(self.count, int):
            return self.count <= _FEW
        return symbols_of(self.count) == {"B"}


def _product(graph: Graph) -> tuple[Linear, Value]:
    found = [n for n in graph.nodes if isinstance(n.op, Linear | GroupedLinear)]
    for node in found if len(found) == 1 else ():
        if isinstance(node.op, Linear) and node.op.interleave > 1 and node.op.w in graph.inputs:
            return node.op, node.results[0]
    raise RegionError("a router has one product, with an interleaved weight from outside")


def _sorting(graph: Graph) -> tuple[GroupBy | None, tuple[Value, ...]]:
    found = [n for n in graph.nodes if isinstance(n.op, GroupBy)]
    if len(found) > 1:
        raise RegionError(f"a router sorts once, not {len(found)} times")
    for node in found:
        assert isinstance(node.op, GroupBy)
        return node.op, node.results
    return None, ()


def _made_from(graph: Graph, origins: tuple[Value, ...]) -> dict[Value, set[Value]]:
    """For each value of a graph, those of some values that it is computed from, itself included."""
    made: dict[Value, set[Value]] = {}
    for value in graph.values():
        node = graph.producers.get(value)
        before = [made[v] for v in node.op.operands()] if node is not None else []
        made[value] = {value} & set(origins) | set().union(*before)
    return made


def _each_row(value: Value, count: Dim) -> Rows:
    rows = rows_of(value, count)
    if rows is None:
        raise RegionError(f"%{value.name} has no row for each row of scores")
    return rows


def _choices(parts: _Parts, site: Site) -> tuple[tuple[Arg, View] | None, tuple[View, ...]]:
    """Where the choices lie that are sorted, and the scratch for them if they are no result."""
    if parts.sort is None:
        return None, ()
    index, outputs = parts.sort.index, body_of(site).outputs
    if index in outputs:
        number = outputs.index(index)
        return (Arg("result", number), site.results[number]), ()
    view = View.dense(index.type)
    return (Arg("scratch", 0), view), (view,)


class _Block:
    """Writes what is done with a block of rows.

    Args:
        body: the region's, in the kernel.
        site: the region.
        parts: what it consists of.
        choices: where the choices go if they are sorted.

    Attributes:
        rows: how many a block has at most.
    """

    def __init__(
        self, body: Body, site: Site, parts: _Parts, choices: tuple[Arg, View] | None
    ) -> None:
        self._body, self._parts, self._writer = body, parts, body.writer
        self.rows = int(_ROWS.default) if parts.is_small else body.writer.pick(_ROWS)
        self._x = Rows.of(parts.linear.x)
        expect_short(self._x)
        expect_short(Rows.of(parts.scores))
        body.declare(self._x)
        self._early = declare_stores(body, site, parts.early)
        with body.bindings():
            body.hold(parts.scores, "", _not_yet)
            self._late = declare_stores(body, site, parts.late)
            if choices is not None and choices[0].kind == "scratch":
                assert parts.sort is not None
                rows = _each_row(parts.sort.index, parts.count)
                body.declare(rows)
                self._late.append(RowStore.declare(body, rows, *choices))
        self._w = body.writer.buffer("w", body.arg(parts.linear.w), body.view(parts.linear.w))

    def write(self, number: str) -> None:
        """All that is done with the block of that number."""
        writer, total = self._writer, size_text(self._parts.count)
        first = writer.let("first", f"{number} * {self.rows}")
        count = writer.let("count", f"T.min({self.rows}, {total} - {first})")
        tile = self._write_early(first, count)
        sums = self._write_sums(first, count, tile)
        with writer.loop("r", count) as r, self._body.bindings():
            row = writer.let("row", f"{first} + {r}")
            self._hold(self._parts.scores, row, sums, r)
            if tile:
                self._hold(self._x.value, row, tile, r)
            self._body.prepare(row, *(s.rows for s in self._late))
            write_row(self._body, self._late, row)

    def _write_early(self, first: str, count: str) -> str:
        """What comes before the scores; returns the tile of rows for the product, empty where memory has them."""
        writer, body, x = self._writer, self._body, self._x
        tile = "" if body.is_direct(x) else writer.matrix("rows", self.rows, x.width)
        if not tile and not self._early:
            return tile
        with writer.loop("r", count) as r, body.bindings():
            row = writer.let("row", f"{first} + {r}")
            body.prepare(row, *([x] if tile else []), *(s.rows for s in self._early))
            if tile:

                def copy(at: str, n: int) -> None:
                    writer.line(f"{tile}[{r}, {ramp(at, n)}] = {body.at(x, row, at, n)}")

                each_vector(writer, x.width, body.lanes(x), copy)
                self._hold(x.value, row, tile, r)
            write_row(body, self._early, row)
        return tile

    def _write_sums(self, first: str, count: str, tile: str) -> str:
        """The product; returns the tile of sums."""
        writer, body, linear = self._writer, self._body, self._parts.linear
        sums = writer.matrix("sums", self.rows, linear.features)

        def put(row: str, column: str, value: str, lanes: int) -> None:
            writer.line(f"{sums}[{row} - {first}, {ramp(column, lanes)}] = {value}")

        def in_memory(row: str, rows: int) -> Element:
            return lambda i, k: body.at(self._x, f"{row} + {i}", k, 1)

        sink = Sink(put, panel_lanes(linear, body.target), repeats=True)
        scored = Product.of(writer, body.target, linear, self._w, sink)
        block = RowBlock(first, count, in_memory)
        if tile:
            block = rows_in_matrix(tile, first, count)
        with writer.loop("p", scored.panels) as panel:
            scored.write(block, panel)
        return sums

    def _hold(self, value: Value, row: str, tile: str, place: str) -> None:
        """Say that a row of a value is a row of a tile."""
        self._body.hold(value, row, lambda at, n: f"{tile}[{place}, {ramp(at, n)}]")


def _not_yet(_column: str, _lanes: int) -> str:
    raise AssertionError("scores are read before they are summed")


def _write_sorting(body: Body, site: Site, parts: _Parts, choices: tuple[Arg, View]) -> None:
    """Sort the choices of all rows, and store what is computed from a slot's position or a position's slot."""
    writer, sort = body.writer, parts.sort
    assert sort is not None
    order, position, offsets = parts.slots
    outputs = body.graph.outputs
    chosen = writer.buffer("index", choices[0], choices[1])
    stores: list[tuple[RowStore, Value]] = []
    starts = ""
    with body.bindings():
        for slot in (order, position):
            body.hold(slot, "", _not_yet)
        for value, origin in parts.sorted:
            if value is offsets:
                number = outputs.index(value)
                starts = writer.buffer("offsets", Arg("result", number), site.results[number])
                continue
            rows = rows_of(value, product(order.shape))
            if origin is offsets or rows is None or rows.width > 1:
                raise RegionError(f"%{value.name} is not computed slot by slot")
            stores.append((declare_stores(body, site, [rows])[0], origin))

    def start_group(group: str, start: str) -> None:
        if starts:
            writer.store(starts, group, start)

    def place(slot: str, at: str) -> None:
        with body.bindings():
            body.hold(order, at, lambda _column, _lanes: slot)
            body.hold(position, slot, lambda _column, _lanes: at)
            for store, origin in stores:
                write_row(body, [store], at if origin is order else slot)

    shape = tuple(map(size_text, sort.index.shape))
    write_group_by(
        writer,
        sort.groups,
        (shape[0], shape[1]),
        lambda r, j: writer.load(chosen, f"{r}, {j}"),
        start_group,
        place,
    )
