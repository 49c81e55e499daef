"""Parts of a graph as graphs, to be run by themselves."""

from collections.abc import Sequence

from nemoc.ir.graph import Graph, Node
from nemoc.ir.types import Value


def cut(graph: Graph, nodes: Sequence[Node], name: str) -> Graph:
    """Some nodes as a graph: values from elsewhere are inputs, those that others need are outputs."""
    inside = set(nodes)
    made = {v for node in nodes for v in node.results}
    read = dict.fromkeys(v for node in nodes for v in node.op.operands() if v not in made)
    pairs = [
        (state, following if following in made else state)
        for state, following in zip(graph.states, graph.next_states, strict=True)
        if state in read or following in made
    ]
    updated = {following for _, following in pairs}

    def leaves(value: Value) -> bool:
        users = graph.uses.get(value, ())
        return value in graph.outputs or any(n not in inside for n in users)

    return Graph(
        name,
        inputs=tuple(v for v in read if v not in graph.params and v not in graph.states),
        nodes=tuple(nodes),
        outputs=tuple(v for n in nodes for v in n.results if leaves(v) and v not in updated),
        params=tuple(v for v in graph.params if v in read),
        states=tuple(state for state, _ in pairs),
        next_states=tuple(following for _, following in pairs),
    )
