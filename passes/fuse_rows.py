"""What is left between the heavy ops."""

from dataclasses import dataclass

from nemoc.ir.dims import Dim, product
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import Sum
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext
from nemoc.passes.growth import Facts, Growth, has_rows, is_rowwise, make_region


@dataclass(frozen=True)
class FuseRows(Pass):
    """Fuse what is computed row by row and has no matrix product or recurrence to go with.

    Chains of element-wise ops, norms, gathers, sums and selections over rows of one number become one region, which
    goes through memory once. So do sums over neighbouring rows, which leave fewer, with what follows them, if nothing
    else reads the rows.

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
        facts = Facts.of(graph)
        for node in graph.nodes:
            growth = Growth(graph, facts, [node])
            if node in graph.places and is_rowwise(node) and growth.is_free(node):
                graph = self._fuse(growth, ctx)
        return graph

    def _fuse(self, growth: Growth, ctx: PassContext) -> Graph:
        (first,) = growth.members
        value = first.results[0]
        counts = _row_counts(growth, value)

        def same_rows(node: Node) -> bool:
            return is_rowwise(node) and all(
                any(has_rows(v, count) for count in counts) for v in node.results
            )

        growth.absorb_consumers(value, same_rows)
        growth.absorb_sides(same_rows)
        return make_region(growth, ctx, self.name, "rows")


def _row_counts(growth: Growth, value: Value) -> list[Dim]:
    """How many rows a value has, and how many are left behind each sum over them that everything ends in."""
    counts = [product(value.shape[: max(value.type.rank - 1, 1)])]
    while (node := _only_reader(growth, value)) is not None and is_rowwise(node):
        if isinstance(node.op, Sum) and node.op.axis > 0:
            shape, axis = node.op.x.shape, node.op.axis
            if isinstance(shape[axis], int) and product(shape[: axis + 1]) == counts[-1]:
                counts.append(product(shape[:axis]))
        value = node.results[0]
    return counts


def _only_reader(growth: Growth, value: Value) -> Node | None:
    """The one node that reads a value, if by way of views; none if there are more."""
    graph = growth.graph
    while value not in graph.results and len(users := graph.uses.get(value, ())) == 1:
        (node,) = users
        if not node.op.is_view:
            return node
        (value,) = node.results
    return None
