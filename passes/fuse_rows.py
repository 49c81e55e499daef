"""What is left between the heavy ops."""

from dataclasses import dataclass

from nemoc.ir.dims import product
from nemoc.ir.graph import Graph, Node
from nemoc.passes.base import Pass
from nemoc.passes.constants import constant_values
from nemoc.passes.context import PassContext
from nemoc.passes.growth import Growth, has_rows, is_rowwise, make_region


@dataclass(frozen=True)
class FuseRows(Pass):
    """Fuse what is computed row by row and has no matrix product or recurrence to go with.

    Chains of element-wise ops, norms, gathers, sums and selections over rows of one number become one region, which
    goes through memory once.

    Before::

        %s = silu(%gate) : f32[B, L, 64]
        %gated = mul(%x, %s) : f32[B, L, 64]
        %y = rms_norm(%gated, %weight) {eps=1e-05} : f32[B, L, 64]

    After::

        %y = fused([%gate, %x, %weight]) {kind="rows"} : f32[B, L, 64] {
          ...
        }
    """

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        constant = constant_values(graph)
        for node in graph.nodes:
            growth = Growth(graph, constant, [node])
            if node in graph.places and is_rowwise(node) and growth.is_free(node):
                graph = self._fuse(growth, ctx)
        return graph

    def _fuse(self, growth: Growth, ctx: PassContext) -> Graph:
        (first,) = growth.members
        value = first.results[0]
        count = product(value.shape[: max(value.type.rank - 1, 1)])

        def same_rows(node: Node) -> bool:
            return is_rowwise(node) and all(has_rows(v, count) for v in node.results)

        growth.absorb_consumers(value, same_rows)
        growth.absorb_sides(same_rows)
        return make_region(growth, ctx, self.name, "rows")
