"""Matrix products with weights, dense and grouped, and the weight layout that CPU kernels read.

A weight's rows are output features, as on disk: w is [N, K]. Either operand may be of a narrower float than the
other; widening is exact. Products are summed in the accumulator type and the result has that type; rounding it is
an explicit `cast`.

With `interleave = b` above 1 the weight is stored as `interleave` lays it out: [⌈N/b⌉, K, b].
"""

from dataclasses import dataclass
from itertools import pairwise

import sympy
import torch

from nemoc.ir.dims import Dim, ceil_div, dim, format_dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.ops.checks import expect_shapes
from nemoc.ir.types import TensorType, Value

ACCUMULATORS = (DType.F32, DType.F64)


@dataclass(frozen=True)
class Interleave(Op):
    """Weight rows in blocks, K-major within a block: [..., N, K] -> [..., ⌈N/b⌉, K, b].

    result[..., i, k, j] = w[..., i·b + j, k]; rows past N are zero. Separable along every leading axis, and along N
    in multiples of `block`.
    """

    w: Value
    block: int

    def infer(self) -> TensorType:
        expect(self.w.type.rank >= 2, f"interleave: w is {self.w.type}, expected rank ≥ 2")
        expect(self.block > 1, f"interleave: block is {self.block}, expected at least 2")
        *lead, n, k = self.w.shape
        return TensorType.of(self.w.dtype, (*lead, ceil_div(n, self.block), k, self.block))

    def evaluate(self, env: Env, w: torch.Tensor) -> torch.Tensor:
        *lead, n, k = w.shape
        blocks = -(-n // self.block)
        padded = w.new_zeros((*lead, blocks * self.block, k))
        padded[..., :n, :] = w
        return padded.reshape(*lead, blocks, self.block, k).mT.contiguous()

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        if self.w.type.rank > 2:
            return RowSlice(self, (range(start, stop),))
        rows = self.w.shape[0]
        if not isinstance(rows, int):
            return None
        return RowSlice(self, (range(start * self.block, min(stop * self.block, rows)),))


def uninterleave(w: torch.Tensor, features: int) -> torch.Tensor:
    """The rows of an interleaved weight again: [..., N/b, K, b] -> [..., N, K]."""
    return w.transpose(-1, -2).flatten(-3, -2)[..., :features, :].contiguous()


def _check_weight(op: "Linear | GroupedLinear", lead: int) -> None:
    """Ranks, types and the reduction width of x and w; `lead` is the number of leading axes of w."""
    name = op.mnemonic()
    expect(op.x.dtype.is_float and op.w.dtype.is_float, f"{name}: x and w must be floating point")
    expect(op.acc in ACCUMULATORS, f"{name}: acc is {op.acc}, expected f32 or f64")
    rank = lead + (2 if op.interleave == 1 else 3)
    expect(op.w.type.rank == rank, f"{name}: w is {op.w.type}, expected rank {rank}")
    expect(op.x.type.rank >= 1, f"{name}: x is {op.x.type}, expected rank ≥ 1")
    width = op.w.shape[-1] if op.interleave == 1 else op.w.shape[-2]
    expect(
        op.x.shape[-1] == width,
        f"{name}: x has {format_dim(op.x.shape[-1])} columns but w reduces {format_dim(width)}",
    )
    if op.interleave == 1:
        expect(op.features in (0, op.w.shape[-2]), f"{name}: features is for interleaved weights")
    else:
        expect(
            op.w.shape[-1] == op.interleave
            and op.features > 0
            and ceil_div(op.features, op.interleave) == op.w.shape[-3],
            f"{name}: w is {op.w.type}, which does not hold {op.features} rows interleaved by "
            f"{op.interleave}",
        )


@dataclass(frozen=True)
class Linear(Op):
    """y = x · wᵀ: x [..., K], w [N, K] (or interleaved) -> [..., N] of the accumulator's type."""

    x: Value
    w: Value
    acc: DType = DType.F32
    interleave: int = 1
    features: int = 0

    @property
    def width(self) -> Dim:
        """N, the number of output features."""
        return self.w.shape[0] if self.interleave == 1 else self.features

    def infer(self) -> TensorType:
        _check_weight(self, lead=0)
        return TensorType(self.acc, (*self.x.shape[:-1], self.width))

    def evaluate(self, env: Env, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if self.interleave > 1:
            w = uninterleave(w, self.features)
        acc = env.torch(self.acc)
        return x.to(acc) @ w.to(acc).mT

    def flops(self) -> Dim:
        return product((2, *self.x.shape, self.width))


@dataclass(frozen=True)
class GroupedLinear(Op):
    """Each group of rows times its own weight: x [M, K], w [E, N, K] (or interleaved) -> [M, N].

    Rows `offsets[e]` to `offsets[e + 1]` of x belong to weight e; offsets i32[E + 1] ascends from 0 to M.
    """

    x: Value
    w: Value
    offsets: Value
    acc: DType = DType.F32
    interleave: int = 1
    features: int = 0

    @property
    def width(self) -> Dim:
        """N, the number of output features."""
        return self.w.shape[1] if self.interleave == 1 else self.features

    def infer(self) -> TensorType:
        expect(self.x.type.rank == 2, f"grouped_linear: x is {self.x.type}, expected rank 2")
        _check_weight(self, lead=1)
        expect_shapes(self, DType.I32, offsets=(dim(self.w.shape[0] + 1),))
        return TensorType(self.acc, (self.x.shape[0], self.width))

    def evaluate(
        self, env: Env, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        acc = env.torch(self.acc)
        y = x.new_zeros((x.shape[0], self.features or w.shape[1]), dtype=acc)
        bounds = offsets.tolist()
        for e, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                rows = uninterleave(w[e], self.features) if self.interleave > 1 else w[e]
                y[start:stop] = x[start:stop].to(acc) @ rows.to(acc).mT
        return y

    def flops(self) -> Dim:
        return product((2, *self.x.shape, self.width))

    def reads(self) -> tuple[Dim, Dim, Dim]:
        """Of the weights, the groups hit under uniform routing: E · (1 − (1 − 1/E)^M) of them."""
        groups, rows = self.w.shape[0], self.x.shape[0]
        hit = groups * (1 - (1 - sympy.Rational(1, groups)) ** rows)
        return self.x.type.bytes, self.w.type.bytes * hit / groups, self.offsets.type.bytes
