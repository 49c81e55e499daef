"""Constants computed when the artifact is built, not in every step."""

from dataclasses import dataclass

from nemoc.ir.builder import Builder
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import Folded, Full
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
    step. A `full` stays as it is, since kernels write its value as a literal.

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
        constant = constant_values(graph)
        computed = constant - set(graph.params)
        escaping = set(graph.results) & computed
        for node in graph.nodes:
            if computed.isdisjoint(node.results):
                escaping.update(computed.intersection(node.op.operands()))
        nodes: list[Node] = []
        for node in graph.nodes:
            if computed.isdisjoint(node.results):
                nodes.append(node)
                continue
            nodes.extend(self._fold(graph, node, v, ctx) for v in node.results if v in escaping)
        if len(nodes) == len(graph.nodes) and all(map(_same, nodes, graph.nodes)):
            return graph
        return rebuild(graph, nodes)

    def _fold(self, graph: Graph, node: Node, value: Value, ctx: PassContext) -> Node:
        slice_ = _slice(graph, value)
        if isinstance(node.op, Full) or (slice_ == [node] and isinstance(node.op, Folded)):
            return node
        site = f"{graph.name}/%{value.name}"
        ops = ", ".join(n.op.mnemonic() for n in slice_)
        saved = sum((n.op.cost() for n in slice_[1:]), slice_[0].op.cost())
        ctx.remarks.append(Remark(self.name, site, f"folded {ops}", saved))
        return Node(_region(graph, slice_, value), (value,), node.location)


def _same(new: Node, old: Node) -> bool:
    return new is old


def _slice(graph: Graph, value: Value) -> list[Node]:
    """The nodes that lead to a value, in order of execution."""
    found: dict[Node, None] = {}

    def visit(wanted: Value) -> None:
        node = graph.producers.get(wanted)
        if node is None or node in found:
            return
        for operand in node.op.operands():
            visit(operand)
        found[node] = None

    visit(value)
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
        _copy(node, body, moved)
    return Folded(tuple(params), body.finish((moved[value],)))


def _copy(node: Node, body: Builder, moved: dict[Value, Value]) -> None:
    if isinstance(node.op, Folded):
        inner = dict(zip(node.op.body.inputs, (moved[v] for v in node.op.args), strict=True))
        for inside in node.op.body.nodes:
            _copy(inside, body, inner)
        moved.update(zip(node.results, (inner[v] for v in node.op.body.outputs), strict=True))
        return
    op = node.op.map_operands(moved.__getitem__)
    names = [op.mnemonic()] * len(node.results)  # structure only: layers that fold alike look alike
    results = body.all(op, *names, location=node.location)
    moved.update(zip(node.results, results, strict=True))
