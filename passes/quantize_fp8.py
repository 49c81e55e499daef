"""Weights of matrix products in FP8."""

from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, GroupedLinear, Linear
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.scopes import read_scope
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext, Remark


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
        try:
            read_scope(self.scope)
        except NemocError as error:
            raise NemocError(f"pass {self.name}: option {error}") from None

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        begins = read_scope(self.scope)
        chosen = {p for p in graph.params if begins.match(p.name)}

        def apply(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, Linear | GroupedLinear)
            if op.interleave != 1 or op.w not in chosen:
                return None
            return rewriter(replace(op, w=_decoded(op.w, op.x, rewriter)))

        return rewrite(
            graph,
            (Rule("quantize-weight", (Linear, GroupedLinear), apply),),
            on_apply=lambda _, node: ctx.allows(
                Remark(
                    self.name,
                    f"{graph.name}/%{node.results[0].name}",
                    f"{node.op.w.name} in FP8",  # type: ignore[attr-defined]
                )
            ),
        )


def _decoded(w: Value, x: Value, rewriter: Rewriter) -> Value:
    """The weight that its numbers stand for, of a type that a product with x takes."""
    encoding = iter(("scale", "codes"))
    numbers, scale = quantized_fp8(lambda op: rewriter(op, f"{w.name}.{next(encoding)}"), w)
    decoding = iter((*(("scale.view",) if scale.type.rank else ()), "wide", "fp8"))
    decoded = dequantized_fp8(lambda op: rewriter(op, f"{w.name}.{next(decoding)}"), numbers, scale)
    if decoded.dtype.bytes <= x.dtype.bytes:
        return decoded
    return rewriter(Cast(decoded, x.dtype), f"{w.name}.fp8.{x.dtype}")
