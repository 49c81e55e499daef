"""Where candidates for a kernel are compiled and measured, as whoever chooses them sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nemoc.codegen.plan import Plan

Outcome = Literal["ok", "compile", "wrong", "crash", "hang", "memory"]
"""How a candidate did: it is right, or what is wrong with it."""


@dataclass(frozen=True)
class Finding:
    """What is said of a candidate.

    Attributes:
        outcome: how it did.
        equal: whether its results have the bits of the default's.
        error: the largest relative error of a result against float64, as far as that was measured.
        message: what is wrong, one line.
    """

    outcome: Outcome
    equal: bool = False
    error: float = 0.0
    message: str = ""


class Bench(Protocol):
    """Compiles and measures candidates of one kernel; nothing that they do reaches this process."""

    def compile(self, plans: Sequence[Plan]) -> Mapping[str, Finding]:
        """Compile plans; what is wrong with those that fail, by name."""
        ...

    def check(self, plan: Plan) -> Finding:
        """Run a compiled plan once on guarded memory and compare its results with what they should be."""
        ...

    def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]] | Finding:
        """Seconds of checked plans in each round; what went wrong if it did not come to that."""
        ...
