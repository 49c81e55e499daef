"""A pass of your own, in a file of your own: what would bf16 activations cost?

The plugin adds the pass `round-activations`, which rounds the input of matrix products to bf16 and back. In nemoc's IR
rounding is visible, so this is two casts. Run it alone or among nemoc's passes, and let nemoc check it:

    cd examples
    nemoc passes --plugin custom_pass round-activations
    nemoc ir mid --plugin custom_pass --pipeline "round-activations{weights=experts},preset"
    nemoc verify sample --plugin custom_pass --pipeline "round-activations,preset"

A pipeline that is given replaces the passes that nemoc runs by itself; `preset` in it stands for those. The last
command shows what the pass costs: its own error, within its budget, and that of the whole model. A graph that rounds to
bf16 is held to the bound of models that compute in bf16, 1e-2 instead of 1e-4, and both hold.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from nemoc.ir import DType, Graph, Op
from nemoc.ir.ops import Cast, GroupedLinear, Linear
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.passes import Effect, Pass, PassContext, Remark


@dataclass(frozen=True)
class RoundActivations(Pass):
    """Round the inputs of matrix products to bf16.

    `weights` limits it to products whose weight has that text in its name; `budget` is the largest relative error
    that is accepted.

    Before::

        %y = linear(%x, %w) : f32[B, 256]

    After::

        %x.bf16 = cast(%x) {dtype=bf16} : bf16[B, 64]
        %x.f32 = cast(%x.bf16) {dtype=f32} : f32[B, 64]
        %y = linear(%x.f32, %w) : f32[B, 256]
    """

    # The pass changes values, so it says so, and by how much at most: nemoc holds it to that.
    effect: ClassVar[Effect] = Effect.PRECISION

    weights: str = ""
    budget: float = 0.05

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        """Rewrite every product that reads f32."""

        def round_input(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, Linear | GroupedLinear)
            if op.x.dtype != DType.F32 or self.weights not in op.w.name:
                return None
            if isinstance(
                rewriter.producer(op.x), Cast
            ):  # rounded already: a rule has to come to rest
                return None
            narrow = rewriter(Cast(op.x, DType.BF16), f"{op.x.name}.bf16")
            wide = rewriter(Cast(narrow, DType.F32), f"{op.x.name}.f32")
            return rewriter(dataclasses.replace(op, x=wide))

        rule = Rule("round-input", (Linear, GroupedLinear), round_input)
        return rewrite(
            graph,
            (rule,),
            # Asked before each change, nemoc can stop the pass after any number of them, and find the one that matters.
            on_apply=lambda _, node: ctx.allows(
                Remark(self.name, f"{graph.name}/%{node.results[0].name}", "input rounded to bf16")
            ),
        )

    def error_budget(self) -> float:
        """What the user allows."""
        return self.budget


NEMOC_PASSES = [RoundActivations]
