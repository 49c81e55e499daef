"""A region's body, evaluated a vector at a time wherever a kernel has what it needs.

`Body.at` writes the elements of a row from a column on, walking back from a value to what is at hand: operands of the
region in memory, or values that the kernel has bound to what it just computed (the sums of a product, a tile, a local
array). So an op that is element-wise needs no code here or in any kernel to be fused, only a formula, or an expansion
into ops that have one; `nemoc.codegen.tvm.row_ops` lists what else can be walked through.

Ops that need a whole row (norms, sums over it, selections) are computed once a row by `Body.prepare`; it is for kernels
that own whole rows.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemoc.codegen.plan import Arg, RegionError, Site, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.rows import Rows, Shape
from nemoc.codegen.tvm.loops import each_vector
from nemoc.codegen.tvm.place import Column, Place, ramp, row_axes, row_index, rows_view
from nemoc.codegen.tvm.row_ops import RowOp, expect_short, row_op
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter
from nemoc.ir.op import Op
from nemoc.ir.ops import Reshape, Slice
from nemoc.ir.types import Value

__all__ = ["Body", "Column", "Rows", "Source", "ramp", "rows_view"]

Source = Callable[[str, str, int], str]
"""Elements at hand: `(row, column, lanes) -> expression` of the value's compute type."""

RowSource = Callable[[str, int], str]
"""The same of one row: `(column, lanes) -> expression`."""


@dataclass(frozen=True)
class _Step:
    """How rows of a value come about."""

    op: Op
    how: RowOp[Any]
    needs: tuple[Rows, ...]


@dataclass
class _Known:
    """What the kernel has at hand beside operands.

    Attributes:
        bound: values of which any element is.
        held: values of which one row is: its number, and its elements.
        notes: what was prepared for one row of a value: its number, and a name.
        prepared: the values, with the rows, that `prepare` has been through; of row None, for no row in particular.
    """

    bound: dict[Value, Source]
    held: dict[Value, tuple[str, RowSource]]
    notes: dict[Value, tuple[str, str]]
    prepared: set[tuple[Value, str | None]]


class Body:
    """Writes values of a region's body into a kernel.

    Args:
        writer: the kernel.
        site: the region and the views of its operands.
        target: the CPU.

    Attributes:
        graph: the body.
        writer, target: as given.
    """

    def __init__(self, writer: KernelWriter, site: Site, target: CpuTarget) -> None:
        self.graph = body_of(site)
        self.writer = writer
        self.target = target
        self._site = site
        self._args = {value: Arg("operand", i) for i, value in enumerate(self.graph.inputs)}
        self._buffers: dict[Rows, tuple[str, Shape]] = {}
        self._known = _Known({}, {}, {}, set())

    def is_operand(self, value: Value) -> bool:
        """Whether a value comes from outside the region."""
        return value in self._args

    def arg(self, value: Value) -> Arg:
        """Which operand of the region a value is."""
        return self._args[value]

    def view(self, value: Value) -> View:
        """How an operand of the region lies in memory."""
        return self._site.operands[self._args[value].index]

    def bind(self, value: Value, source: Source) -> None:
        """Say where a value's elements are at hand; rows and columns count as the value's users do."""
        self._known.bound[value] = source

    def hold(self, value: Value, row: str, source: RowSource) -> None:
        """Say where the elements of one row of a value are at hand; no other row is asked for as long as they are."""
        self._known.held[value] = row, source

    def note(self, value: Value, row: str, name: str) -> None:
        """Remember the name of what was prepared for a row of a value."""
        self._known.notes[value] = row, name

    def noted(self, value: Value, row: str) -> str | None:
        """What `note` remembers for that row."""
        at, name = self._known.notes.get(value, ("", ""))
        return name if at == row else None

    @contextmanager
    def bindings(self) -> Iterator[None]:
        """A block of statements: what is bound or prepared in it is forgotten behind it."""
        before = self._known
        self._known = _Known(
            dict(before.bound), dict(before.held), dict(before.notes), set(before.prepared)
        )
        yield
        self._known = before

    def declare(self, *wanted: Rows) -> None:
        """Declare, in the present block of statements, the buffers of all operands that values need.

        Bind before what will be bound: the walk ends there.

        Raises:
            RegionError: a value cannot be evaluated row by row.
            LayoutError: elements of an operand's row have no common stride.
        """
        for rows in self._walk(wanted):
            if rows.value in self._args and rows not in self._buffers:
                self._declare(rows)

    def lanes(self, *wanted: Rows, aligned: bool = True) -> int:
        """Elements that `at` can write at once for all of the values: a full vector, or 1.

        Args:
            wanted: the values.
            aligned: whether columns will be multiples of the lanes.
        """
        seen: dict[tuple[Rows, bool], bool] = {}
        vectors = all(self._is_vector(rows.settled, aligned, seen) for rows in wanted)
        return self.target.lanes if vectors else 1

    def at(self, rows: Rows, row: str, column: str | Column, lanes: int) -> str:
        """Elements of a declared value, as an expression of its compute type.

        Args:
            rows: the value, and what counts as its rows.
            row: the row's number, int32.
            column: the first element's number in the row, int32; a multiple of `lanes`, unless those hold otherwise.
            lanes: how many elements; what `lanes` answered, or less.
        """
        return self.all_at([rows], row, column, lanes)[0]

    def all_at(
        self, wanted: Sequence[Rows], row: str, column: str | Column, lanes: int
    ) -> list[str]:
        """Elements of several values as `at` gives them; what the values share is written once."""
        get = Elements(self)
        at = Place(row, column if isinstance(column, Column) else Column(column), lanes)
        return [get(rows, at) for rows in wanted]

    def prepare(self, row: str, *wanted: Rows) -> None:
        """Compute once for a row, in the present block of statements, all that values need of whole rows.

        Raises:
            RegionError: rows of something are needed that no single row of a value belongs to, or are too long to hold.
        """
        for rows in wanted:
            self._prepare(rows.settled, row)

    def materialize(self, rows: Rows, row: str) -> str:
        """Copy a prepared row into a local array, where the value is at hand from then on; returns the array's name.

        Raises:
            RegionError: the row is too long to hold.
        """
        expect_short(rows)
        writer, rows = self.writer, rows.settled
        name = writer.local("held", rows.width, dtype=COMPUTE_NAMES[rows.value.dtype])

        def copy(at: str, n: int) -> None:
            writer.line(f"{name}[{ramp(at, n)}] = {self.at(rows, row, at, n)}")

        each_vector(writer, rows.width, self.lanes(rows), copy)
        row = "0" if rows.is_one else row
        self.hold(rows.value, row, lambda at, n: f"{name}[{ramp(at, n)}]")
        return name

    def compute(self, rows: Rows, row: str, put: Callable[[str, int, str], None]) -> None:
        """Write a whole row somewhere, with all that it needs: `put(column, lanes, elements)`."""
        self.prepare(row, rows)
        each_vector(
            self.writer,
            rows.width,
            self.lanes(rows),
            lambda at, n: put(at, n, self.at(rows, row, at, n)),
        )

    def keep_row(self, rows: Rows, row: str) -> None:
        """Materialize a row that will be read several times, unless it can be read as well where it is."""
        if not self.is_direct(rows):
            self.materialize(rows, row)

    def is_direct(self, rows: Rows) -> bool:
        """Whether rows lie somewhere as they are, so that there is nothing to compute but an address."""
        rows = rows.settled
        if rows.value in self._args or self._is_at_hand(rows.value):
            return True
        step = self._step(rows)
        (x, *_) = step.needs or (rows,)
        same = isinstance(step.op, Slice) or (
            isinstance(step.op, Reshape) and x.width == rows.width
        )
        return same and self.is_direct(x)

    def needs_whole_rows(self, *wanted: Rows) -> bool:
        """Whether there is anything for `prepare` to compute."""
        walked = self._walk(wanted).items()
        return any(step is not None and step.how.prepares(rows) for rows, step in walked)

    def read_elsewhere(self, *wanted: Rows) -> set[int]:
        """Operands of which prepared values read more than the element at their own place, as far as the walk goes."""
        found: set[int] = set()
        seen: set[tuple[Rows, bool]] = set()

        def visit(rows: Rows, here: bool) -> None:
            rows = rows.settled
            if (rows, here) in seen:
                return
            seen.add((rows, here))
            if rows.value in self._args:
                if not here:
                    found.add(self._args[rows.value].index)
                return
            if self._is_at_hand(rows.value):
                return
            step = self._step(rows)
            for need in step.needs:
                visit(need, here and step.how.in_place(rows, step.needs))

        for rows in wanted:
            visit(rows, True)
        return found

    # -- walking back -------------------------------------------------------------------------------------------------

    def _step(self, rows: Rows) -> _Step:
        """How rows of a value that is not at hand are made.

        Raises:
            RegionError: they are not made from rows.
        """
        op = self.graph.producers[rows.value].op
        how = row_op(op)
        return _Step(op, how, tuple(need.settled for need in how.needs(op, rows)))

    def _walk(self, wanted: Sequence[Rows]) -> dict[Rows, _Step | None]:
        """All that values are made from, themselves included, and how; none for what is at hand."""
        found: dict[Rows, _Step | None] = {}
        waiting = [rows.settled for rows in wanted]
        while waiting:
            rows = waiting.pop()
            if rows in found:
                continue
            is_operand = rows.value in self._args
            if rows.own != rows.lead and not is_operand:
                name = rows.value.name
                raise RegionError(f"rows of %{name} repeat in a way that no row number says")
            at_hand = is_operand or self._is_at_hand(rows.value)
            found[rows] = step = None if at_hand else self._step(rows)
            waiting.extend(step.needs if step else ())
        return found

    def _is_at_hand(self, value: Value) -> bool:
        return value in self._known.bound or value in self._known.held

    def _declare(self, rows: Rows) -> None:
        view, value = self.view(rows.value), rows.value
        lead, row = row_axes(view, rows)
        joined = View(view.dtype, lead.shape + row.shape, lead.strides + row.strides)
        stem = value.name.partition(".")[0]
        name = self.writer.buffer(
            stem if stem.isascii() and stem.isalpha() else "x", self.arg(value), joined
        )
        self._buffers[rows] = name, lead.shape

    def _is_vector(self, rows: Rows, aligned: bool, seen: dict[tuple[Rows, bool], bool]) -> bool:
        """Whether elements come as vectors; `aligned`, those that begin at multiples of the lanes."""
        if self._is_at_hand(rows.value) or rows.width == 1:
            return True
        if rows.value in self._args:
            return row_axes(self.view(rows.value), rows)[1].strides[-1] == 1
        if (rows, aligned) not in seen:
            step = self._step(rows)
            needs = step.how.vectors(step.op, rows, step.needs, aligned, self.target.lanes)
            seen[rows, aligned] = needs is not None and all(
                self._is_vector(need.settled, lined, seen) for need, lined in needs
            )
        return seen[rows, aligned]

    def _prepare(self, rows: Rows, row: str | None) -> None:
        value = rows.value
        row = "0" if rows.is_one else row
        at_hand = value in self._args or self._is_at_hand(value)
        if at_hand or (value, row) in self._known.prepared:
            return
        self._known.prepared.add((value, row))
        step = self._step(rows)
        if row is None and step.how.whole_row:
            raise RegionError(f"%{value.name} is needed of several rows at once")
        for need in step.needs[1:]:
            self._prepare(need, row)
        if step.needs:
            first = row
            if row is not None:
                first = step.how.row(Elements(self), step.op, rows, step.needs, row)
            if row is not None and first not in (None, row):
                self.note(value, row, first)
            self._prepare(step.needs[0], first)
        if row is not None:
            step.how.prepare(self, step.op, rows, step.needs, row)

    def _written(self, rows: Rows, at: Place, get: "Elements") -> str:
        """Elements at a place, as an expression."""
        value = rows.value
        if value in self._known.bound:
            return self._known.bound[value](at.row, at.column.text, at.lanes)
        if value in self._known.held:
            row, held = self._known.held[value]
            if row != at.row and not rows.is_one:
                raise RegionError(f"%{value.name} is needed of several rows at once")
            return held(at.column.text, at.lanes)
        if value in self._args:
            name, shape = self._buffers[rows]
            return self.writer.load(name, f"{row_index(at.row, shape)}, {at.column.text}", at.lanes)
        step = self._step(rows)
        return step.how.elements(get, step.op, rows, step.needs, at)


class Elements:
    """Elements of a body's values, each in a variable; what was written for a place once is not written again.

    Attributes:
        body: the body.
        writer: its kernel.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        self.writer = body.writer
        self._names: dict[tuple[Rows, Place], str] = {}

    def __call__(self, rows: Rows, at: Place) -> str:
        """The name of the variable that holds elements of a value."""
        rows = rows.settled
        if rows.is_one:
            at = dataclasses.replace(at, row="0")
        if (rows, at) not in self._names:
            found, kind = self._found(rows, at), COMPUTE_NAMES[rows.value.dtype]
            is_name = found.isidentifier()  # as where a view shows the elements of another value
            name = found if is_name else self.writer.value("v", found, at.lanes, kind)
            self._names[rows, at] = name
        return self._names[rows, at]

    def _found(self, rows: Rows, at: Place) -> str:
        if at.lanes > 1 and rows.width == 1:
            return f"T.Broadcast({self(rows, Place(at.row, Column('0'), 1))}, {at.lanes})"
        return self.body._written(rows, at, self)
