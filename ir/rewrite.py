"""Rewriting: rules as data, one driver, and copying graphs with changes.

A rule looks at one node whose operands are final and may answer with values that take its results' place. The
laws of rules: directional (the right side is never worse by the op costs), local (operands and their
producers, nothing behind), and named, so that a remark can say which one fired.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from nemoc.ir.builder import Builder
from nemoc.ir.dims import Dim, substitute_dim
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.types import Value


class Rewriter(Builder):
    """A builder that a rule uses to look at producers and to add ops."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._producer: dict[Value, Node] = {}

    def node(self, value: Value) -> Node | None:
        """The node that defines a value in the new graph; none for arguments."""
        return self._producer.get(value)

    def producer(self, value: Value) -> Op | None:
        """The op that defines a value in the new graph; none for arguments."""
        node = self.node(value)
        return None if node is None else node.op

    def all(self, op: Op, *names: str, location: str = "") -> tuple[Value, ...]:
        results = super().all(op, *names, location=location)
        self._note(self._nodes[-1])
        return results

    def keep(self, node: Node) -> None:
        """Append a node of the graph being rewritten; its values keep their names."""
        self._nodes.append(node)
        self._note(node)

    def mark(self) -> int:
        """The present place, for `since` and `rewind`."""
        return len(self._nodes)

    def since(self, mark: int) -> tuple[Node, ...]:
        """The nodes appended since a mark."""
        return tuple(self._nodes[mark:])

    def rewind(self, mark: int) -> None:
        """Take back the nodes appended since a mark."""
        for node in self._nodes[mark:]:
            for value in node.results:
                del self._producer[value]
        del self._nodes[mark:]

    def settle(self, mark: int, old: Node, values: tuple[Value, ...]) -> tuple[Value, ...]:
        """Let nodes appended since a mark define the values of the node that they replace.

        So names survive a rewrite. Returns what now stands for each old result: itself, or a value
        that was there before.
        """
        created = {v for node in self._nodes[mark:] for v in node.results}
        place: dict[Value, Value] = {}
        for result, value in zip(old.results, values, strict=True):
            if value in created:
                place.setdefault(value, result)
        nodes = self._nodes[mark:]
        self.rewind(mark)
        for node in nodes:
            op = node.op.map_operands(lambda v: place.get(v, v))
            results = tuple(place.get(v, v) for v in node.results)
            self.keep(Node(op, results, node.location or old.location))
        return tuple(place.get(v, v) for v in values)

    def _note(self, node: Node) -> None:
        for value in node.results:
            self._producer[value] = node


Replacement = Value | tuple[Value, ...] | None
"""The values that take the results' place, or none when a rule does not apply."""


@dataclass(frozen=True)
class Rule:
    """A named local rewrite.

    Attributes:
        name: kebab-case, said in remarks.
        root: the op class (or classes) it looks at.
        apply: `(op, rewriter) -> replacement`; may add ops through the rewriter.
    """

    name: str
    root: type[Op] | tuple[type[Op], ...]
    apply: Callable[[Op, Rewriter], Replacement]


def rewrite(
    graph: Graph,
    rules: Sequence[Rule],
    on_apply: Callable[[Rule, Node], bool | None] | None = None,
    fuel: int = 64,
) -> Graph:
    """Apply rules until none fires, visiting nodes in order.

    Args:
        graph: what to rewrite.
        rules: tried in order at each node; the first that answers wins.
        on_apply: asked before a replacement is taken; a false answer (not None) refuses it.
        fuel: the most sweeps over the graph.

    Returns:
        The same object when no rule fired. Nodes that lost all uses are still there; `dce` removes them.

    Raises:
        IRError: the rules still fire after `fuel` sweeps, or a replacement has another type.
    """
    for _ in range(fuel):
        changed = _sweep(graph, rules, on_apply)
        if changed is graph:
            return graph
        graph = changed
    raise IRError(
        f"{graph.name}: the rules {[r.name for r in rules]} still fire after {fuel} sweeps"
    )


def _sweep(
    graph: Graph,
    rules: Sequence[Rule],
    on_apply: Callable[[Rule, Node], bool | None] | None,
) -> Graph:
    rewriter = Rewriter(graph.name)
    rewriter.adopt(graph)
    for node in graph.nodes:  # a rule's new values must not take the name of a node still to come
        for value in node.results:
            rewriter.fresh(value.name)
    moved: dict[Value, Value] = {}
    fired = False
    for node in graph.nodes:
        op = node.op.map_operands(lambda v: moved.get(v, v))
        current = node if op is node.op else Node(op, node.results, node.location)
        replacement = _first(current, rules, rewriter, on_apply)
        if replacement is None:
            rewriter.keep(current)
            continue
        fired = True
        moved.update(zip(node.results, replacement, strict=True))
    if not fired:
        return graph
    return rewriter.finish(
        (moved.get(v, v) for v in graph.outputs), (moved.get(v, v) for v in graph.next_states)
    )


def _first(
    node: Node,
    rules: Sequence[Rule],
    rewriter: Rewriter,
    on_apply: Callable[[Rule, Node], bool | None] | None,
) -> tuple[Value, ...] | None:
    for rule in rules:
        if not isinstance(node.op, rule.root):
            continue
        mark = rewriter.mark()
        found = rule.apply(node.op, rewriter)
        if found is None:
            rewriter.rewind(mark)
            continue
        values = found if isinstance(found, tuple) else (found,)
        old, new = [v.type for v in node.results], [v.type for v in values]
        if old != new:
            raise IRError(
                f"rule {rule.name} replaces {', '.join(map(str, old))} by {', '.join(map(str, new))}",
                node.location,
            )
        if on_apply is not None and on_apply(rule, node) is False:
            rewriter.rewind(mark)
            continue
        return rewriter.settle(mark, node, values)
    return None


def rebuild(
    graph: Graph,
    nodes: Iterable[Node],
    replace: Mapping[Value, Value] | None = None,
) -> Graph:
    """The graph with other nodes, and results replaced by `replace`; operands are taken as given."""
    table = replace or {}
    return Graph(
        name=graph.name,
        inputs=graph.inputs,
        nodes=tuple(nodes),
        outputs=tuple(table.get(v, v) for v in graph.outputs),
        params=graph.params,
        states=graph.states,
        next_states=tuple(table.get(v, v) for v in graph.next_states),
    )


def substitute_dims(graph: Graph, mapping: Mapping[str, Dim], name: str = "") -> Graph:
    """The graph with dimension symbols replaced in every type, bound and shape attribute.

    Raises:
        IRError: an op does not hold for the new dimensions.
    """
    moved: dict[Value, Value] = {}

    def move(value: Value) -> Value:
        bound = None if value.bound is None else substitute_dim(value.bound, mapping)
        moved[value] = Value(value.name, value.type.substitute(mapping), bound)
        return moved[value]

    arguments = [tuple(map(move, kind)) for kind in (graph.inputs, graph.params, graph.states)]
    nodes = []
    for node in graph.nodes:
        op = _substitute_attributes(node.op.map_operands(moved.__getitem__), mapping)
        try:
            types = op.result_types()
        except IRError as error:
            raise error.at(node.location or f"{graph.name}/%{node.results[0].name}") from None
        for value, type_ in zip(node.results, types, strict=True):
            moved[value] = Value(value.name, type_)
        nodes.append(Node(op, tuple(moved[v] for v in node.results), node.location))
    return Graph(
        name=name or graph.name,
        inputs=arguments[0],
        nodes=tuple(nodes),
        outputs=tuple(moved[v] for v in graph.outputs),
        params=arguments[1],
        states=arguments[2],
        next_states=tuple(moved[v] for v in graph.next_states),
    )


def _substitute_attributes(op: Op, mapping: Mapping[str, Dim]) -> Op:
    changes: dict[str, Any] = {}
    for field, value in op.attributes().items():
        new = value
        if isinstance(value, Graph):
            new = substitute_dims(value, mapping)
        elif isinstance(value, sympy.Expr):
            new = substitute_dim(value, mapping)
        elif isinstance(value, tuple) and any(isinstance(d, sympy.Expr) for d in value):
            new = tuple(substitute_dim(d, mapping) for d in value)
        if new is not value:
            changes[field] = new
    return dataclasses.replace(op, **changes) if changes else op
