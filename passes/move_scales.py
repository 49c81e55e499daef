"""Scales of FP8 moved behind the products that read it, so that kernels multiply its numbers as they are stored."""

from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import GroupBy, GroupedLinear, Linear, Mul, Reshape, TakeRows
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.fp8_values import decoded_from


@dataclass(frozen=True)
class MoveScales(Pass):
    """Multiply weights in FP8 as they are stored, and what comes out by their scales.

    In the presets of all targets with kernels, which read FP8; without this pass weights are decoded when the artifact
    is built. A weight's scale may be one for the matrix, or one for each of its rows; of experts, each row of the
    result takes its own expert's. Activations in FP8 (`quantize-fp8{mode=w8a8}`) are multiplied as they are too, beside
    such weights. What is left out is the rounding of decoded weights. `budget` is the largest relative error of any
    result that the check of passes allows; where scores of experts are close, others are chosen, and that moves results
    further than rounding does.

    Before::

        %w.wide = cast(%w.codes) {dtype=f32} : f32[256, 64]
        %w.fp8 = mul(%w.wide, %w.scale) : f32[256, 64]
        %y = linear(%x, %w.fp8) : f32[B, 256]

    After, with `dce`::

        %sums = linear(%x, %w.codes) : f32[B, 256]
        %y = mul(%sums, %w.scale) : f32[B, 256]
    """

    effect: ClassVar[Effect] = Effect.PRECISION

    budget: float = 0.5

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        return rewrite(
            graph,
            (Rule("scale-after-product", (Linear, GroupedLinear), _scale_after_product),),
            on_apply=lambda _, node: ctx.allows(
                Remark(
                    self.name,
                    f"{graph.name}/%{node.results[0].name}",
                    f"{node.op.mnemonic()} multiplies FP8 as it is stored",
                )
            ),
        )


def _scale_after_product(op: Op, rewriter: Rewriter) -> Replacement:
    """x · (c · s)ᵀ = (x · cᵀ) · s, and (c · s) · wᵀ = (c · wᵀ) · s"""
    assert isinstance(op, Linear | GroupedLinear)
    w = decoded_from(op.w, rewriter)
    if op.interleave != 1 or op.acc is not DType.F32 or w is None:
        return None
    of_weight = _beside_results(w.scale, op, rewriter)
    if of_weight is None:
        return None
    x = decoded_from(op.x, rewriter)
    sums = rewriter(replace(op, x=op.x if x is None else x.codes, w=w.codes))
    if x is not None:
        sums = rewriter(Mul(sums, x.scale))
    return rewriter(Mul(sums, of_weight))


def _beside_results(scale: Value, op: Linear | GroupedLinear, rewriter: Rewriter) -> Value | None:
    """A weight's scale, [] or [..., N or 1, 1], as what each result is multiplied by; none if it cannot be told."""
    if not scale.type.rank:
        return scale
    columns = scale.shape[-2]
    if isinstance(op, Linear) or scale.shape[0] == 1:
        return rewriter(Reshape(scale, (columns,)))
    sorting = rewriter.node(op.offsets)
    if sorting is None or not isinstance(sorting.op, GroupBy):
        return None
    order, _, _ = sorting.results
    slots = rewriter(Reshape(sorting.op.index, order.shape))
    groups = rewriter(TakeRows(slots, order))
    return rewriter(TakeRows(rewriter(Reshape(scale, (scale.shape[0], columns))), groups))
