"""What a model is tuned for: how many sequences, and how long."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemoc.ir import Graph
from nemoc.ir.params import LazyArguments, ParameterSource
from nemoc.ir.sample_inputs import sample_arguments


@dataclass(frozen=True)
class Workload:
    """What a model is tuned for.

    Attributes:
        prefill: tokens of a prompt.
        cached: tokens before the one that is decoded, and before the prompt none.
        batch: sequences.
        functions: the steps to tune.
    """

    prefill: int = 256
    cached: int = 256
    batch: int = 1
    functions: tuple[str, ...] = ("prefill", "decode")

    @property
    def context(self) -> int:
        """The most tokens of a sequence."""
        return max(self.prefill, self.cached + 1)

    def sizes(self, function: str) -> dict[str, int]:
        """B, L and C of a function's step."""
        length = 1 if function == "decode" else self.prefill
        return {"B": self.batch, "L": length, "C": self.context}

    def symbols(self, function: str) -> dict[str, int]:
        """The same, and T: what costs are evaluated at."""
        return self.sizes(function) | {"T": self.before(function)}

    def before(self, function: str) -> int:
        """Tokens before a step's first."""
        return self.cached if function == "decode" else 0

    def arguments(
        self, graph: Graph, function: str, source: ParameterSource
    ) -> Mapping[str, torch.Tensor]:
        """Arguments as a step has them: every token counts, and decoding begins behind those that are cached.

        Args:
            graph: the step, or a part of it.
            function: which step.
            source: its weights.
        """
        sizes = self.sizes(function)
        given = sample_arguments(graph, sizes, params=False)
        if "valid" in given:
            given["valid"] = torch.full_like(given["valid"], sizes["L"])
        if "lengths" in given:
            given["lengths"] = torch.full_like(given["lengths"], self.before(function))
        return LazyArguments(graph, source, given)
