"""Ops that can be computed tile by tile inside a kernel, and how each is: the table `row_op` looks them up in.

Element-wise ops are all one entry: a formula. The others say where their operands' elements are, and what has to be
computed once for a whole row.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

from nemoc.codegen.plan import RegionError
from nemoc.codegen.triton.formulas import FORMULAS
from nemoc.codegen.triton.seen import Place, Seen, wide
from nemoc.codegen.triton.writer import TYPE_NAMES, number_text, power_of_two, size_text
from nemoc.ir.dims import Dim, dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK, DIALECTS, LARGEST_CODE, LARGEST_SCALE, LARGEST_SCALE_OF_SIX
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    Concat,
    DequantizeNvfp4,
    Fp8Scale,
    Full,
    GroupLimit,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    Permute,
    QuantizeFp8,
    QuantizeNvfp4,
    Reshape,
    RmsNorm,
    Slice,
    Sum,
    TakeAlong,
    TakeLast,
    TakeRows,
    TopK,
)
from nemoc.ir.ops.fp8 import LARGEST as LARGEST_E4M3
from nemoc.ir.types import Value

if TYPE_CHECKING:  # bodies are written by these
    from nemoc.codegen.triton.body import Body

OpT = TypeVar("OpT", bound=Op)

Sources = list[tuple[Seen, Place]]

_PART = 2048
"""Elements of a row read at a time where it is too long for a tile."""


class RowOp(Generic[OpT]):
    """How one op is computed tile by tile."""

    def sources(self, body: "Body", op: OpT, seen: Seen, place: Place) -> Sources:
        """The operands, each at the place that elements of the result are made from.

        Raises:
            RegionError: they are not made from places of rows.
        """
        raise NotImplementedError

    def prepare(self, body: "Body", op: OpT, seen: Seen, place: Place) -> None:
        """Write what is computed once for the rows of a place."""

    def tile(self, body: "Body", op: OpT, seen: Seen, place: Place) -> str:
        """The elements at a place, as an expression."""
        ((source, at),) = self.sources(body, op, seen, place)
        return body.tile(source, at)


class _Elementwise(RowOp[Op]):
    """Anything that has a formula."""

    def sources(self, body: "Body", op: Op, seen: Seen, place: Place) -> Sources:
        return [body.operand_place(seen, v, place) for v in op.operands()]

    def tile(self, body: "Body", op: Op, seen: Seen, place: Place) -> str:
        tiles = [body.tile(s, at) for s, at in self.sources(body, op, seen, place)]
        return FORMULAS[type(op)](op, tiles)


class _Full(RowOp[Full]):
    def sources(self, body: "Body", op: Full, seen: Seen, place: Place) -> Sources:
        return []

    def tile(self, body: "Body", op: Full, seen: Seen, place: Place) -> str:
        value = number_text(op.value) if op.dtype.is_float else repr(int(op.value))
        return f"tl.full([1, 1], {value}, {TYPE_NAMES[op.dtype]})"


class _Reshape(RowOp[Reshape]):
    """Rows are cut from elements in row-major order, which a reshape keeps."""

    def sources(self, body: "Body", op: Reshape, seen: Seen, place: Place) -> Sources:
        return [(Seen(op.x, seen.width), place)]


class _Permute(RowOp[Permute]):
    """Element by element."""

    def sources(self, body: "Body", op: Permute, seen: Seen, place: Place) -> Sources:
        writer = body.writer
        row = wide(place.row, seen.width, seen.count)
        at = writer.let("flat", f"{row} * {seen.width} + {place.column}")
        strides: list[Dim] = [1] * op.x.type.rank
        for axis in reversed(range(op.x.type.rank - 1)):
            strides[axis] = dim(strides[axis + 1] * op.x.shape[axis + 1])
        terms = []
        inner: Dim = 1
        for axis in reversed(op.axes):
            size = op.x.shape[axis]
            index = at if inner == 1 else writer.let("i", f"{at} // {size_text(inner)}")
            terms.append(f"{index} % {size_text(size)} * {size_text(strides[axis])}")
            inner = dim(inner * size)
        row = writer.let("source", " + ".join(terms))
        return [(Seen(op.x, 1), replace(place, row=row, column="0", mask="", columns=1))]


class _Slice(RowOp[Slice]):
    """A range of an axis: within a row, or of whole rows."""

    def sources(self, body: "Body", op: Slice, seen: Seen, place: Place) -> Sources:
        writer = body.writer
        size, count = op.x.shape[op.axis], op.stop - op.start
        inner = product(op.x.shape[op.axis + 1 :])
        if not isinstance(inner, int) or not isinstance(size, int):
            raise RegionError(f"%{seen.value.name} is a slice of an axis of no fixed size")
        part, whole, first = count * inner, size * inner, op.start * inner
        if seen.width % part == 0:
            column = f"{place.column} + {first}" if first else place.column
            if seen.width != part:
                column = f"{place.column} // {part} * {whole} + {place.column} % {part} + {first}"
            column = writer.let("column", column)
            return [(Seen(op.x, seen.width // part * whole), replace(place, column=column))]
        if any(n % seen.width for n in (part, whole, first)):
            raise RegionError(f"%{seen.value.name} is a slice across rows")
        parts, wholes = part // seen.width, whole // seen.width
        row = f"{place.row} // {parts} * {wholes} + {place.row} % {parts} + {first // seen.width}"
        return [(Seen(op.x, seen.width), replace(place, row=writer.let("row", row)))]


class _Concat(RowOp[Concat]):
    """Operands side by side within a row, or rows of one behind those of the other."""

    def sources(self, body: "Body", op: Concat, seen: Seen, place: Place) -> Sources:
        inner = product(op.xs[0].shape[op.axis + 1 :])
        size = product((seen.value.shape[op.axis], inner))
        if not isinstance(inner, int):
            raise RegionError(f"%{seen.value.name} joins rows of no fixed width")
        if size == seen.width:
            return self._within(body, op, place, inner)
        if inner % seen.width:
            raise RegionError(f"%{seen.value.name} is joined across rows")
        return self._behind(body, op, seen, place, inner // seen.width)

    def tile(self, body: "Body", op: Concat, seen: Seen, place: Place) -> str:
        writer = body.writer
        (first, at), *others = self.sources(body, op, seen, place)
        joined = body.tile(first, at)
        for source, at in others:
            tile = body.tile(source, at)
            joined = writer.let("joined", f"tl.where({at.mask}, {tile}, {joined})")
        return joined

    def _within(self, body: "Body", op: Concat, place: Place, inner: int) -> Sources:
        found, start = [], 0
        for x in op.xs:
            part = int(x.shape[op.axis]) * inner
            column = f"{place.column} - {start}" if start else place.column
            column = body.writer.let("column", column)
            mask = body.writer.let("inside", f"({column} >= 0) & ({column} < {part})")
            found.append((Seen(x, part), replace(place, column=column, mask=mask)))
            start += part
        return found

    def _behind(self, body: "Body", op: Concat, seen: Seen, place: Place, each: int) -> Sources:
        writer, start = body.writer, dim(0)
        total = size_text(dim(seen.value.shape[op.axis] * each))
        rest = writer.let("rest", f"{place.row} % {total}")
        found = []
        for x in op.xs:
            count = dim(x.shape[op.axis] * each)
            within = writer.let("within", f"{rest} - {size_text(start)}")
            mask = writer.let("inside", f"({within} >= 0) & ({within} < {size_text(count)})")
            row = f"tl.where({mask}, {place.row} // {total} * {size_text(count)} + {within}, 0)"
            if place.mask:
                mask = writer.let("inside", f"{mask} & {place.mask}")
            row = writer.let("row", row)
            found.append((Seen(x, seen.width), replace(place, row=row, mask=mask)))
            start = dim(start + count)
        return found


class _Sum(RowOp[Sum]):
    """Over an axis: term by term, or a whole row at once where the axis is the last and a row is one element."""

    def sources(self, body: "Body", op: Sum, seen: Seen, place: Place) -> Sources:
        terms, inner = self._sizes(op, seen)
        if inner == 1 and seen.width == 1 and isinstance(terms, int):
            return [(Seen(op.x, terms), place)]
        x, row, column, width = self._term(body, op, seen, place, "0")
        return [(Seen(x, width), replace(place, row=row, column=column))]

    def tile(self, body: "Body", op: Sum, seen: Seen, place: Place) -> str:
        terms, inner = self._sizes(op, seen)
        if inner == 1 and seen.width == 1 and isinstance(terms, int):
            at = body.whole(terms, place)
            tile = body.tile(Seen(op.x, terms), at)
            if at.mask:
                tile = f"tl.where({at.mask}, {tile}, 0.0)"
            return f"tl.sum({tile}, axis=1, keep_dims=True)"
        writer = body.writer
        shape = f"[{place.rows}, {place.columns}]"
        total = writer.fresh("total", f"tl.zeros({shape}, {TYPE_NAMES[op.x.dtype]})")
        with writer.loop("j", size_text(terms)) as j:
            x, row, column, width = self._term(body, op, seen, place, j)
            term = body.tile(Seen(x, width), replace(place, row=row, column=column))
            writer.line(f"{total} += {term}")
        return total

    def _sizes(self, op: Sum, seen: Seen) -> tuple[Dim, int]:
        terms, inner = op.x.shape[op.axis], product(op.x.shape[op.axis + 1 :])
        if not isinstance(inner, int):
            raise RegionError(f"%{seen.value.name} has rows of no fixed width")
        return terms, inner

    def _term(
        self, body: "Body", op: Sum, seen: Seen, place: Place, j: str
    ) -> tuple[Value, str, str, int]:
        """Row and column of the term `j` of an element."""
        count, inner = self._sizes(op, seen)
        terms = size_text(count)
        writer, row, column = body.writer, place.row, place.column
        if inner % seen.width == 0:
            parts = inner // seen.width
            if parts == 1:
                return op.x, writer.let("term", f"{row} * {terms} + {j}"), column, seen.width
            text = f"({row} // {parts} * {terms} + {j}) * {parts} + {row} % {parts}"
            return op.x, writer.let("term", text), column, seen.width
        if seen.width % inner:
            raise RegionError(f"%{seen.value.name} is summed across rows")
        outer = f"{row} * {seen.width // inner} + {column} // {inner}"
        within = writer.let("within", f"{column} % {inner}") if inner > 1 else "0"
        return op.x, writer.let("term", f"({outer}) * {terms} + {j}"), within, inner


class _RmsNorm(RowOp[RmsNorm]):
    """Rows are groups. Prepared: 1 / √(mean of squares + eps) of each row."""

    def sources(self, body: "Body", op: RmsNorm, seen: Seen, place: Place) -> Sources:
        self._check(op, seen)
        return [(Seen(op.x, seen.width), place), body.operand_place(seen, op.weight, place)]

    def prepare(self, body: "Body", op: RmsNorm, seen: Seen, place: Place) -> None:
        self._check(op, seen)
        self._scale(body, op, seen, place)

    def tile(self, body: "Body", op: RmsNorm, seen: Seen, place: Place) -> str:
        x, weight = self.sources(body, op, seen, place)
        scale = self._scale(body, op, seen, place)
        return f"{body.tile(*x)} * {scale} * {body.tile(*weight)}"

    def _check(self, op: RmsNorm, seen: Seen) -> None:
        if seen.width * op.groups != op.x.shape[-1]:
            raise RegionError(f"rows of %{seen.value.name} are not the groups of its norm")

    def _scale(self, body: "Body", op: RmsNorm, seen: Seen, place: Place) -> str:
        def make() -> str:
            total = self._squares(body, Seen(op.x, seen.width), place)
            return body.writer.fresh("scale", f"tl.rsqrt({total} / {seen.width} + {op.eps!r})")

        return body.writer.once(f"scale for %{seen.value.name} in rows {place.row}", make)

    def _squares(self, body: "Body", x: Seen, place: Place) -> str:
        return over_row(body, x, place, "tl.sum", "{} + {}", lambda tile: f"{tile} * {tile}")


def over_row(
    body: "Body", x: Seen, place: Place, whole: str, two: str, of: Callable[[str], str]
) -> str:
    """What is left of every row of a value, as an expression: a tile of one column.

    Long rows are read in parts.

    Args:
        body: what the value belongs to.
        x: the value and its rows.
        place: the rows.
        whole: Triton's function that leaves one element of a row; 0 changes nothing.
        two: what it makes of two elements, as a format of two expressions.
        of: given a tile of the value, what is to be taken instead of its elements.
    """
    writer = body.writer

    def part_of(at: Place) -> str:
        taken = of(body.tile(x, at))
        return f"tl.where({at.mask}, {taken}, 0.0)" if at.mask else taken

    columns = power_of_two(x.width)
    if place.rows * columns <= _PART * 4:
        return f"{whole}({part_of(body.whole(x.width, place))}, axis=1, keep_dims=True)"
    part = max(32, min(_PART // place.rows, columns))
    dtype = x.value.dtype if x.value.dtype.bytes > 4 else DType.F32
    left = writer.fresh("left", f"tl.zeros([{place.rows}, {part}], {TYPE_NAMES[dtype]})")
    with writer.loop("start", str(x.width), step=part) as start:
        taken = part_of(body.span(start, part, x.width, place))
        writer.line(f"{left} = {two.format(left, taken)}")
    return f"{whole}({left}, axis=1, keep_dims=True)"


class _GroupLimit(RowOp[GroupLimit]):
    """Of whole rows."""

    def sources(self, body: "Body", op: GroupLimit, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, op.x)
        return [(Seen(op.x, seen.width), place)]

    def tile(self, body: "Body", op: GroupLimit, seen: Seen, place: Place) -> str:
        ((x, at),) = self.sources(body, op, seen, place)
        kept = self._kept(body, op, x, place)
        bit = f"({kept} >> ({at.column} // {x.width // op.groups})) & 1"
        return f"tl.where(({bit}) != 0, {body.tile(x, at)}, {number_text(op.fill)})"

    def _kept(self, body: "Body", op: GroupLimit, x: Seen, place: Place) -> str:
        """Which groups stay, as bits of one integer for each row."""
        if op.groups > 32:
            raise RegionError(f"{op.groups} groups are too many")
        size = x.width // op.groups

        def make() -> str:
            writer = body.writer
            at = body.whole(x.width, place)
            tile = body.tile(x, at)
            groups = power_of_two(op.groups)
            number = writer.let("number", f"tl.arange(0, {groups})[None, :]")
            lowest = 'float("-inf")'
            merits = writer.fresh(
                "merits", f"tl.full([{place.rows}, {groups}], {lowest}, tl.float32)"
            )
            inside = f" & {at.mask}" if at.mask else ""
            with writer.loop("g", str(op.groups)) as g:
                mine = writer.let("mine", f"({at.column} // {size} == {g}){inside}")
                own = writer.let("own", f"tl.where({mine}, {tile}, {lowest})")
                best = writer.let("best", f"tl.argmax({own}, axis=1, keep_dims=True)")
                first = f"tl.max({own}, axis=1, keep_dims=True)"
                other = f"tl.where({at.column} == {best}, {lowest}, {own})"
                second = f"tl.max({other}, axis=1, keep_dims=True)"
                writer.line(f"{merits} = tl.where({number} == {g}, {first} + {second}, {merits})")
            kept = writer.fresh("kept", f"tl.zeros([{place.rows}, 1], tl.int32)")
            with writer.loop("n", str(op.keep)):
                best = writer.let("best", f"tl.argmax({merits}, axis=1, keep_dims=True)")
                writer.line(f"{kept} = {kept} | (1 << {best})")
                writer.line(f"{merits} = tl.where({number} == {best}, {lowest}, {merits})")
            return kept

        return body.writer.once(
            f"{op.keep} of {op.groups} groups of {x.value.name} in rows {place.row}", make
        )


class _TopK(RowOp[TopK]):
    """Of whole rows, one after the other; a tile of whole rows of the result, or elements picked from it."""

    def sources(self, body: "Body", op: TopK, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, seen.value)
        width = op.x.shape[-1]
        assert isinstance(width, int)
        return [(Seen(op.x, width), place)]

    def tile(self, body: "Body", op: TopK, seen: Seen, place: Place) -> str:
        ((x, _),) = self.sources(body, op, seen, place)
        wanted = body.whole(op.k, place)

        def make() -> str:
            writer = body.writer
            at = body.whole(x.width, place)
            lowest = 'float("-inf")'
            tile = body.tile(x, at)
            left = writer.fresh(
                "left", f"tl.where({at.mask}, {tile}, {lowest})" if at.mask else f"{tile} + 0.0"
            )
            chosen = writer.fresh("chosen", f"tl.zeros([{place.rows}, {wanted.columns}], tl.int32)")
            with writer.loop("j", str(op.k)) as j:
                best = writer.let("best", f"tl.argmax({left}, axis=1, keep_dims=True)")
                writer.line(f"{chosen} = tl.where({wanted.column} == {j}, {best}, {chosen})")
                writer.line(f"{left} = tl.where({at.column} == {best}, {lowest}, {left})")
            return chosen

        chosen = body.writer.once(f"best for %{seen.value.name} in rows {place.row}", make)
        if place.column != wanted.column:
            raise RegionError(f"%{seen.value.name} is needed elsewhere than where it is made")
        return chosen


class _TakeAlong(RowOp[TakeAlong]):
    def sources(self, body: "Body", op: TakeAlong, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, op.index)
        width = op.x.shape[-1]
        if not isinstance(width, int):
            raise RegionError(f"%{op.x.name} has rows of no fixed width")
        column = body.tile(Seen(op.index, seen.width), place)
        return [(Seen(op.x, width), replace(place, column=column))]


class _TakeRows(RowOp[TakeRows]):
    def sources(self, body: "Body", op: TakeRows, seen: Seen, place: Place) -> Sources:
        width = product(op.table.shape[1:])
        if not isinstance(width, int) or width % seen.width:
            raise RegionError(f"%{seen.value.name} takes more or less than rows")
        writer, parts = body.writer, width // seen.width
        slot = place.row if parts == 1 else writer.let("slot", f"{place.row} // {parts}")
        one = replace(place, row=slot, column="0", columns=1, mask="")
        row = body.tile(Seen(op.index, 1), one)
        if parts > 1:
            row = writer.let("row", f"{row} * {parts} + {place.row} % {parts}")
        return [(Seen(op.table, seen.width), replace(place, row=row))]


class _TakeLast(RowOp[TakeLast]):
    def sources(self, body: "Body", op: TakeLast, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, seen.value)
        one = replace(place, column="0", columns=1, mask="")
        valid = body.tile(Seen(op.valid, 1), one)
        length = size_text(op.x.shape[1])
        last = f"{place.row} * {length} + tl.maximum({valid} - 1, 0)"
        return [(Seen(op.x, seen.width), replace(place, row=body.writer.let("last", last)))]


class _DequantizeNvfp4(RowOp[DequantizeNvfp4]):
    """Codes by twos in a byte, a scale for each block of 16, a scale for the tensor or each of a stack."""

    def sources(self, body: "Body", op: DequantizeNvfp4, seen: Seen, place: Place) -> Sources:
        return [*_codes_and_scales(body, op, seen, place), scale_of(body, op, place)]

    def tile(self, body: "Body", op: DequantizeNvfp4, seen: Seen, place: Place) -> str:
        if op.spread:
            raise RegionError(f"%{op.packed.name}: spread codes are for products alone")
        by = "/" if DIALECTS[op.dialect].divides else "*"
        return _nvfp4_numbers(
            body, op, seen, place, f"{by} {body.tile(*scale_of(body, op, place))}"
        )


class _Nvfp4ToFp8(RowOp[Nvfp4ToFp8]):
    def sources(self, body: "Body", op: Nvfp4ToFp8, seen: Seen, place: Place) -> Sources:
        return _codes_and_scales(body, op, seen, place)

    def tile(self, body: "Body", op: Nvfp4ToFp8, seen: Seen, place: Place) -> str:
        return f"signed_e4m3({_nvfp4_numbers(body, op, seen, place, f'/ {op.SHARE}')})"


def _codes_and_scales(
    body: "Body", op: DequantizeNvfp4 | Nvfp4ToFp8, seen: Seen, place: Place
) -> Sources:
    """Where the codes and the blocks' scales of elements are: each once, of columns that follow one another."""
    _expect_width(seen, seen.value)
    writer, width = body.writer, seen.width
    if _is_whole_blocks(body, place):
        codes = body.resized(place, place.columns // 2, width // 2)
        scales = body.resized(place, place.columns // BLOCK, width // BLOCK)
    else:
        codes = replace(place, column=writer.let("byte", f"{place.column} // 2"))
        scales = replace(place, column=writer.let("block", f"{place.column} // {BLOCK}"))
    return [(Seen(op.packed, width // 2), codes), (Seen(op.scales, width // BLOCK), scales)]


def _is_whole_blocks(body: "Body", place: Place) -> bool:
    return body.is_run(place) and place.columns % BLOCK == 0


def _nvfp4_numbers(
    body: "Body", op: DequantizeNvfp4 | Nvfp4ToFp8, seen: Seen, place: Place, scaled: str
) -> str:
    """Codes times their blocks' scales, which something is done to, f32."""
    writer = body.writer
    codes, scales = (
        body.tile(source, at) for source, at in _codes_and_scales(body, op, seen, place)
    )
    step = writer.let("step", f"from_e4m3({scales}) {scaled}")
    if _is_whole_blocks(body, place):
        return f"nvfp4_numbers({codes}, {step}, {place.rows}, {place.columns // BLOCK})"
    pair = f"{codes}.to(tl.int32) >> (({place.column} % 2) * 4)"
    value = writer.let("value", f"from_e2m1(({pair}) & 15)")
    return f"{value} * {step}"


_MatrixScale = TypeVar("_MatrixScale", Nvfp4GlobalScale, Fp8Scale)


class _ScaleOfMatrix(RowOp[_MatrixScale]):
    """A scale by the largest magnitude of a matrix, which is seen as a row."""

    def sources(self, body: "Body", op: _MatrixScale, seen: Seen, place: Place) -> Sources:
        width = product(op.w.shape[-2:])
        if seen.width != 1 or not isinstance(width, int):
            raise RegionError(f"%{seen.value.name} is of a matrix of no fixed size")
        return [(Seen(op.w, width), place)]

    def prepare(self, body: "Body", op: _MatrixScale, seen: Seen, place: Place) -> None:
        self.tile(body, op, seen, place)

    def tile(self, body: "Body", op: _MatrixScale, seen: Seen, place: Place) -> str:
        ((w, at),) = self.sources(body, op, seen, place)

        def make() -> str:
            size = over_row(
                body, w, at, "tl.max", "tl.maximum({}, {})", lambda x: f"tl.abs({x}.to(tl.float32))"
            )
            return self.scale(body, op, size)

        return body.writer.once(f"scale for %{seen.value.name} in rows {place.row}", make)

    def scale(self, body: "Body", op: _MatrixScale, size: str) -> str:
        """The scale by the largest magnitude."""
        raise NotImplementedError


class _Nvfp4GlobalScale(_ScaleOfMatrix[Nvfp4GlobalScale]):
    """What makes the largest magnitude the largest number of the format."""

    def tile(self, body: "Body", op: Nvfp4GlobalScale, seen: Seen, place: Place) -> str:
        _expect_modelopt(op, seen.value)
        return super().tile(body, op, seen, place)

    def scale(self, body: "Body", op: Nvfp4GlobalScale, size: str) -> str:
        largest = LARGEST_SCALE_OF_SIX if op.four_over_six else LARGEST_SCALE
        return body.writer.fresh("scale", f"tl.div_rn({size}, {LARGEST_CODE * largest!r})")


class _Fp8Scale(_ScaleOfMatrix[Fp8Scale]):
    """The same, and 1 for a matrix of zeros."""

    def scale(self, body: "Body", op: Fp8Scale, size: str) -> str:
        scale = body.writer.fresh("scale", f"tl.div_rn({size}, {LARGEST_E4M3!r})")
        return body.writer.let("scale", f"tl.where({scale} > 0.0, {scale}, 1.0)")


class _Nvfp4BlockScales(RowOp[Nvfp4BlockScales]):
    """A scale for each block of 16 of consecutive columns."""

    def sources(self, body: "Body", op: Nvfp4BlockScales, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, seen.value)
        wide = body.resized(place, place.columns * BLOCK, seen.width * BLOCK)
        return [(Seen(op.w, seen.width * BLOCK), wide), scale_of(body, op, place)]

    def tile(self, body: "Body", op: Nvfp4BlockScales, seen: Seen, place: Place) -> str:
        _expect_modelopt(op, seen.value)
        if op.four_over_six:
            raise RegionError(f"%{seen.value.name} is chosen by the error of two scales")
        (w, wide), scale = self.sources(body, op, seen, place)
        x = _f32_tile(body, w, wide)
        return f"block_scales({x}, {body.tile(*scale)}, {place.rows}, {place.columns})"


class _QuantizeNvfp4(RowOp[QuantizeNvfp4]):
    """Two codes a byte, of consecutive columns."""

    def sources(self, body: "Body", op: QuantizeNvfp4, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, seen.value)
        width, half = seen.width * 2, BLOCK // 2
        wide = body.resized(place, place.columns * 2, width)
        blocks = body.resized(place, place.columns // half, width // BLOCK)
        scales = Seen(op.scales, width // BLOCK)
        return [(Seen(op.w, width), wide), (scales, blocks), scale_of(body, op, place)]

    def tile(self, body: "Body", op: QuantizeNvfp4, seen: Seen, place: Place) -> str:
        _expect_modelopt(op, seen.value)
        (w, wide), (scales, blocks), scale = self.sources(body, op, seen, place)
        x = _f32_tile(body, w, wide)
        operands = f"{x}, {body.tile(scales, blocks)}, {body.tile(*scale)}"
        return f"nvfp4_codes({operands}, {place.rows}, {blocks.columns})"


class _QuantizeFp8(RowOp[QuantizeFp8]):
    """Element by element, with the scale of a row's matrix."""

    def sources(self, body: "Body", op: QuantizeFp8, seen: Seen, place: Place) -> Sources:
        _expect_width(seen, seen.value)
        return [(Seen(op.w, seen.width), place), _of_matrix(body, op.w, op.scale, place)]

    def tile(self, body: "Body", op: QuantizeFp8, seen: Seen, place: Place) -> str:
        (w, at), scale = self.sources(body, op, seen, place)
        return f"e4m3_codes({_f32_tile(body, w, at)}, {body.tile(*scale)})"


def scale_of(
    body: "Body", op: DequantizeNvfp4 | Nvfp4BlockScales | QuantizeNvfp4, place: Place
) -> tuple[Seen, Place]:
    """Where the tensor scale of rows is: there is one, or one for each matrix of a stack."""
    matrix = op.packed if isinstance(op, DequantizeNvfp4) else op.w
    return _of_matrix(body, matrix, op.global_scale, place)


def _of_matrix(body: "Body", matrix: Value, scale: Value, place: Place) -> tuple[Seen, Place]:
    """Where the scale of rows of a matrix is: there is one, or one for each of a stack."""
    one = replace(place, column="0", columns=1, mask="")
    if scale.type.rank == 0:
        one = replace(one, row="0", rows=1)
    elif matrix.shape[-2] != 1:
        of = f"{place.row} // {size_text(matrix.shape[-2])}"
        one = replace(one, row=body.writer.let("of", of))
    return Seen(scale, 1), one


def _f32_tile(body: "Body", seen: Seen, place: Place) -> str:
    """A whole tile of a value in f32."""
    text = body.tile(seen, place)
    if seen.value.dtype != DType.F32:
        text = body.writer.let("wide", f"{text}.to(tl.float32)")
    return body.writer.let("x", f"tl.broadcast_to({text}, [{place.rows}, {place.columns}])")


def _expect_modelopt(op: Nvfp4GlobalScale | Nvfp4BlockScales | QuantizeNvfp4, made: Value) -> None:
    if op.dialect != "modelopt":
        raise RegionError(f"%{made.name} is quantized in the arithmetic of {op.dialect}")


def _expect_width(seen: Seen, like: Value) -> None:
    """Rows that are the last axis of a value."""
    if seen.width != like.shape[-1]:
        raise RegionError(f"%{seen.value.name} is needed in other rows than its own")


_TABLE: dict[type[Op], RowOp] = {  # type: ignore[type-arg]
    **dict.fromkeys(FORMULAS, _Elementwise()),
    Full: _Full(),
    Reshape: _Reshape(),
    Permute: _Permute(),
    Slice: _Slice(),
    Concat: _Concat(),
    Sum: _Sum(),
    RmsNorm: _RmsNorm(),
    GroupLimit: _GroupLimit(),
    TopK: _TopK(),
    TakeAlong: _TakeAlong(),
    TakeRows: _TakeRows(),
    TakeLast: _TakeLast(),
    DequantizeNvfp4: _DequantizeNvfp4(),
    Nvfp4ToFp8: _Nvfp4ToFp8(),
    Nvfp4GlobalScale: _Nvfp4GlobalScale(),
    Nvfp4BlockScales: _Nvfp4BlockScales(),
    QuantizeNvfp4: _QuantizeNvfp4(),
    Fp8Scale: _Fp8Scale(),
    QuantizeFp8: _QuantizeFp8(),
}


def row_op(op: Op) -> RowOp:  # type: ignore[type-arg]
    """How an op is computed tile by tile.

    Raises:
        RegionError: it is not.
    """
    if type(op) not in _TABLE:
        raise RegionError(f"{op.mnemonic()} is not computed row by row")
    return _TABLE[type(op)]
