"""Ops that can be computed row by row inside a kernel, and how each is: the table `row_op` looks them up in.

Element-wise ops are all one entry: a formula. The others say which rows of their operands make a row of the result,
what has to be computed once for a whole row, and where the elements of a vector come from.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.rows import Rows, fixed
from nemoc.codegen.tvm.elementwise import FORMULAS, has_formula
from nemoc.codegen.tvm.loops import constant, sum_elements
from nemoc.codegen.tvm.place import Column, Place, ramp
from nemoc.codegen.tvm.routing import write_group_limit, write_top_k
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, size_text
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    Cast,
    Full,
    GroupLimit,
    Reshape,
    RmsNorm,
    RoundToInt8,
    Slice,
    Sum,
    TakeAlong,
    TakeLast,
    TakeRows,
    TopK,
)
from nemoc.ir.ops.int8 import LARGEST, SMALLEST_STEP
from nemoc.ir.types import Value

if TYPE_CHECKING:  # bodies are written by these
    from nemoc.codegen.tvm.body import Body, Elements

OpT = TypeVar("OpT", bound=Op)

Needs = tuple[Rows, ...]

_LONGEST = 1 << 14
"""Elements of a row that kernels hold in local arrays at most: they lie on the stack."""

VectorNeeds = tuple[tuple[Rows, bool], ...]
"""Operands that have to come as vectors, and whether those begin at multiples of the lanes."""


class RowOp(Generic[OpT]):
    """How one op is computed row by row. `rows` is the result, `needs` what the method of that name gave for it."""

    whole_row: ClassVar[bool] = False
    """Whether elements need something of their whole row, which `prepare` computes."""

    def prepares(self, rows: Rows) -> bool:
        """Whether `prepare` does something."""
        return self.whole_row

    def needs(self, op: OpT, rows: Rows) -> Needs:
        """The operands, as the rows that a row of the result is made from.

        Raises:
            RegionError: it is not made from rows.
        """
        raise NotImplementedError

    def vectors(
        self, op: OpT, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        """What has to come as vectors to make vectors of the result; none: there is no way.

        Args:
            aligned: whether the vectors of the result begin at multiples of `lanes`.
            lanes: elements of a vector.
        """
        return tuple((need, aligned) for need in needs)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        """Whether an element reads operands at its own place only, once the row is prepared."""
        return False

    def prepare(self, body: "Body", op: OpT, rows: Rows, needs: Needs, row: str) -> None:
        """Write what is computed once for a row."""

    def row(self, get: "Elements", op: OpT, rows: Rows, needs: Needs, row: str) -> str | None:
        """The row of the first operand that a row of the result is made from; none if it is several."""
        return row

    def elements(self, get: "Elements", op: OpT, rows: Rows, needs: Needs, at: Place) -> str:
        """The elements at a place, as an expression of the compute type."""
        raise NotImplementedError


class _Elementwise(RowOp[Op]):
    """Anything that has a formula."""

    def needs(self, op: Op, rows: Rows) -> Needs:
        needs = tuple(Rows(v, rows.lead, min(rows.trail, v.type.rank)) for v in op.operands())
        for need in needs:
            _repeated(need, rows)
        return needs

    def vectors(
        self, op: Op, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        found = []
        for need in needs:
            divide, modulo = _repeated(need, rows)
            part = modulo if divide == 1 else divide
            if part != rows.width and (not aligned or part % lanes):
                return None
            if divide == 1:
                found.append((need, aligned))
        return tuple(found)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return all(need.row == rows.row or need.width == 1 for need in needs)

    def elements(self, get: "Elements", op: Op, rows: Rows, needs: Needs, at: Place) -> str:
        operands = [self._operand(get, need, rows, at) for need in needs]
        math = VectorMath(get.writer, at.lanes)
        found = FORMULAS[type(op)](math, Site.dense(op), operands)
        if isinstance(op, Cast):  # what is stored rounds there, but few values are
            found = get.writer.rounded(found, op.dtype, at.lanes)
        return found

    def _operand(self, get: "Elements", need: Rows, rows: Rows, at: Place) -> str:
        divide, modulo = _repeated(need, rows)
        if divide == 1:
            column = at.column
            if modulo != rows.width:
                column = Column(column.split(modulo, rows.width).inner)
            return get(need, Place(at.row, column, at.lanes))
        column = Column(at.column.split(divide, rows.width).outer)
        one = get(need, Place(at.row, column, 1))
        return one if at.lanes == 1 else f"T.Broadcast({one}, {at.lanes})"


class _Full(RowOp[Full]):
    def needs(self, op: Full, rows: Rows) -> Needs:
        return ()

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return True

    def elements(self, get: "Elements", op: Full, rows: Rows, needs: Needs, at: Place) -> str:
        value = constant(op.value, op.dtype, at.lanes)
        return get.writer.rounded(value, op.dtype, at.lanes)


class _Reshape(RowOp[Reshape]):
    """Rows of the same elements, or rows made of whole rows of the operand."""

    def needs(self, op: Reshape, rows: Rows) -> Needs:
        rank = op.x.type.rank
        inner = [product(op.x.shape[cut:]) for cut in range(rank + 1)]
        fitting = [n for n in inner if isinstance(n, int) and rows.width % n == 0]
        # Of the ways to see the longest fitting rows, the one whose rows are an axis if there is one.
        cuts = [cut for cut in range(rank + 1) if inner[cut] == fitting[0]]
        cut = max((c for c in cuts if c < rank), default=rank)
        return (Rows(op.x, op.x.shape[:cut], rank - cut),)

    def vectors(
        self, op: Reshape, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        (x,) = needs
        if x.width == rows.width:
            return ((x, aligned),)
        return ((x, True),) if aligned and x.width % lanes == 0 else None

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return needs[0].width == rows.width

    def row(self, get: "Elements", op: Reshape, rows: Rows, needs: Needs, row: str) -> str | None:
        return row if needs[0].width == rows.width else None

    def elements(self, get: "Elements", op: Reshape, rows: Rows, needs: Needs, at: Place) -> str:
        (x,) = needs
        if x.width == rows.width:
            return get(x, at)
        column = at.column.split(x.width, rows.width)
        row = f"({at.row}) * {rows.width // x.width} + {column.outer}"
        return get(x, Place(row, Column(column.inner), at.lanes))


class _Slice(RowOp[Slice]):
    """A range along the first axis of a row, sizes of 1 aside."""

    def needs(self, op: Slice, rows: Rows) -> Needs:
        if not _is_first(op.x, op.axis, rows):
            raise RegionError(f"%{rows.value.name} is a slice across rows")
        return (Rows(op.x, rows.lead, rows.trail),)

    def vectors(
        self, op: Slice, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return ((needs[0], aligned and self._first(op, rows) % lanes == 0),)

    def elements(self, get: "Elements", op: Slice, rows: Rows, needs: Needs, at: Place) -> str:
        column = at.column.shifted(self._first(op, rows))
        return get(needs[0], Place(at.row, column, at.lanes))

    def _first(self, op: Slice, rows: Rows) -> int:
        return op.start * rows.width // (op.stop - op.start)


class _Sum(RowOp[Sum]):
    """Over the first axis of the operand's rows; what sums a whole row to one element is prepared."""

    def needs(self, op: Sum, rows: Rows) -> Needs:
        if not _is_first(op.x, op.axis, rows):
            raise RegionError(f"%{rows.value.name} is summed across rows")
        x = Rows(op.x, rows.lead, rows.trail + 1)
        fixed(op.x.shape[op.axis], f"the number of terms of %{rows.value.name}")
        return (x,)

    def vectors(
        self, op: Sum, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return ((needs[0], aligned and rows.width % lanes == 0),)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return rows.width == 1

    def prepares(self, rows: Rows) -> bool:
        return rows.width == 1

    def prepare(self, body: "Body", op: Sum, rows: Rows, needs: Needs, row: str) -> None:
        if not self.prepares(rows):
            return
        (x,) = needs

        def term(at: str, n: int) -> str:
            return body.at(x, row, at, n)

        total = sum_elements(body.writer, x.width, _sum_lanes(body, x), op.x.dtype, term)
        name = body.writer.value("total", total, 1, COMPUTE_NAMES[op.x.dtype])
        body.hold(rows.value, row, lambda _column, _lanes: name)

    def elements(self, get: "Elements", op: Sum, rows: Rows, needs: Needs, at: Place) -> str:
        (x,), writer = needs, get.writer
        zero = constant(0.0, op.x.dtype, at.lanes)
        total = writer.value("total", zero, at.lanes, COMPUTE_NAMES[op.x.dtype])
        with writer.loop("j", x.width // rows.width) as j:
            column = Column(at.column.text, j, rows.width)
            term = get.body.at(x, at.row, column, at.lanes)
            writer.line(f"{total} = {total} + {term}")
        return total


class _RmsNorm(RowOp[RmsNorm]):
    """Prepared: 1 / √(mean of squares + eps) of each group."""

    whole_row = True

    def needs(self, op: RmsNorm, rows: Rows) -> Needs:
        return _plain(op.x, rows), Rows(op.weight, ())

    def vectors(
        self, op: RmsNorm, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return _in_groups(needs, rows, op.groups, aligned, lanes)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return True

    def prepare(self, body: "Body", op: RmsNorm, rows: Rows, needs: Needs, row: str) -> None:
        writer, (x, _), width = body.writer, needs, rows.width // op.groups
        body.keep_row(x, row)
        kind = COMPUTE_NAMES[op.x.dtype]
        scales = writer.local("scales", op.groups, dtype=kind)
        with writer.loop("g", op.groups) as group:

            def square(at: str, n: int) -> str:
                v = body.at(x, row, Column(at, group, width), n)
                return f"{v} * {v}"

            total = sum_elements(writer, width, _sum_lanes(body, x), op.x.dtype, square)
            mean = f"{total} / T.{kind}({width})"
            root = f"T.{kind}(1) / T.sqrt({mean} + T.{kind}({op.eps!r}))"
            writer.line(f"{scales}[{group}] = {root}")
        body.note(rows.value, row, scales)

    def elements(self, get: "Elements", op: RmsNorm, rows: Rows, needs: Needs, at: Place) -> str:
        scale = _of_group(get, rows, at, op.groups)
        return f"{get(needs[0], at)} * {scale} * {get(needs[1], at)}"


class _RoundToInt8(RowOp[RoundToInt8]):
    """Prepared: the step of each block."""

    whole_row = True

    def needs(self, op: RoundToInt8, rows: Rows) -> Needs:
        return (_plain(op.x, rows),)

    def vectors(
        self, op: RoundToInt8, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return _in_groups(needs, rows, rows.width // op.block, aligned, lanes)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return True

    def prepare(self, body: "Body", op: RoundToInt8, rows: Rows, needs: Needs, row: str) -> None:
        writer, (x,), block = body.writer, needs, op.block
        expect_short(x)
        body.keep_row(x, row)
        steps = writer.local("steps", rows.width // block)
        with writer.loop("g", rows.width // block) as group:
            largest = writer.value("largest", "T.float32(0)")
            spoiled = writer.value("spoiled", "T.float32(0)")
            with writer.loop("i", block) as i:
                element = body.at(x, row, Column(i, group, block), 1)
                writer.line(f"{largest} = T.max({largest}, T.fabs({element}))")
                writer.line(f"{spoiled} = T.Select(T.isnan({element}), {element}, {spoiled})")
            writer.line(f"{steps}[{group}] = {largest} / T.float32({LARGEST}) + {spoiled}")
        body.note(rows.value, row, steps)

    def elements(
        self, get: "Elements", op: RoundToInt8, rows: Rows, needs: Needs, at: Place
    ) -> str:
        math = VectorMath(get.writer, at.lanes)
        step = math.let("step", _of_group(get, rows, at, rows.width // op.block))
        usable = f"{step} >= {math.const(SMALLEST_STEP)}"
        inverse = f"{math.const(1.0)} / T.Select({usable}, {step}, {math.const(1.0)})"
        rounded = math.let("rounded", f"{step} * T.nearbyint({get(needs[0], at)} * ({inverse}))")
        vanishes = f"{step} < {math.const(SMALLEST_STEP)}"
        return f"T.Select({vanishes}, {math.const(0.0)}, {rounded})"


class _GroupLimit(RowOp[GroupLimit]):
    """Prepared: which groups stay."""

    whole_row = True

    def needs(self, op: GroupLimit, rows: Rows) -> Needs:
        return (_plain(op.x, rows),)

    def vectors(
        self, op: GroupLimit, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return _in_groups(needs, rows, op.groups, aligned, lanes)

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return True

    def prepare(self, body: "Body", op: GroupLimit, rows: Rows, needs: Needs, row: str) -> None:
        (x,) = needs
        body.keep_row(x, row)

        def load(at: str) -> str:
            return body.at(x, row, at, 1)

        kept = write_group_limit(body.writer, op, x.width // op.groups, load)
        body.note(rows.value, row, kept)

    def elements(self, get: "Elements", op: GroupLimit, rows: Rows, needs: Needs, at: Place) -> str:
        kept, fill = _of_group(get, rows, at, op.groups), constant(op.fill, DType.F32, at.lanes)
        return f"T.Select({kept} > {constant(0, DType.I32, at.lanes)}, {get(needs[0], at)}, {fill})"


class _TopK(RowOp[TopK]):
    """Prepared: all of it."""

    whole_row = True

    def needs(self, op: TopK, rows: Rows) -> Needs:
        return (_plain(op.x, rows),)

    def vectors(
        self, op: TopK, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return ()

    def in_place(self, rows: Rows, needs: Needs) -> bool:
        return True

    def prepare(self, body: "Body", op: TopK, rows: Rows, needs: Needs, row: str) -> None:
        (x,) = needs
        expect_short(x)

        def load(at: str, n: int) -> str:
            return body.at(x, row, at, n)

        writer, lanes = body.writer, body.lanes(x)
        chosen = write_top_k(writer, body.target, x.width, op.k, lanes, load)
        body.hold(rows.value, row, lambda at, n: f"{chosen}[{ramp(at, n)}]")

    def elements(self, get: "Elements", op: TopK, rows: Rows, needs: Needs, at: Place) -> str:
        raise RegionError(f"%{rows.value.name} is needed of other rows than those at hand")


class _TakeAlong(RowOp[TakeAlong]):
    def needs(self, op: TakeAlong, rows: Rows) -> Needs:
        return _plain(op.x, rows), _plain(op.index, rows)

    def vectors(
        self, op: TakeAlong, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return None

    def elements(self, get: "Elements", op: TakeAlong, rows: Rows, needs: Needs, at: Place) -> str:
        x, index = needs
        column = _index(get, index, at)
        return get(x, Place(at.row, Column(column), at.lanes))


class _Take(RowOp[OpT]):
    """Rows of the first operand chosen by the second."""

    def vectors(
        self, op: OpT, rows: Rows, needs: Needs, aligned: bool, lanes: int
    ) -> VectorNeeds | None:
        return ((needs[0], aligned),)

    def elements(self, get: "Elements", op: OpT, rows: Rows, needs: Needs, at: Place) -> str:
        row = get.body.noted(rows.value, at.row) or self.row(get, op, rows, needs, at.row)
        assert row is not None
        return get(needs[0], Place(row, at.column, at.lanes))


class _TakeRows(_Take[TakeRows]):
    def needs(self, op: TakeRows, rows: Rows) -> Needs:
        if op.table.type.rank - 1 != rows.trail:
            raise RegionError(f"%{rows.value.name} takes more or less than rows")
        return Rows(op.table, op.table.shape[:1], rows.trail), Rows(op.index, rows.lead, 0)

    def row(self, get: "Elements", op: TakeRows, rows: Rows, needs: Needs, row: str) -> str | None:
        return _index(get, needs[1], Place(row, Column("0"), 1))


class _TakeLast(_Take[TakeLast]):
    def needs(self, op: TakeLast, rows: Rows) -> Needs:
        if rows.trail != 1:
            raise RegionError(f"%{rows.value.name} takes more or less than rows")
        return Rows(op.x, op.x.shape[:2]), Rows(op.valid, rows.lead, 0)

    def row(self, get: "Elements", op: TakeLast, rows: Rows, needs: Needs, row: str) -> str | None:
        last = f"T.max({get(needs[1], Place(row, Column('0'), 1))} - 1, 0)"
        number = f"({row}) * {size_text(op.x.shape[1])} + {last}"
        return get.writer.value("last", number, 1, "int32")


ROW_OPS: dict[type[Op], RowOp[Any]] = {
    **dict.fromkeys(FORMULAS, _Elementwise()),
    Full: _Full(),
    Reshape: _Reshape(),
    Slice: _Slice(),
    Sum: _Sum(),
    RmsNorm: _RmsNorm(),
    RoundToInt8: _RoundToInt8(),
    GroupLimit: _GroupLimit(),
    TopK: _TopK(),
    TakeAlong: _TakeAlong(),
    TakeRows: _TakeRows(),
    TakeLast: _TakeLast(),
}
"""Every op that is computed row by row."""


def row_op(op: Op) -> RowOp[Any]:
    """How an op is computed row by row.

    Raises:
        RegionError: it is not.
    """
    known = type(op) in ROW_OPS and (type(op) not in FORMULAS or has_formula(op))
    if not known:
        raise RegionError(f"{op.mnemonic()} is not computed row by row")
    return ROW_OPS[type(op)]


def is_short(rows: Rows) -> bool:
    """Whether a row fits on the stack."""
    return rows.width <= _LONGEST


def expect_short(rows: Rows) -> None:
    """Check that a row fits on the stack.

    Raises:
        RegionError: it does not.
    """
    if not is_short(rows):
        raise RegionError(
            f"a row of %{rows.value.name} has {rows.width} elements, too many to hold"
        )


def _plain(value: Value, rows: Rows) -> Rows:
    """An operand of an op along the last axis, by its leading axes, which are the result's."""
    if rows.trail == 0 or product(rows.row[:-1]) != 1:
        raise RegionError(f"%{rows.value.name} is computed along a part of a row")
    return Rows.of(value)


def _is_first(x: Value, axis: int, rows: Rows) -> bool:
    """Whether an axis of an operand is the first in rows like those of the result, sizes of 1 aside."""
    return axis >= len(rows.lead) and product(x.shape[len(rows.lead) : axis]) == 1


def _repeated(need: Rows, rows: Rows) -> tuple[int, int]:
    """How an operand repeats within rows of the result: its column is column // divide % modulo."""
    full = (1,) * (rows.trail - need.trail) + need.row
    for cut in range(rows.trail + 1):
        whole, part = rows.row[:cut], rows.row[cut:]
        if full == (1,) * cut + part:
            return 1, need.width
        if full == whole + (1,) * len(part):
            return rows.width // max(need.width, 1), need.width
    raise RegionError(f"%{need.value.name} repeats within rows of %{rows.value.name}")


def _in_groups(
    needs: Needs, rows: Rows, groups: int, aligned: bool, lanes: int
) -> VectorNeeds | None:
    """The needs of an op whose vectors may not reach over the end of a group."""
    if groups > 1 and (not aligned or rows.width // groups % lanes):
        return None
    return tuple((need, aligned) for need in needs)


def _of_group(get: "Elements", rows: Rows, at: Place, groups: int) -> str:
    """What a prepared array holds for the group of a column."""
    name = get.body.noted(rows.value, at.row)
    if name is None:
        raise RegionError(f"%{rows.value.name} is needed of other rows than those at hand")
    one = f"{name}[{at.column.split(rows.width // groups, rows.width).outer}]"
    return one if at.lanes == 1 else f"T.Broadcast({one}, {at.lanes})"


def _index(get: "Elements", index: Rows, at: Place) -> str:
    """An element of an index, int32."""
    found = get(index, at)
    wide = COMPUTE_NAMES[index.value.dtype] != "int32"
    return get.writer.value("pick", f'T.Cast("int32", {found})', 1, "int32") if wide else found


def _sum_lanes(body: "Body", x: Rows) -> int:
    return body.lanes(x) if x.value.dtype == DType.F32 else 1
