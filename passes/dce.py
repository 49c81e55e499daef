"""Dead code."""

import dataclasses
from dataclasses import dataclass

from nemoc.ir.graph import Graph, Node
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class Dce(Pass):
    """Remove ops whose results nobody needs, and parameters that nobody reads.

    Inputs and states stay: they belong to the caller.

    Before::

        %a = silu(%x) : f32[B, 8]
        %b = exp(%x) : f32[B, 8]
        return %b

    After::

        %b = exp(%x) : f32[B, 8]
        return %b
    """

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        needed: set[Value] = set(graph.results)
        nodes: list[Node] = []
        for node in reversed(graph.nodes):
            if needed.isdisjoint(node.results):
                site = f"{graph.name}/%{node.results[0].name}"
                message = f"{node.op.mnemonic()} is never read"
                if ctx.allows(Remark(self.name, site, message, node.op.cost())):
                    continue
            needed.update(node.op.operands())
            nodes.append(node)
        params = tuple(p for p in graph.params if p in needed)
        if len(nodes) == len(graph.nodes) and len(params) == len(graph.params):
            return graph
        return dataclasses.replace(graph, nodes=tuple(reversed(nodes)), params=params)
