"""The weight layout that the target's matrix kernels read."""

import dataclasses
from dataclasses import dataclass

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, DequantizeNvfp4, GroupedLinear, Interleave, Linear
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.constants import constant_values
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class InterleaveWeights(Pass):
    """Store weights of matrix products in blocks of rows, as the target's kernels read them.

    Blocks have `block` rows, or what the target asks for when that is 0. Only products with weights that
    parameters determine are changed; `fold-constants` behind this pass moves the layout change out of
    the step. Of weights that kernels unpack as they read them, it is the packed form that is laid out so.

    Before::

        %y = linear(%x, %weight) : f32[B, 256]

    After, for a target that wants blocks of 8::

        %y.w = interleave(%weight) {block=8} : bf16[32, 64, 8]
        %y = linear(%x, %y.w) {interleave=8, features=256} : f32[B, 256]
    """

    block: int = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise NemocError(f"pass {self.name}: option block is {self.block}, expected at least 0")

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        block = self.block or ctx.target.linear_interleave
        if block <= 1:
            return graph
        constant = constant_values(graph)

        def interleave(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, Linear | GroupedLinear)
            if op.interleave != 1 or op.w not in constant:
                return None
            features = op.width
            assert isinstance(features, int)  # constants have fixed shapes
            w = _laid_out(op.w, block, rewriter, ctx.target.packed_weights)
            return rewriter(dataclasses.replace(op, w=w, interleave=block, features=features))

        rule = Rule("interleave-weight", (Linear, GroupedLinear), interleave)
        return rewrite(
            graph,
            (rule,),
            on_apply=lambda _, node: ctx.allows(
                Remark(
                    self.name,
                    f"{graph.name}/%{node.results[0].name}",
                    f"weights in blocks of {block} rows",
                )
            ),
        )


def _laid_out(w: Value, block: int, rewriter: Rewriter, packed: bool) -> Value:
    """A weight in blocks of rows; if it is unpacked, what it is unpacked from."""
    op = rewriter.producer(w) if packed else None
    name = f"{w.name}.x{block}"
    match op:
        case Cast():
            return rewriter(Cast(_laid_out(op.x, block, rewriter, packed), op.dtype), name)
        case DequantizeNvfp4():
            parts = (
                rewriter(Interleave(v, block), f"{v.name}.x{block}") for v in (op.packed, op.scales)
            )
            codes, scales = parts
            laid = dataclasses.replace(op, packed=codes, scales=scales, interleave=block)
            return rewriter(laid, name)
    return rewriter(Interleave(w, block), name)
