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
    sizes = bind_sizes(graph, arguments)
    env = Env(sizes, float64)
    remaining = _use_counts(graph)
    values: dict[Value, torch.Tensor] = {}

    def load(value: Value) -> None:
        tensor = _argument(graph, value, arguments)
        values[value] = tensor.to(env.torch(value.dtype))

    loadable = set(graph.arguments)
    for node in graph.nodes:
        operands = node.op.operands()
        for value in operands:
            if value in loadable and value not in values:
                load(value)
        results = evaluate_op(node.op, env, values)
        if observe is not None:
            observe(node, results)
        values.update(zip(node.results, results, strict=True))
        for value in operands:
            remaining[value] -= 1
            if remaining[value] == 0:
                values.pop(value, None)
        for value in node.results:
            if remaining.get(value, 0) == 0:
                del values[value]
    for value in graph.results:
        if value in loadable and value not in values:
            load(value)
    return StepResult(
        tuple(values[v] for v in graph.outputs),
        {s.name: values[n] for s, n in zip(graph.states, graph.next_states, strict=True)},
    )


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
        shape = tuple(arguments[value.name].shape)
        wanted = tuple(evaluate_dim(d, sizes) for d in value.shape)
        if shape != wanted:
            raise IRError(
                f"{graph.name}: %{value.name} has shape {list(shape)}, expected {list(wanted)} "
                f"({value.type} with {sizes})"
            )
    return sizes


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
