"""Which values are known before the first step: computed from parameters and constants alone."""

from nemoc.ir.graph import Graph, Node
from nemoc.ir.types import Value


def constant_values(graph: Graph, packed: bool = False) -> set[Value]:
    """Parameters, and every value computed from parameters and constants whose shape has no symbols.

    Args:
        graph: the graph.
        packed: take what unpacks a parameter for a part of the step.
    """
    constant = set(graph.params)
    for node in graph.nodes:
        if is_constant(node, constant) and not (packed and node.op.is_unpacking):
            constant.update(node.results)
    return constant


def is_constant(node: Node, constant: set[Value]) -> bool:
    """Whether a node reads constants only and has a fixed shape; ops have no other inputs."""
    fixed = not any(v.type.symbols for v in node.results)
    return fixed and all(v in constant for v in node.op.operands())
