"""Ops that move or select elements without arithmetic, and sums along an axis."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, dim, format_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op
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
                and others == [d for i, d in enumerate(first.shape) if i != self.axis],
                f"concat: {x.type} does not fit {first.type} along axis {self.axis}",
            )
        shape = list(first.shape)
        shape[self.axis] = dim(sum(x.shape[self.axis] for x in self.xs))
        return TensorType(first.dtype, tuple(shape))

    def evaluate(self, env: Env, xs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat(xs, dim=self.axis)


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

    def cost(self) -> Cost:
        moved = self.infer().bytes
        return Cost(0, dim(moved + self.index.type.bytes), moved)


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

    def cost(self) -> Cost:
        moved = self.infer().bytes
        return Cost(0, dim(moved + self.index.type.bytes), moved)


@dataclass(frozen=True)
class TakeLast(Op):
    """The last valid token of each row: result[b] = x[b, valid[b] − 1].

    `x` is [B, L, H], `valid` i32[B] in [1, L]; the result is [B, H].
    """

    x: Value
    valid: Value

    def infer(self) -> TensorType:
        expect(self.x.type.rank == 3, f"take_last: x is {self.x.type}, expected rank 3")
        expect(
            self.valid.type == TensorType(DType.I32, self.x.shape[:1]),
            f"take_last: valid is {self.valid.type}, expected {TensorType(DType.I32, self.x.shape[:1])}",
        )
        return TensorType(self.x.dtype, (self.x.shape[0], self.x.shape[2]))

    def evaluate(self, env: Env, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(x.shape[0]), valid.long() - 1]

    def cost(self) -> Cost:
        moved = self.infer().bytes
        return Cost(0, dim(moved + self.valid.type.bytes), moved)
