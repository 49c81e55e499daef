"""Weights of matrix products in FP8."""

from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.graph import Graph
from nemoc.ir.ops import GroupedLinear, Linear
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
from nemoc.ir.rewrite import Replacement, Rewriter
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext
from nemoc.passes.quantize_products import beside, check_scope, rewrite_products, weights_in


@dataclass(frozen=True)
class QuantizeFp8(Pass):
    """Store weights of matrix products in FP8 (E4M3), one scale a matrix, and multiply with what they decode to.

    `scope` is as for `quantize-nvfp4`: `all` (every projection but the router and the head), `experts`, or a regular
    expression that the weight's name has to begin with. Activations are not quantized. `budget` is the largest
    relative error of any result that the check of passes allows; where scores of experts are close, others are chosen,
    and that moves results further than rounding does.

    Before::

        %y = linear(%x, %w) : f32[B, 256]

    After::

        %w.scale = fp8_scale(%w) : f32[]
        %w.codes = quantize_fp8(%w, %w.scale) : f8e4m3[256, 64]
        %w.wide = cast(%w.codes) {dtype=f32} : f32[256, 64]
        %w.fp8 = mul(%w.wide, %w.scale) : f32[256, 64]
        %y = linear(%x, %w.fp8) : f32[B, 256]
    """

    effect: ClassVar[Effect] = Effect.PRECISION

    scope: str = "all"
    budget: float = 0.5

    def __post_init__(self) -> None:
        check_scope(self.name, self.scope)

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        chosen = weights_in(graph, self.scope)

        def apply(op: Linear | GroupedLinear, rewriter: Rewriter) -> Replacement:
            if op.w not in chosen:
                return None
            return rewriter(replace(op, w=_decoded(op.w, op.x, rewriter)))

        return rewrite_products(graph, ctx, self.name, "FP8", apply)


def _decoded(w: Value, x: Value, rewriter: Rewriter) -> Value:
    """The weight that its numbers stand for, of a type that a product with x takes."""
    encoding = iter(("scale", "codes"))
    numbers, scale = quantized_fp8(lambda op: rewriter(op, f"{w.name}.{next(encoding)}"), w)
    decoding = iter((*(("scale.view",) if scale.type.rank else ()), "wide", "fp8"))
    decoded = dequantized_fp8(lambda op: rewriter(op, f"{w.name}.{next(decoding)}"), numbers, scale)
    return beside(x, decoded, rewriter)
