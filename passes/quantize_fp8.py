"""Weights of matrix products in FP8."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.ops import GroupedLinear, Linear
from nemoc.ir.rewrite import Replacement, Rewriter
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext
from nemoc.passes.fp8_values import decoded_from
from nemoc.passes.quantize_products import (
    check_input_scale,
    check_scope,
    fp8_round_trip,
    has_many_rows,
    rewrite_products,
    rows_in_fp8,
    unrounded,
    weights_in,
)


@dataclass(frozen=True)
class QuantizeFp8(Pass):
    """Store weights of matrix products in FP8 (E4M3), one scale a matrix, and multiply with what they decode to.

    `scope` is as for `quantize-nvfp4`: `all` (every projection but the router and the head), `experts`, or a regular
    expression that the weight's name has to begin with. `mode` says what becomes of the activations that such a weight
    multiplies (`MODES`):

    - `w8a16`: nothing.
    - `w8a8`: they become FP8 too, each row with a scale of its own, so that matrix units can multiply both as they are
      (`move-scales`); that changes a row of normally distributed numbers by 2.6 % of its norm. With static scales (the
      context's `input_scales`, one for each weight, from calibration or the checkpoint) that is the scale of all rows,
      so that the kernel that makes activations can quantize them tile by tile; magnitudes above 448 times the scale are
      cut off there. `input-scale` above 0 is one for all weights instead.
    - `w8a8-prompts`: as `w8a8` in products of many rows, as `w8a16` in all others. With many rows arithmetic takes the
      time, and matrix units do twice as much of it in FP8; with few it is reading the weights, so that rows in FP8
      would cost precision for nothing. A product has many rows if their number grows with the length of the prompt
      (it contains the symbol L) or is an integer above 64; a step of one token and the head behind a row's last token
      have one row for each of the batch. All steps read the same codes.

    Weights in scope that a checkpoint stores in FP8 keep their codes. `budget` is the largest relative error of any
    result that the check of passes allows; where scores of experts are close, others are chosen, and that moves results
    further than rounding does.

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
    mode: str = "w8a16"
    input_scale: float = 0.0
    budget: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise NemocError(
                f"pass {self.name}: option mode is {self.mode!r}, expected one of {', '.join(MODES)}"
            )
        check_input_scale(self.name, self.input_scale)
        check_scope(self.name, self.scope)

    @property
    def takes_input_scales(self) -> bool:
        """Whether it quantizes activations by scales that the context has, if it has any."""
        return self.mode != "w8a16" and not self.input_scale

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        chosen = weights_in(graph, self.name, self.scope)
        in_fp8 = MODES[self.mode]

        def activations(w: Value, x: Value, rewriter: Rewriter) -> Value:
            scale = self.input_scale or ctx.input_scales.get(w.name, 0.0)
            return rows_in_fp8(x, rewriter, scale) if in_fp8(x) else x

        def format_name(op: Linear | GroupedLinear) -> str:
            too = self.mode == PROMPTS and in_fp8(op.x)
            return "FP8, rows of prompts too" if too else "FP8"

        def apply(op: Linear | GroupedLinear, rewriter: Rewriter) -> Replacement:
            stored = decoded_from(op.w, rewriter)
            if stored is not None and stored.codes in chosen:
                if not in_fp8(op.x) or decoded_from(op.x, rewriter) is not None:
                    return None
                return rewriter(replace(op, x=activations(stored.codes, op.x, rewriter)))
            w = unrounded(op.w, rewriter)
            if w not in chosen:
                return None
            x = activations(w, op.x, rewriter)
            decoded = fp8_round_trip(w, w.name, "fp8", rewriter)
            return rewriter(replace(op, x=x, w=decoded))

        return rewrite_products(graph, ctx, self.name, format_name, apply)


PROMPTS = "w8a8-prompts"
"""The mode that goes by the number of rows."""

MODES: Mapping[str, Callable[[Value], bool]] = {
    "w8a16": lambda x: False,
    "w8a8": lambda x: True,
    PROMPTS: has_many_rows,
}
"""By name: whether the activations x that a product reads become FP8."""
