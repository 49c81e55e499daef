"""Graphs: ordered SSA nodes over inputs, parameters and state."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nemoc.ir.dims import symbols_of
from nemoc.ir.op import Op
from nemoc.ir.printer import print_canonical, print_graph
from nemoc.ir.types import Value


@dataclass(frozen=True, eq=False)
class Node:
    """One op applied once, and the values that it defines.

    Attributes:
        op: the op with its operands.
        results: the values it defines, one per type that `op.infer` gives.
        location: `file:line` of the text it was read from, or empty.
    """

    op: Op
    results: tuple[Value, ...]
    location: str = ""


@dataclass(frozen=True, eq=False)
class Graph:
    """A function from inputs, parameters and state to outputs and the next state.

    Nodes stand in an order in which every operand is defined before its use. Graphs are immutable; a pass
    builds a new one that shares unchanged nodes. `==` compares structure: names of inputs, parameters and states count,
    names of other values and locations do not.

    Attributes:
        name: what the function is called.
        inputs: values that the caller passes for one step.
        params: weights; their data lives outside the graph, found by name.
        states: values that live from step to step.
        nodes: the ops in execution order.
        outputs: what the step returns.
        next_states: for each state, its value after the step.
    """

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    params: tuple[Value, ...] = ()
    states: tuple[Value, ...] = ()
    next_states: tuple[Value, ...] = field(default=())

    @property
    def arguments(self) -> tuple[Value, ...]:
        """Every value that is defined outside: inputs, parameters, states."""
        return (*self.inputs, *self.params, *self.states)

    @property
    def results(self) -> tuple[Value, ...]:
        """Every value that is needed outside: outputs and next states."""
        return (*self.outputs, *self.next_states)

    def values(self) -> Iterator[Value]:
        """All values in order of definition."""
        yield from self.arguments
        for node in self.nodes:
            yield from node.results

    @cached_property
    def producers(self) -> dict[Value, Node]:
        """The node that defines each value; arguments have none."""
        return {value: node for node in self.nodes for value in node.results}

    @cached_property
    def places(self) -> dict[Node, int]:
        """The number of each node in the order."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def uses(self) -> Mapping[Value, Sequence[Node]]:
        """The nodes that read each value, in order; a value nobody reads is absent."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.op.distinct_operands:
                if value in found:
                    found[value].append(node)
                else:
                    found[value] = [node]
        return found

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Names of the dimension symbols in the types and bounds of the arguments."""
        names: set[str] = set()
        for value in self.arguments:
            names |= value.type.symbols
            if value.bound is not None:
                names |= symbols_of(value.bound)
        return frozenset(names)

    @cached_property
    def canonical_text(self) -> str:
        """The text with local values renamed in order of definition; equal for equal structure."""
        return print_canonical(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the structure, in hex."""
        return hashlib.sha256(self.canonical_text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.canonical_text == other.canonical_text

    def __hash__(self) -> int:
        return hash(self.canonical_text)

    def __str__(self) -> str:
        return print_graph(self)
