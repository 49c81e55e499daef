"""Common subexpressions computed once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.rewrite import rebuild
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class Cse(Pass):
    """Compute each expression once.

    Ops have no effects, so two with equal operands and attributes have equal results.

    Before::

        %a = silu(%x) : f32[B, 8]
        %b = silu(%x) : f32[B, 8]
        %c = mul(%a, %b) : f32[B, 8]

    After::

        %a = silu(%x) : f32[B, 8]
        %c = mul(%a, %a) : f32[B, 8]
    """

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        first: dict[Any, Node] = {}
        moved: dict[Value, Value] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            op = node.op.map_operands(lambda v: moved.get(v, v))
            current = node if op is node.op else Node(op, node.results, node.location)
            known = first.setdefault(_key(op), current)
            site = f"{graph.name}/%{node.results[0].name}"
            message = f"the same as %{known.results[0].name}"
            if known is current or not ctx.allows(Remark(self.name, site, message, op.cost())):
                nodes.append(current)
            else:
                moved.update(zip(node.results, known.results, strict=True))
        return rebuild(graph, nodes, moved) if moved else graph


def _key(op: Op) -> Any:
    """Equal for ops that compute the same bits: `==` on ops takes 0.0 and −0.0 for equal, this does not."""
    return op, tuple(_signs(op))


def _signs(op: Op) -> Iterator[float]:
    for value in op.attributes().values():
        if isinstance(value, float):
            yield math.copysign(1.0, value)
