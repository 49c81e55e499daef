"""A layer of routed experts in three regions."""

from dataclasses import dataclass

import sympy

from nemoc.ir.dims import Dim, product
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import GroupBy, GroupedLinear, Linear, RmsNorm, RoundToInt8, Sum, TakeRows
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.growth import (
    QUANTIZERS,
    Facts,
    Growth,
    Wanted,
    elements,
    has_rows,
    is_elementwise,
    is_narrowing,
    is_rowwise,
    make_region,
)


@dataclass(frozen=True)
class FuseMoeDispatch(Pass):
    """Fuse the choice of experts into one region, and what surrounds each product of experts into it.

    - The router (`route`): the product that scores experts and the norm before it, what is computed from a row of
      scores (sigmoid, bias, limits, the k best, their weights), and the sorting of the choices by expert. Where experts
      read the normed rows quantized, that too.
    - Products of experts (`experts`): rows are gathered inside the product that reads them, activations follow it, and
      so does what is picked for each row, such as its expert's scale.
    - The combination (`combine`): the outputs of a token's experts are weighted and summed in the product that makes
      them. With `shared` the product that is added to them, the shared expert's, belongs to the same region if it is as
      wide, and what follows element by element.

    Before::

        %logits = linear(%x, %gate) : f32[B*L, 8]
        %scores = sigmoid(%logits) : f32[B*L, 8]
        %chosen = top_k(%scores) {k=2} : i32[B*L, 2]
        %weights = take_along(%scores, %chosen) : f32[B*L, 2]
        %order, %position, %offsets = group_by(%chosen) {groups=8} : i32[2*B*L], i32[2*B*L], i32[9]
        %token = floor_div(%order) {divisor=2} : i32[2*B*L]
        %rows = take_rows(%x, %token) : f32[2*B*L, 16]
        %up = grouped_linear(%rows, %w, %offsets) : f32[2*B*L, 32]
        %active = relu(%up) : f32[2*B*L, 32]

    After::

        %weights, %position, %offsets, %token = fused([%x, %gate]) {kind="router"} : ... {
          ...
        }
        %active = fused([%x, %token, %w, %offsets]) {kind="experts"} : f32[2*B*L, 32] {
          ...
        }
    """

    route: bool = True
    experts: bool = True
    combine: bool = True
    shared: bool = True

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        facts = Facts.of(graph)
        nodes = graph.nodes
        for node in nodes:
            if isinstance(node.op, GroupBy) and self.route:
                graph = self._router(graph, facts, node, ctx)
        for node in nodes:
            if isinstance(node.op, GroupedLinear):
                graph = self._product(graph, facts, node, ctx)
        return graph

    def _router(self, graph: Graph, facts: Facts, sort: Node, ctx: PassContext) -> Graph:
        op = sort.op
        assert isinstance(op, GroupBy)
        growth = Growth(graph, facts, [sort])
        scored = _scored(growth, op.index)
        if isinstance(scored, str):
            site = f"{graph.name}/%{sort.results[0].name}"
            ctx.refuses(Remark(self.name, site, f"no router here: choices come from {scored}"))
            return graph
        scores, slots = scored.results[0], sort.results[:2]
        count = product(scores.shape[:-1])

        def of_a_token(node: Node) -> bool:
            """No more for each token than there are scores."""
            return is_rowwise(node) and all(
                has_rows(v, count) and _is_most(elements(scores), elements(v)) for v in node.results
            )

        def of_a_slot(node: Node) -> bool:
            return is_elementwise(node) and elements(node.results[0]) == elements(slots[0])

        def normed(node: Node) -> bool:
            return isinstance(node.op, RmsNorm) or is_narrowing(node)

        growth.absorb_producers(op.index, lambda n: n is scored or of_a_token(n), of_a_token)
        for node in growth.members:
            for value in node.results if node is not sort else ():
                growth.absorb_consumers(value, of_a_token)
        for slot in slots:
            growth.absorb_consumers(slot, of_a_slot)
        if scored in growth:
            growth.absorb_producers(scored.op.operands()[0], normed, shared=normed)
            for node in [n for n in growth.members if normed(n)]:
                growth.absorb_consumers(node.results[0], lambda n: isinstance(n.op, QUANTIZERS))
        return make_region(growth, ctx, self.name, "router")

    def _product(self, graph: Graph, facts: Facts, node: Node, ctx: PassContext) -> Graph:
        op, (result,) = node.op, node.results
        assert isinstance(op, GroupedLinear)
        growth = Growth(graph, facts, [node])
        combined = _combination(growth, result) if self.combine else []
        if combined and growth.add(*combined):
            (routed,) = combined[-1].results
            wanted = self._ending(op, routed)
            growth.absorb_consumers(routed, wanted)
            growth.absorb_sides(wanted)
            _absorb_gathers(growth, result)
            return make_region(growth, ctx, self.name, "combine")
        if not self.experts:
            return graph
        growth.absorb_consumers(
            result,
            lambda n: (
                (is_elementwise(n) and elements(n.results[0]) == elements(result))
                or growth.is_tilewise(n, result)
            ),
        )
        growth.absorb_sides(is_elementwise)
        _absorb_gathers(growth, result)
        growth.absorb_producers(
            op.x, lambda n: isinstance(n.op, TakeRows | RoundToInt8) or _is_index(n)
        )
        return make_region(growth, ctx, self.name, "experts")

    def _ending(self, op: GroupedLinear, routed: Value) -> Wanted:
        """What may follow the sum over experts, and be added to it."""

        def wanted(node: Node) -> bool:
            if isinstance(node.op, Linear):
                same = (node.op.width, node.op.interleave) == (op.width, op.interleave)
                return self.shared and same
            return is_elementwise(node) and elements(node.results[0]) == elements(routed)

        return wanted


def _scored(growth: Growth, index: Value) -> Node | str:
    """The product behind the choices of experts, or what stands in its place."""
    value = index
    while growth.is_free(node := growth.graph.producers.get(value)):
        assert node is not None
        if isinstance(node.op, Linear):
            return node
        if not (node.op.is_view or is_rowwise(node)):
            break
        value = node.op.operands()[0]
    return f"%{value.name}" if node is None else node.op.mnemonic()


def _combination(growth: Growth, value: Value) -> list[Node]:
    """The nodes that gather rows of a product by slot, weight them and sum over slots; none if they are not there.

    The product may be scaled or rounded before; then the rows are, too.
    """
    path: list[Node] = []
    gathered = False
    while len(readers := list(growth.readers(value))) == 1:
        path += readers[0]
        node = path[-1]
        if not gathered:
            gathered = isinstance(node.op, TakeRows) and node.op.index is not value
            same = is_elementwise(node) and elements(node.results[0]) == elements(value)
            if not gathered and not same:
                break
        elif isinstance(node.op, Sum):
            return path
        elif not is_elementwise(node):
            break
        (value,) = node.results
    return []


def _absorb_gathers(growth: Growth, result: Value) -> None:
    """Take in what is picked for each row of a product, such as its expert's scale."""
    rows = result.shape[0]
    picked = [
        value
        for node in growth.members
        if is_elementwise(node)
        for value in node.op.operands()
        if value.shape == (rows, 1)
    ]
    for value in picked:
        growth.absorb_producers(value, _is_gather, copies=_is_gather)


def _is_gather(node: Node) -> bool:
    return isinstance(node.op, TakeRows)


def _is_index(node: Node) -> bool:
    """Whether a node makes integers element by element."""
    return is_elementwise(node) and not node.results[0].dtype.is_float


def _is_most(most: Dim, size: Dim) -> bool:
    """Whether a size is at most another for all values of the symbols."""
    return bool(sympy.sympify(most - size).is_nonnegative)
