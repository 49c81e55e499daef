"""Random arguments for any graph: what checks and tests run it on.

Integers lie within their bounds (below 2 without one), and counts of valid tokens are at least 1. Every tensor
depends on the seed and its own name only, so two graphs with an argument in common get the same tensor for it.
"""

import zlib
from collections.abc import Iterator, Mapping

import torch

from nemoc.ir.dims import evaluate_dim
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op, operand_fields
from nemoc.ir.region import Region
from nemoc.ir.types import Value

DEFAULT_SIZES = {"B": 2, "L": 5, "C": 16}
"""Sizes for the symbols of model graphs, small and with a length that is no power of two."""


def sample_arguments(
    graph: Graph, sizes: Mapping[str, int] | None = None, seed: int = 0, params: bool = True
) -> dict[str, torch.Tensor]:
    """A tensor for each input, state and, if asked, parameter, by name.

    Args:
        graph: a verified graph.
        sizes: the integer behind each dimension symbol; `DEFAULT_SIZES` when left out, and 3 for
            symbols that it does not name.
        seed: another seed gives other tensors.
        params: parameters too; without, for graphs whose weights are at hand.
    """
    known = {name: DEFAULT_SIZES.get(name, 3) for name in graph.symbols} | dict(sizes or {})
    values = graph.arguments if params else (*graph.inputs, *graph.states)
    return {v.name: _sample(graph, v, known, seed) for v in values}


def _sample(graph: Graph, value: Value, sizes: Mapping[str, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{value.name}".encode()))
    shape = [evaluate_dim(d, sizes) for d in value.shape]
    if value.dtype.is_float:
        # Weights keep the scale of what they multiply: a matrix is divided by the root of its width.
        is_weight = value in graph.params and len(shape) >= 2
        scale = shape[-1] ** -0.5 if is_weight else 1.0
        return (torch.randn(shape, generator=generator) * scale).to(value.dtype.torch)
    low, high = _range(graph, value, sizes)
    return torch.randint(low, high, shape, generator=generator).to(value.dtype.torch)


def _range(graph: Graph, value: Value, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The bounds of an integer argument, the upper one exclusive."""
    high = 2 if value.bound is None else max(evaluate_dim(value.bound, sizes), 1)
    return (1, max(high, 2)) if "valid" in _roles(graph, value) else (0, high)


def _roles(graph: Graph, value: Value) -> Iterator[str]:
    """The names of the operand fields in which ops read a value."""
    for node in graph.uses.get(value, ()):
        if isinstance(node.op, Region):
            for inside, arg in zip(node.op.body.inputs, node.op.args, strict=True):
                if arg is value:
                    yield from _roles(node.op.body, inside)
        else:
            yield from _fields(node.op, value)


def _fields(op: Op, value: Value) -> Iterator[str]:
    for field in operand_fields(type(op)):
        if getattr(op, field) is value:
            yield field
