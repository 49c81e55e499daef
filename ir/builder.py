"""Building graphs op by op."""

from collections.abc import Iterable

from nemoc.ir.dims import Dim, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.types import TensorType, Value


class Builder:
    """Collects arguments and nodes and gives every value a unique name.

    `b(op)` appends an op with one result and returns it; `b.all(op)` returns the results of any op. Types are
    inferred, so a misfit is raised where it is built.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: list[Value] = []
        self._params: list[Value] = []
        self._states: list[Value] = []
        self._nodes: list[Node] = []
        self._names: dict[str, int] = {}

    def input(
        self, name: str, dtype: DType, shape: Iterable[Dim], bound: Dim | None = None
    ) -> Value:
        """A new input; `bound` is the exclusive upper bound of integer elements."""
        return self._argument(self._inputs, name, TensorType.of(dtype, shape), bound)

    def param(self, name: str, dtype: DType, shape: Iterable[Dim]) -> Value:
        """A new parameter."""
        return self._argument(self._params, name, TensorType.of(dtype, shape), None)

    def state(
        self, name: str, dtype: DType, shape: Iterable[Dim], bound: Dim | None = None
    ) -> Value:
        """A new state; `finish` is told its next value."""
        return self._argument(self._states, name, TensorType.of(dtype, shape), bound)

    def adopt(self, graph: Graph) -> None:
        """Take over another graph's arguments as they are; before any node is added."""
        self._inputs.extend(graph.inputs)
        self._params.extend(graph.params)
        self._states.extend(graph.states)
        for value in graph.arguments:
            self._claim(value.name)

    def is_argument(self, value: Value) -> bool:
        """Whether a value is an input, a parameter or a state, not what a node makes."""
        return value in (*self._inputs, *self._params, *self._states)

    def __call__(self, op: Op, name: str = "") -> Value:
        """Append an op that has one result.

        Raises:
            IRError: the op does not fit its operands, or has several results.
        """
        results = self.all(op, name)
        if len(results) != 1:
            raise IRError(f"{op.mnemonic()} has {len(results)} results, expected one")
        return results[0]

    def all(self, op: Op, *names: str, location: str = "") -> tuple[Value, ...]:
        """Append an op; `names` are hints for its results, made unique.

        Raises:
            IRError: the op does not fit its operands.
        """
        types = op.result_types()
        hints = [*names, *([""] * (len(types) - len(names)))]
        results = tuple(
            Value(self.fresh(hint or "v"), t) for hint, t in zip(hints, types, strict=True)
        )
        self._nodes.append(Node(op, results, location))
        return results

    def fresh(self, hint: str) -> str:
        """A name that is not taken: the hint, or the hint with a number behind it."""
        name = hint
        while name in self._names:
            self._names[hint] += 1
            name = f"{hint}.{self._names[hint]}"
        self._claim(name)
        return name

    def finish(self, outputs: Iterable[Value], next_states: Iterable[Value] = ()) -> Graph:
        """The graph; `next_states` in the order in which the states were declared.

        Raises:
            IRError: the number of next states is not that of the states.
        """
        following = tuple(next_states)
        if len(following) != len(self._states):
            raise IRError(
                f"{self.name}: {len(following)} next states for {len(self._states)} states"
            )
        return Graph(
            name=self.name,
            inputs=tuple(self._inputs),
            nodes=tuple(self._nodes),
            outputs=tuple(outputs),
            params=tuple(self._params),
            states=tuple(self._states),
            next_states=following,
        )

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise IRError(f"{self.name}: the name %{name} is taken")
        self._names[name] = 0

    def _argument(
        self, kind: list[Value], name: str, type_: TensorType, bound: Dim | None
    ) -> Value:
        self._claim(name)
        value = Value(name, type_, None if bound is None else dim(bound))
        kind.append(value)
        return value
