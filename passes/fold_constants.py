"""Constants computed when the artifact is built, not in every step."""

from dataclasses import dataclass

from nemoc.ir.builder import Builder
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import Folded, Full
from nemoc.ir.region import append_to_body
from nemoc.ir.rewrite import rebuild
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.constants import constant_values
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Gather what parameters alone determine into `folded` regions.

    Each value that escapes to the rest of the graph becomes one region with all that leads to it, up to
    the parameters, which stay parameters; a region inside a larger one is merged into it. What leads to
    several escaping values is in each of their regions: it is computed again when the artifact is built, and never in a
    step. A `full` stays as it is, since kernels write its value as a literal; and so does what unpacks a weight, if the
    target's kernels do that as they read it.

    Before::

        %w = interleave(%weight) {block=8} : bf16[32, 64, 8]
        %y = linear(%x, %w) {interleave=8, features=256} : f32[B, 256]

    After::

        %w = folded([%weight]) : bf16[32, 64, 8] {
          input %p: bf16[256, 64]

          %interleave = interleave(%p) {block=8} : bf16[32, 64, 8]
          return %interleave
        }
        %y = linear(%x, %w) {interleave=8, features=256} : f32[B, 256]
    """

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        constant = constant_values(graph, ctx.target.packed_weights)
        computed = constant - set(graph.params)
        escaping = set(graph.results) & computed
        for node in graph.nodes:
            if computed.isdisjoint(node.results):
                escaping.update(computed.intersection(node.op.operands()))
        regions: dict[Node, tuple[Node, ...]] = {}
        for node in graph.nodes:
            wanted = [v for v in node.results if v in escaping]
            if wanted:
                regions[node] = self._fold(graph, node, wanted, ctx)
        if not any(regions.values()):
            return graph
        # A value that was not folded keeps what it needs.
        needed = set(graph.results)
        nodes: list[Node] = []
        for node in reversed(graph.nodes):
            kept = regions.get(node, ())
            lost = needed.intersection(node.results).difference(*(k.results for k in kept))
            if lost or computed.isdisjoint(node.results):
                kept = (node,)
            needed.update(v for k in kept for v in k.op.operands())
            nodes.extend(reversed(kept))
        return rebuild(graph, reversed(nodes))

    def _fold(
        self, graph: Graph, node: Node, wanted: list[Value], ctx: PassContext
    ) -> tuple[Node, ...]:
        """The regions that take a node's place, one for each wanted result; none where it stays."""
        slice_ = _slice(graph, node)
        if isinstance(node.op, Full) or (slice_ == [node] and isinstance(node.op, Folded)):
            return ()
        site = f"{graph.name}/%{wanted[0].name}"
        ops = ", ".join(n.op.mnemonic() for n in slice_)
        saved = sum((n.op.cost() for n in slice_[1:]), slice_[0].op.cost())
        if not ctx.allows(Remark(self.name, site, f"folded {ops}", saved)):
            return ()
        return tuple(Node(_region(graph, slice_, v), (v,), node.location) for v in wanted)


def _slice(graph: Graph, last: Node) -> list[Node]:
    """The nodes that lead to a node and it, in order of execution."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in found:
            return
        for operand in node.op.operands():
            if operand in graph.producers:
                visit(graph.producers[operand])
        found[node] = None

    visit(last)
    return list(found)


def _region(graph: Graph, nodes: list[Node], value: Value) -> Folded:
    """A region over the parameters that the nodes read; regions among the nodes are inlined."""
    body = Builder("body")
    produced = {v for node in nodes for v in node.results}
    params = dict.fromkeys(v for n in nodes for v in n.op.operands() if v not in produced)
    moved = {
        p: body.input("p" if len(params) == 1 else f"p{i}", p.dtype, p.shape)
        for i, p in enumerate(params)
    }
    for node in nodes:
        append_to_body(node, body, moved, Folded)
    return Folded(tuple(params), body.finish((moved[value],)))
