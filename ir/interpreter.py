"""The interpreter: a graph executed op by op in eager torch. The oracle of every rewrite and kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nemoc.ir.dims import evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Env
from nemoc.ir.region import evaluate_op
from nemoc.ir.types import Value

Observer = Callable[[Node, tuple[torch.Tensor, ...]], None]
"""Called after each node with its results."""


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        outputs: the graph's outputs in order.
        states: the next state by name.
    """

    outputs: tuple[torch.Tensor, ...]
    states: dict[str, torch.Tensor]


def interpret(
    graph: Graph,
    arguments: Mapping[str, torch.Tensor],
    float64: bool = False,
    observe: Observer | None = None,
) -> StepResult:
    """Execute a graph.

    Args:
        graph: a verified graph.
        arguments: a tensor for each input, parameter and state, by name. They are not changed. Only those looked up are
            touched, so a lazy mapping loads each weight when its turn comes.
        float64: evaluate all floating-point values in float64 and round nothing.
        observe: called after each node.

    Raises:
        IRError: an argument is missing, or its type or shape does not fit.
    """
    env = Env(bind_sizes(graph, arguments), float64)
    memory = _Memory(graph, arguments, env)
    for node in graph.nodes:
        memory.load(node.op.operands())
        results = evaluate_op(node.op, env, memory.values)
        if observe is not None:
            observe(node, results)
        memory.advance(node, results)
    memory.load(graph.results)
    return StepResult(
        tuple(memory.values[v] for v in graph.outputs),
        {s.name: memory.values[n] for s, n in zip(graph.states, graph.next_states, strict=True)},
    )


class _Memory:
    """The tensors that are alive: arguments from their first use, every value until its last."""

    def __init__(self, graph: Graph, arguments: Mapping[str, torch.Tensor], env: Env) -> None:
        self.values: dict[Value, torch.Tensor] = {}
        self._graph = graph
        self._arguments = arguments
        self._loadable = set(graph.arguments)
        self._env = env
        self._uses = _use_counts(graph)

    def load(self, values: tuple[Value, ...]) -> None:
        """Read those of the values that are arguments and not here yet."""
        for value in values:
            if value in self._loadable and value not in self.values:
                tensor = _argument(self._graph, value, self._arguments)
                _check_shape(self._graph, value, tensor, self._env.sizes)
                self.values[value] = tensor.to(self._env.torch(value.dtype))

    def advance(self, node: Node, results: tuple[torch.Tensor, ...]) -> None:
        """Take in a node's results and drop what nobody reads any more."""
        self.values.update(zip(node.results, results, strict=True))
        for value in node.op.operands():
            self._uses[value] -= 1
        for value in (*node.op.operands(), *node.results):
            if self._uses.get(value, 0) == 0:
                self.values.pop(value, None)


def bind_sizes(graph: Graph, arguments: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The value of each dimension symbol, and a check of the inputs' and states' types and shapes.

    Parameters are checked as they are loaded.

    Raises:
        IRError: an argument is missing or does not fit.
    """
    sizes: dict[str, int] = {}
    for value in (*graph.inputs, *graph.states):
        tensor = _argument(graph, value, arguments)
        for expected, found in zip(value.shape, tensor.shape, strict=True):
            if not isinstance(expected, int) and expected.is_Symbol:
                sizes.setdefault(expected.name, found)
    for value in (*graph.inputs, *graph.states):
        _check_shape(graph, value, arguments[value.name], sizes)
    return sizes


def _check_shape(
    graph: Graph, value: Value, tensor: torch.Tensor, sizes: Mapping[str, int]
) -> None:
    wanted = [evaluate_dim(d, sizes) for d in value.shape]
    if list(tensor.shape) != wanted:
        raise IRError(
            f"{graph.name}: %{value.name} has shape {list(tensor.shape)}, expected {wanted} "
            f"({value.type} with {dict(sizes)})"
        )


def _argument(graph: Graph, value: Value, arguments: Mapping[str, torch.Tensor]) -> torch.Tensor:
    try:
        tensor = arguments[value.name]
    except KeyError:
        raise IRError(f"{graph.name}: no tensor for %{value.name}: {value.type}") from None
    dtype = DType.of(tensor)
    if dtype != value.dtype and not (dtype == DType.F64 and value.dtype.is_float):
        raise IRError(f"{graph.name}: %{value.name} is {dtype}, expected {value.dtype}")
    if tensor.dim() != value.type.rank:
        raise IRError(
            f"{graph.name}: %{value.name} has {tensor.dim()} dimensions, expected {value.type}"
        )
    return tensor


def _use_counts(graph: Graph) -> dict[Value, int]:
    """How often each value is still read; results of the graph never run out."""
    counts: dict[Value, int] = {}
    for node in graph.nodes:
        for value in node.op.operands():
            counts[value] = counts.get(value, 0) + 1
    for value in graph.results:
        counts[value] = counts.get(value, 0) + len(graph.nodes) + 1
    return counts
