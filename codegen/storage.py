"""Where a program's weights and state lie: tensors by name, each at an offset of one block of memory.

Kernels are generated against these layouts, the artifact is written by them, and they are known before a
single weight is read. `bind_weights` turns whatever a step reads of the parameters, folded or plain, into the
parameters of equal graphs; after it, a parameter and a stored weight are the same thing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from nemoc.ir.dims import Dim, ceil_div, dim, evaluate_dim
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.region import Folded
from nemoc.ir.types import TensorType, Value

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: a cache line, and the widest vector."""


@dataclass(frozen=True)
class Slot:
    """One tensor in a block: dense, row-major, `offset` bytes from the block's start."""

    name: str
    type: TensorType
    offset: Dim


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other in a block, each aligned; sizes and offsets may be symbolic.

    Attributes:
        slots: the tensors in order of their offsets.
        bytes: the size of the block, a multiple of `ALIGNMENT`.
    """

    slots: tuple[Slot, ...]
    bytes: Dim

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, TensorType]]) -> "Layout":
        """The layout of tensors in the given order."""
        slots = []
        offset: Dim = 0
        for name, type_ in tensors:
            slots.append(Slot(name, type_, offset))
            offset = dim(offset + ALIGNMENT * ceil_div(type_.bytes, ALIGNMENT))
        return cls(tuple(slots), offset)

    def __getitem__(self, name: str) -> Slot:
        """The slot of a tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._by_name[name]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def at(self, sizes: Mapping[str, int]) -> "Layout":
        """The layout with every dimension symbol replaced by its size."""
        return Layout(
            tuple(
                Slot(
                    slot.name,
                    TensorType(
                        slot.type.dtype, tuple(evaluate_dim(d, sizes) for d in slot.type.shape)
                    ),
                    evaluate_dim(slot.offset, sizes),
                )
                for slot in self.slots
            ),
            evaluate_dim(self.bytes, sizes),
        )

    @cached_property
    def _by_name(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.slots}


@dataclass(frozen=True)
class Weight:
    """A tensor that a step reads and that is stored with the artifact.

    Attributes:
        name: its parameter name in bound graphs and its tensor name in the weight file.
        type: its type as stored; no dimension is symbolic.
        params: the model's parameters that it is made from.
        body: computes it from them, one input per parameter; none when it is the one parameter itself.
        result: which of the body's outputs it is.
    """

    name: str
    type: TensorType
    params: tuple[str, ...]
    body: Graph | None = None
    result: int = 0


def weight_layout(weights: Iterable[Weight]) -> Layout:
    """Where weights lie in the data of the weight file; offsets are plain integers."""
    return Layout.of((w.name, w.type) for w in weights)


def state_layout(graph: Graph) -> Layout:
    """Where a graph's states lie in the block of a state, in B and C."""
    return Layout.of((s.name, s.type) for s in graph.states)


def bind_weights(functions: Mapping[str, Graph]) -> tuple[dict[str, Graph], tuple[Weight, ...]]:
    """Functions whose parameters are exactly the weights that a step reads.

    Folded values become parameters, equal ones of different functions the same; parameters that only folding
    read are gone. Names of other values stay.

    Returns:
        The functions by name, and the weights in order of first use.

    Raises:
        IRError: a folded value is made from something that is no parameter.
    """
    weights: dict[str, Weight] = {}
    return {name: _bind(graph, weights) for name, graph in functions.items()}, tuple(
        weights.values()
    )


def _bind(graph: Graph, weights: dict[str, Weight]) -> Graph:
    params = set(graph.params)
    folded = {
        value: weight
        for node in graph.nodes
        if isinstance(node.op, Folded)
        for value, weight in _folded_weights(graph, node, node.op, params)
    }
    bound: dict[Value, Value] = {}
    by_name: dict[str, Value] = {}

    def bind(value: Value) -> Value:
        if value not in folded and value not in params:
            return value
        if value not in bound:
            weight = folded.get(value) or Weight(value.name, value.type, (value.name,))
            weights.setdefault(weight.name, weight)
            bound[value] = by_name.setdefault(weight.name, Value(weight.name, weight.type))
        return bound[value]

    nodes = tuple(
        Node(node.op.map_operands(bind), node.results, node.location)
        for node in graph.nodes
        if not isinstance(node.op, Folded)
    )
    return Graph(
        name=graph.name,
        inputs=graph.inputs,
        nodes=nodes,
        outputs=tuple(map(bind, graph.outputs)),
        params=tuple(by_name.values()),
        states=graph.states,
        next_states=tuple(map(bind, graph.next_states)),
    )


def _folded_weights(
    graph: Graph, node: Node, op: Folded, params: set[Value]
) -> Iterator[tuple[Value, Weight]]:
    for value in op.args:
        if value not in params:
            raise IRError(
                f"a folded value is made from %{value.name}, which is no parameter",
                node.location or f"{graph.name}/%{node.results[0].name}",
            )
    names = tuple(v.name for v in op.args)
    recipe = "\n".join((op.body.canonical_text, *names))
    origin = names[0] if names else "constant"
    stem = f"{origin}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    for index, value in enumerate(node.results):
        name = stem if len(node.results) == 1 else f"{stem}.{index}"
        yield value, Weight(name, value.type, names, op.body, index)
