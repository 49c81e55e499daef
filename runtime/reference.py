"""The `reference` target: graphs executed by the interpreter. Slow, and right by definition."""

from collections.abc import Mapping

import torch

from nemoc.ir.graph import Graph
from nemoc.ir.interpreter import interpret
from nemoc.ir.params import LazyArguments, ParameterSource
from nemoc.runtime.backend import Opened
from nemoc.runtime.state import State


def open_reference(opened: Opened) -> "ReferenceBackend":
    """The backend of an artifact for the `reference` target.

    Raises:
        NemocError: a graph cannot be read.
    """
    return ReferenceBackend(opened.graphs(), opened.weights)


class ReferenceBackend:
    """Interprets a program's functions.

    Args:
        functions: graphs by function name, with inputs `tokens` and, unless it is constant, `valid`.
        source: the data of the graphs' parameters, read anew in each step.
    """

    def __init__(self, functions: Mapping[str, Graph], source: ParameterSource) -> None:
        self._functions = functions
        self._source = source

    def allocate(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        graph = self._functions[function]
        given = {"tokens": tokens, "valid": valid, **state.tensors}
        with torch.device("cpu"):  # whatever the user's default is
            result = interpret(graph, LazyArguments(graph, self._source, given))
        # Results may be views of operands: a graph may return what it was given, or swap two states.
        output = result.outputs[0].clone()
        following = {name: tensor.clone() for name, tensor in result.states.items()}
        for name, tensor in following.items():
            state.tensors[name].copy_(tensor)
        return output
