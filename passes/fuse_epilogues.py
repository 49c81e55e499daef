"""What stands around matrix products."""

from dataclasses import dataclass

from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import (
    Attention,
    CacheWrite,
    GroupedLinear,
    Linear,
    RmsNorm,
    RoundToInt8,
    TakeLast,
)
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext
from nemoc.passes.growth import (
    PRODUCTS,
    Facts,
    Growth,
    elements,
    is_elementwise,
    is_narrowing,
    make_region,
)


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Fuse matrix products with what comes before and behind them.

    - Behind (`epilogues`): whatever works element by element on the product (bias, activation, cast, residual sum, a
      scale), quantizing it tile by tile, and writing its rows to a cache. It happens in registers. All products get
      theirs before any of them looks at what comes before it, since an epilogue costs nothing.
    - Before (`prologues`): a norm of the rows, rounding them, choosing the last row, element-wise ops. Each product
      that reads a norm computes it again.
    - Beside (`sums`): a product that is as wide and is added to this one.

    Attention, two products over the cache, takes the casts around it and nothing else: queries that are widened for it
    before, and the rounding of its result behind.

    Before::

        %normed = rms_norm(%h, %weight) {eps=1e-05} : f32[B, L, 64]
        %up = linear(%normed, %w) : f32[B, L, 256]
        %active = silu(%up) : f32[B, L, 256]
        %down = linear(%active, %v) : f32[B, L, 64]
        %y = add(%h, %down) : f32[B, L, 64]

    After::

        %active = fused([%h, %weight, %w]) {kind="linear"} : f32[B, L, 256] {
          ...
        }
        %y = fused([%active, %v, %h]) {kind="linear"} : f32[B, L, 64] {
          ...
        }
    """

    epilogues: bool = True
    prologues: bool = True
    sums: bool = True

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        facts = Facts.of(graph)
        # In order: what lies between two products is the first one's epilogue before the second looks at it.
        for node in graph.nodes:
            growth = Growth(graph, facts, [node])
            if isinstance(node.op, PRODUCTS) and node in graph.places:
                graph = self._fuse(growth, ctx)
            elif isinstance(node.op, Attention):
                graph = self._fuse_casts(growth, ctx)
        return graph

    def _fuse_casts(self, growth: Growth, ctx: PassContext) -> Graph:
        """An op with the casts around it."""
        (node,) = growth.members
        if self.epilogues:
            growth.absorb_consumers(node.results[0], is_narrowing)
        if self.prologues:
            for value in node.op.operands():
                growth.absorb_producers(value, lambda _: False)
        return make_region(growth, ctx, self.name, "attention")

    def _fuse(self, growth: Growth, ctx: PassContext) -> Graph:
        (node,) = growth.members
        (result,) = node.results
        op = node.op
        assert isinstance(op, Linear | GroupedLinear)

        def behind(node: Node) -> bool:
            if isinstance(node.op, CacheWrite):
                return elements(node.op.rows) == elements(result)
            alike = is_elementwise(node) and elements(node.results[0]) == elements(result)
            return alike or growth.is_tilewise(node, result)

        def beside(node: Node) -> bool:
            if isinstance(node.op, Linear):
                same = (node.op.width, node.op.interleave) == (op.width, op.interleave)
                return self.sums and same
            return is_elementwise(node) and elements(node.results[0]) == elements(result)

        if self.epilogues:
            growth.absorb_consumers(result, behind)
            growth.absorb_sides(beside)
        if self.prologues:
            products = [n.op for n in growth.members if isinstance(n.op, PRODUCTS)]
            for product in products:
                growth.absorb_producers(
                    product.x,
                    lambda n: _is_prologue(n) and not self._is_epilogue(growth, n),
                    copies=lambda n: self._is_repeated(growth, n),
                )
        return make_region(growth, ctx, self.name, "linear")

    def _is_epilogue(self, growth: Growth, node: Node) -> bool:
        """Whether a node rounds what becomes of a product's elements: the product takes it, even if it comes later."""
        return self.epilogues and is_narrowing(node) and growth.is_epilogue(node)

    def _is_repeated(self, growth: Growth, node: Node) -> bool:
        """Whether products alone read a node: if all of them compute it again, nobody has to store it."""
        return _is_prologue(node) and all(_only_products(growth, v) for v in node.results)


def _is_prologue(node: Node) -> bool:
    return is_elementwise(node) or isinstance(node.op, RmsNorm | RoundToInt8 | TakeLast)


def _only_products(growth: Growth, value: Value) -> bool:
    """Whether everything that reads a value, if by way of element-wise ops, is a product that no region has."""
    if value in growth.graph.results:
        return False
    for user in growth.graph.uses.get(value, ()):
        if isinstance(user.op, PRODUCTS):
            if user.op.x is not value:
                return False
        elif not (
            (user.op.is_view or is_elementwise(user)) and _only_products(growth, user.results[0])
        ):
            return False
    return True
