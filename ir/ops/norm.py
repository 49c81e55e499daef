"""Normalisation."""

from dataclasses import dataclass

import torch

from nemoc.ir.dims import Dim, format_dim, product
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op
from nemoc.ir.ops.checks import expect_shapes
from nemoc.ir.ops.elementwise import ARITHMETIC
from nemoc.ir.types import TensorType, Value


@dataclass(frozen=True)
class RmsNorm(Op):
    """x · rsqrt(mean(x²) + eps) · weight, the mean over each of `groups` parts of the last axis.

    x is [..., H], weight [H], both f32 or f64; the result is like x. Root mean square norm as in Zhang and
    Sennrich (2019); with several groups, the norm inside Mamba-2's mixer.
    """

    x: Value
    weight: Value
    eps: float
    groups: int = 1

    def infer(self) -> TensorType:
        expect(
            self.x.dtype in ARITHMETIC,
            f"rms_norm: x is {self.x.dtype}, expected f32 or f64 (cast it first)",
        )
        expect(self.x.type.rank >= 1, f"rms_norm: x is {self.x.type}, expected rank ≥ 1")
        width = self.x.shape[-1]
        expect_shapes(self, self.x.dtype, weight=(width,))
        expect(
            isinstance(width, int) and self.groups >= 1 and width % self.groups == 0,
            f"rms_norm: {format_dim(width)} columns do not divide into {self.groups} groups",
        )
        return self.x.type

    def evaluate(self, env: Env, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts: torch.Tensor = x.unflatten(-1, (self.groups, -1))
        mean = parts.square().mean(-1, keepdim=True)
        return (parts * torch.rsqrt(mean + self.eps)).flatten(-2) * weight

    def flops(self) -> Dim:
        return product((4, *self.x.shape))
