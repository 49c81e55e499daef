"""What a model costs, in closed form, from its graph alone: parameters, state, arithmetic, traffic.

Everything is counted on the graph as it is built, before any pass: each op reads its operands and writes its
results once. Fusion saves some of the activations' traffic, never the weights' or the state's.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import sympy

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, dim, product, substitute_dim
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import GroupedLinear, TakeRows
from nemoc.ir.types import Value

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """The layers of one kind, or what surrounds the layers, or all together.

    Attributes:
        name: `mamba`, `moe`, ..., `embedding and head`, or `total`.
        layers: how many layers it stands for.
        parameters: elements of its weights.
        active: those of them that one token reads; of an embedding table, one row.
        cost: arithmetic and traffic of a step, in B, L, T and C.
    """

    name: str
    layers: int
    parameters: int
    active: int
    cost: Cost


@dataclass(frozen=True)
class Summary:
    """What `nemoc ir --summary` shows.

    Attributes:
        parts: by kind of layer, in order of first appearance.
        total: all parts together.
        state_bytes: bytes of the state of B rows with capacity C.
    """

    parts: tuple[Part, ...]
    total: Part
    state_bytes: Dim


def summarize(graph: Graph, kinds: tuple[str, ...]) -> Summary:
    """Count a step.

    Args:
        graph: a step over B rows of L tokens, as `nemoc.models` builds it.
        kinds: the kind of each layer; empty when they are not known, so that all is one part.
    """
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(_part_of(node.results[0], kinds), []).append(node)
    parameters: dict[str, list[Value]] = {}
    for param in graph.params:
        parameters.setdefault(_part_of(param, kinds), []).append(param)
    fractions = _active_fractions(graph)
    order = dict.fromkeys((*kinds, _OUTSIDE))
    parts = tuple(
        Part(
            name,
            kinds.count(name),
            sum(_elements(p) for p in parameters.get(name, ())),
            sum(int(_elements(p) * fractions.get(p, 1)) for p in parameters.get(name, ())),
            total_cost(nodes.get(name, ())),
        )
        for name in order
    )
    total = Part(
        "total",
        len(kinds),
        sum(part.parameters for part in parts),
        sum(part.active for part in parts),
        sum((part.cost for part in parts), Cost()),
    )
    return Summary(parts, total, dim(sum(state.type.bytes for state in graph.states)))


_OUTSIDE = "embedding and head"


def _part_of(value: Value, kinds: tuple[str, ...]) -> str:
    match = _LAYER.match(value.name)
    return kinds[int(match[1])] if match and kinds else _OUTSIDE


def _elements(value: Value) -> int:
    return int(product(value.shape))


def _active_fractions(graph: Graph) -> dict[Value, Fraction]:
    """The part of each weight that one token reads, where that is not all of it."""
    fractions: dict[Value, Fraction] = {}
    for node in graph.nodes:
        match node.op:
            case GroupedLinear(x=x, w=w):
                chosen = substitute_dim(x.shape[0], {"B": 1, "L": 1})
                fractions[_origin(graph, w)] = Fraction(int(chosen), int(w.shape[0]))
            case TakeRows(table=table) if table in graph.params:
                fractions[table] = Fraction(1, int(table.shape[0]))
    for node in graph.nodes:  # a table that is also the head's matrix is read whole
        if not isinstance(node.op, GroupedLinear | TakeRows):
            for value in node.op.operands():
                if value in fractions and value.type.rank == 2:
                    del fractions[value]
    return fractions


def _origin(graph: Graph, value: Value) -> Value:
    """The parameter that a value is a conversion of."""
    while value in graph.producers:
        value = graph.producers[value].op.operands()[0]
    return value


def total_cost(nodes: Iterable[Node]) -> Cost:
    """The cost of nodes together; equal costs are added up as one product, which sympy does quickly."""
    counted = Counter((c.flops, c.read, c.written) for c in (n.op.cost() for n in nodes))
    flops, read, written = (
        sympy.expand(sympy.Add(*(cost[i] * number for cost, number in counted.items())))
        for i in range(3)
    )
    return Cost(flops, read, written)


def per_token(cost: Cost) -> Cost:
    """The cost of a decode step of one row."""
    one = {"B": 1, "L": 1}
    return Cost(*(substitute_dim(c, one) for c in (cost.flops, cost.read, cost.written)))
