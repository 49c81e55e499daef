"""Activations to eight bits a number, block by block."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nemoc.ir.dims import Dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.types import TensorType, Value

LARGEST = 127
"""The largest multiple of a block's step."""

SMALLEST_STEP = 2.0**-126
"""Blocks with a smaller step become zeros: its reciprocal would not be a number."""


@dataclass(frozen=True)
class RoundToInt8(Op):
    """Each block of elements to multiples of its step, ties to even: x f32 [..., K] -> f32 [..., K].

    A block is `block` elements of the last axis. Its step s is its largest magnitude / 127, so that x ≈ s · q with q
    from −127 to 127, which is what products in integers read (as in llama.cpp's Q8 formats, with blocks of 32 there).
    The result is s · round(x · (1 / s)), all in float32. NaN and infinity make their block NaN. On normally
    distributed numbers the error is 0.47 % of the norm with blocks of 16. Rounding is what the op means, so float64
    evaluation gives the same numbers. Separable along every leading axis.
    """

    is_rowwise: ClassVar[bool] = True

    x: Value
    block: int = 16

    def infer(self) -> TensorType:
        expect(self.x.dtype is DType.F32, f"round_to_int8: x is {self.x.dtype}, expected f32")
        width = self.x.shape[-1] if self.x.type.rank else 0
        expect(
            self.block > 0 and isinstance(width, int) and width > 0 and width % self.block == 0,
            f"round_to_int8: x is {self.x.type}, expected whole blocks of {self.block} columns",
        )
        return self.x.type

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        blocks = x.to(torch.float32).unflatten(-1, (-1, self.block))
        step = blocks.abs().amax(-1, keepdim=True) / LARGEST
        some = torch.where(step < SMALLEST_STEP, 1.0, step)
        rounded = torch.where(step < SMALLEST_STEP, 0.0, step * (blocks * (1 / some)).round())
        return rounded.flatten(-2).to(env.torch(DType.F32))

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        return RowSlice(self, (range(start, stop),)) if self.x.type.rank > 1 else None

    def flops(self) -> Dim:
        return product((4, *self.x.shape))
