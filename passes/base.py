"""The contract of a pass."""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from nemoc.ir.graph import Graph
from nemoc.passes.context import PassContext


class Effect(enum.Enum):
    """What a pass may change about the numbers."""

    EXACT = "exact"
    """Every bit of the results stays."""
    REORDERS = "reorders"
    """Sums may be reassociated: a relative error of 1e-5 in float32."""
    PRECISION = "precision"
    """Values may change within the pass's declared budget."""


@dataclass(frozen=True)
class Assumptions:
    """Under which arguments the graphs before and after a pass mean the same.

    Attributes:
        sizes: dimension symbols that the pass fixes.
        inputs: integer inputs that the pass replaces by a constant, and the constant.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are its options.

    An option has a default and is a bool, int, float, string, a tuple of these, or one of these or none. A
    pass named `FuseThings` lives in `fuse_things.py` and is called `fuse-things` in pipelines; the first
    line of its docstring says what it does, the rest shows IR before and after.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.EXACT

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        """The rewritten graph; the same object when nothing changed. Never changes its argument."""
        raise NotImplementedError

    def error_budget(self) -> float:
        """The largest relative error ‖after − before‖ / ‖before‖ of any result, in float32."""
        if self.effect is Effect.PRECISION:
            raise NotImplementedError(f"{self.name} declares precision and must state its budget")
        return 0.0 if self.effect is Effect.EXACT else 1e-5

    def assumes(self, graph: Graph) -> Assumptions:
        """What the rewritten graph takes for granted; nothing, unless the pass specialises."""
        return Assumptions()

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]
