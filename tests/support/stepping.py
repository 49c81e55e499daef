"""A model's graph run step by step in the interpreter, its state kept between calls."""

from collections.abc import Sequence

import torch

from nemoc.ir import DType, Graph, interpret
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.params import LazyArguments
from nemoc.models import Model


class Stepper:
    """The interpreter over one batch of a model.

    At first the caches hold NaN, which the model must not read, and the other states zeros, which it does.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        *,
        graph: Graph | None = None,
        float64: bool = False,
    ) -> None:
        self.graph = graph or model.build_step(logits="all")
        self.float64 = float64
        assert model.parameters is not None
        self._source = model.parameters
        self.states: dict[str, torch.Tensor] = {}
        for state in self.graph.states:
            shape = [evaluate_dim(d, {"B": batch, "C": capacity}) for d in state.shape]
            empty = torch.nan if state.name.endswith((".k", ".v")) else 0
            self.states[state.name] = torch.full(shape, empty, dtype=state.dtype.torch)

    def __call__(self, tokens: torch.Tensor, valid: Sequence[int] | None = None) -> torch.Tensor:
        """The logits of new tokens i64[B, L], of which `valid` are real in each row (None: all)."""
        count = [tokens.shape[1]] * len(tokens) if valid is None else list(valid)
        given = {"tokens": tokens, "valid": torch.tensor(count, dtype=DType.I32.torch)}
        arguments = LazyArguments(self.graph, self._source, given | self.states)
        result = interpret(self.graph, arguments, float64=self.float64)
        self.states = result.states
        return result.outputs[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
