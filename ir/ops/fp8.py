"""Weights in FP8: E4M3 numbers, and one f32 factor for each matrix.

The scale is ModelOpt's for FP8 per tensor, amax / 448: a matrix's largest magnitude becomes the largest E4M3 number.
Arithmetic is in f32, into which weights of f32, bf16 and f16 are widened. Decoding takes no op of its own: it is a
`cast` and a `mul` (`dequantized_fp8`), as for weights that a checkpoint stores in FP8 (`nemoc.models.formats`).

A weight is w [..., N, K]; leading axes stack matrices that have a scale each, f32 [...], as experts do. NaN and
infinity are refused when they are met. In float64 evaluation the ops give the same numbers and scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.nvfp4 import DIALECTS
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.ops.checks import expect_finite, matrix_amax
from nemoc.ir.ops.elementwise import Cast, Div, Mul
from nemoc.ir.ops.nvfp4 import DequantizeNvfp4, Nvfp4ToFp8
from nemoc.ir.ops.shape import Full, Reshape
from nemoc.ir.types import TensorType, Value

LARGEST = 448.0
"""The largest E4M3 number."""

_WEIGHTS = (DType.F32, DType.BF16, DType.F16)


@dataclass(frozen=True)
class Fp8Scale(Op):
    """What 1 stands for in each matrix, amax / 448: w [..., N, K] -> f32 [...].

    1 where that is 0, as in a matrix of zeros. Separable along leading axes.
    """

    w: Value

    def infer(self) -> TensorType:
        _check_weight(self)
        return TensorType(DType.F32, self.w.shape[:-2])

    def evaluate(self, env: Env, w: torch.Tensor) -> torch.Tensor:
        scale = matrix_amax(self, w) / LARGEST
        return torch.where(scale > 0, scale, 1.0).to(env.torch(DType.F32))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        return RowSlice(self, (range(start, stop),))

    def flops(self) -> Dim:
        return self.w.type.elements


@dataclass(frozen=True)
class QuantizeFp8(Op):
    """The E4M3 number nearest to w / scale, ties to even: w [..., N, K], f32 [...] or [] -> f8e4m3 [..., N, K].

    Magnitudes above 448 times the scale are cut off there. Separable along the first axis.
    """

    w: Value
    scale: Value

    def infer(self) -> TensorType:
        _check_weight(self)
        each, one = TensorType(DType.F32, self.w.shape[:-2]), TensorType(DType.F32, ())
        expect(
            self.scale.type in (each, one),
            f"{self.mnemonic()}: scale is {self.scale.type}, expected {each} or {one}",
        )
        return TensorType(DType.F8E4M3, self.w.shape)

    def evaluate(self, env: Env, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        g = scale.to(torch.float32)[..., None, None]
        expect(
            bool((g > 0).all() & g.isfinite().all()),
            f"{self.mnemonic()}: scale is NaN, infinite, zero or negative",
        )
        numbers = expect_finite(self, w.to(torch.float32)) / g
        narrow = numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return narrow.to(env.torch(DType.F8E4M3))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        rows = range(start, stop)
        return RowSlice(self, (rows, rows if self.scale.type.rank else None))

    def flops(self) -> Dim:
        return self.w.type.elements


def quantized_fp8(
    append: Callable[[Op], Value], w: Value, scale: float = 0.0
) -> tuple[Value, Value]:
    """Append the ops that quantize a weight, by a scale of all its matrices or, if that is 0, one of each its own.

    Returns:
        Its numbers, and its scales.
    """
    found = append(Full(scale, DType.F32) if scale else Fp8Scale(w))
    return append(QuantizeFp8(w, found)), found


def dequantized_fp8(append: Callable[[Op], Value], numbers: Value, scale: Value) -> Value:
    """Append the ops that give back f32 [..., N, K]."""
    if scale.type.rank:
        scale = append(Reshape(scale, (*scale.shape, 1, 1)))
    return append(Mul(append(Cast(numbers, DType.F32)), scale))


def nvfp4_in_fp8(append: Callable[[Op], Value], weight: DequantizeNvfp4) -> tuple[Value, Value]:
    """Append the ops that make FP8 of a weight in NVFP4.

    Returns:
        Its numbers, f8e4m3 [..., N, K], and what 1 stands for in each matrix, f32 [...] or [].
    """
    numbers = append(Nvfp4ToFp8(weight.packed, weight.scales))
    share, scale = append(Full(Nvfp4ToFp8.SHARE, DType.F32)), weight.global_scale
    divides = DIALECTS[weight.dialect].divides
    return numbers, append(Div(share, scale) if divides else Mul(share, scale))


_Encoder: TypeAlias = Fp8Scale | QuantizeFp8


def _check_weight(op: _Encoder) -> None:
    type_ = op.w.type
    expect(
        type_.dtype in _WEIGHTS and type_.rank >= 2 and 0 not in type_.shape,
        f"{op.mnemonic()}: w is {type_}, expected f32, bf16 or f16 of rank ≥ 2, not empty",
    )
