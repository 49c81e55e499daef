"""Ops that move or select elements without arithmetic, and sums along an axis."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch

from nemoc.ir.dims import Dim, dim, format_dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.ops.checks import expect_shapes
from nemoc.ir.types import TensorType, Value

INDEX = (DType.I32, DType.I64)


@dataclass(frozen=True)
class Full(Op):
    """A tensor whose elements all have one value."""

    value: float
    dtype: DType
    shape: tuple[Dim, ...] = ()

    def infer(self) -> TensorType:
        return TensorType.of(self.dtype, self.shape)

    def evaluate(self, env: Env) -> torch.Tensor:
        return torch.full(env.shape(self.shape), self.value, dtype=env.torch(self.dtype))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        return RowSlice(dataclasses.replace(self, shape=(stop - start, *self.shape[1:])), ())


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in row-major order under another shape."""

    is_view: ClassVar[bool] = True

    x: Value
    shape: tuple[Dim, ...]

    def infer(self) -> TensorType:
        result = TensorType.of(self.x.dtype, self.shape)
        expect(
            result.elements == self.x.type.elements,
            f"reshape: {self.x.type} has {format_dim(self.x.type.elements)} elements, "
            f"but {result} has {format_dim(result.elements)}",
        )
        return result

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(env.shape(self.shape))

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        rest = self.shape[1:]
        row, source_row = product(rest), product(self.x.shape[1:])
        if not (isinstance(row, int) and isinstance(source_row, int) and self.x.shape):
            return None
        if row % source_row == 0:  # a row gathers whole rows of x
            rows = range(start * row // source_row, stop * row // source_row)
            return RowSlice(dataclasses.replace(self, shape=(stop - start, *rest)), (rows,))
        if source_row % row == 0:  # a row of x holds whole rows
            parts = source_row // row
            rows = range(start // parts, -(-stop // parts))
            op = dataclasses.replace(self, shape=(len(rows) * parts, *rest))
            return RowSlice(op, (rows,), skip=start - rows.start * parts)
        return None


@dataclass(frozen=True)
class Permute(Op):
    """Reorder the axes: result axis i is x's axis `axes[i]`."""

    is_view: ClassVar[bool] = True

    x: Value
    axes: tuple[int, ...]

    def infer(self) -> TensorType:
        expect(
            sorted(self.axes) == list(range(self.x.type.rank)),
            f"permute: axes {list(self.axes)} do not permute the {self.x.type.rank} axes of x",
        )
        return TensorType(self.x.dtype, tuple(self.x.shape[a] for a in self.axes))

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.axes)

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        return RowSlice(self, (range(start, stop),)) if self.axes[0] == 0 else None


@dataclass(frozen=True)
class Slice(Op):
    """Elements `start` (inclusive) to `stop` (exclusive) of one axis."""

    is_view: ClassVar[bool] = True

    x: Value
    axis: int
    start: int
    stop: int

    def infer(self) -> TensorType:
        expect(
            0 <= self.axis < self.x.type.rank,
            f"slice: axis {self.axis} is not an axis of {self.x.type}",
        )
        size = self.x.shape[self.axis]
        expect(
            0 <= self.start < self.stop and (not isinstance(size, int) or self.stop <= size),
            f"slice: {self.start}:{self.stop} is no range within axis {self.axis} of {self.x.type}",
        )
        shape = list(self.x.shape)
        shape[self.axis] = self.stop - self.start
        return TensorType(self.x.dtype, tuple(shape))

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.narrow(self.axis, self.start, self.stop - self.start)

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        if self.axis != 0:
            return RowSlice(self, (range(start, stop),))
        op = dataclasses.replace(self, start=0, stop=stop - start)
        return RowSlice(op, (range(self.start + start, self.start + stop),))


@dataclass(frozen=True)
class Concat(Op):
    """Tensors of one element type joined along an axis."""

    xs: tuple[Value, ...]
    axis: int

    def infer(self) -> TensorType:
        expect(len(self.xs) > 0, "concat: no operands")
        first = self.xs[0]
        expect(
            0 <= self.axis < first.type.rank,
            f"concat: axis {self.axis} is not an axis of {first.type}",
        )
        for x in self.xs:
            others = [d for i, d in enumerate(x.shape) if i != self.axis]
            expect(
                x.dtype == first.dtype
                and x.type.rank == first.type.rank
                and others == [d for i, d in enumerate(first.shape) if i != self.axis],
                f"concat: {x.type} does not fit {first.type} along axis {self.axis}",
            )
        shape = list(first.shape)
        shape[self.axis] = dim(sum(x.shape[self.axis] for x in self.xs))
        return TensorType(first.dtype, tuple(shape))

    def evaluate(self, env: Env, xs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat(xs, dim=self.axis)

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        if self.axis != 0:
            return RowSlice(self, (range(start, stop),) * len(self.xs))
        parts: list[tuple[Value, range]] = []
        at = 0
        for x in self.xs:
            size = x.shape[0]
            if not isinstance(size, int):
                return None
            rows = range(max(start - at, 0), min(stop - at, size))
            if rows:
                parts.append((x, rows))
            at += size
        op = dataclasses.replace(self, xs=tuple(x for x, _ in parts))
        return RowSlice(op, tuple(rows for _, rows in parts))


@dataclass(frozen=True)
class Sum(Op):
    """Sum along one axis, which disappears."""

    x: Value
    axis: int

    def infer(self) -> TensorType:
        expect(
            0 <= self.axis < self.x.type.rank,
            f"sum: axis {self.axis} is not an axis of {self.x.type}",
        )
        expect(
            self.x.dtype in (DType.F32, DType.F64), f"sum: x is {self.x.dtype}, expected f32 or f64"
        )
        return TensorType(
            self.x.dtype, tuple(d for i, d in enumerate(self.x.shape) if i != self.axis)
        )

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.sum(self.axis)

    def flops(self) -> Dim:
        return self.x.type.elements


@dataclass(frozen=True)
class TakeRows(Op):
    """Rows of a table: result[i..., :] = table[index[i...], :].

    `table` is [R, ...], `index` any shape of i32 or i64 in [0, R); the result is index.shape + table.shape[1:].
    """

    table: Value
    index: Value

    def infer(self) -> TensorType:
        expect(
            self.table.type.rank >= 1, f"take_rows: table is {self.table.type}, expected rank ≥ 1"
        )
        expect(
            self.index.dtype in INDEX,
            f"take_rows: index is {self.index.dtype}, expected i32 or i64",
        )
        return TensorType(self.table.dtype, self.index.shape + self.table.shape[1:])

    def evaluate(self, env: Env, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return table[index.long()]

    def reads(self) -> tuple[Dim, Dim]:
        """Of the table the rows picked, taken to be different ones unless there are not so many."""
        picked, whole = self.infer().bytes, self.table.type.bytes
        more = sympy.sympify(picked - whole).is_nonnegative
        return whole if more else picked, self.index.type.bytes


@dataclass(frozen=True)
class TakeAlong(Op):
    """Elements along the last axis: result[..., j] = x[..., index[..., j]].

    `x` is [..., E], `index` [..., k] of i32 or i64 in [0, E); the result is [..., k].
    """

    x: Value
    index: Value

    def infer(self) -> TensorType:
        expect(
            self.index.dtype in INDEX,
            f"take_along: index is {self.index.dtype}, expected i32 or i64",
        )
        expect(
            self.x.type.rank >= 1 and self.x.shape[:-1] == self.index.shape[:-1],
            f"take_along: {self.index.type} does not index the last axis of {self.x.type}",
        )
        return TensorType(self.x.dtype, self.index.shape)

    def evaluate(self, env: Env, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(-1, index.long())

    def reads(self) -> tuple[Dim, Dim]:
        return self.infer().bytes, self.index.type.bytes


@dataclass(frozen=True)
class TakeLast(Op):
    """The last valid token of each row: result[b] = x[b, max(valid[b] − 1, 0)].

    `x` is [B, L, H], `valid` i32[B] in [0, L]; the result is [B, H]. A row without valid tokens gives its
    first, which means nothing: whoever passes 0 ignores that row.
    """

    x: Value
    valid: Value

    def infer(self) -> TensorType:
        expect(self.x.type.rank == 3, f"take_last: x is {self.x.type}, expected rank 3")
        expect_shapes(self, DType.I32, valid=self.x.shape[:1])
        return TensorType(self.x.dtype, (self.x.shape[0], self.x.shape[2]))

    def evaluate(self, env: Env, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(x.shape[0]), (valid.long() - 1).clamp(min=0)]

    def reads(self) -> tuple[Dim, Dim]:
        return self.infer().bytes, self.valid.type.bytes
