"""The cost of an op: arithmetic and memory traffic as closed forms in B, L, C and T."""

from dataclasses import dataclass

import sympy

from nemoc.ir.dims import Dim


@dataclass(frozen=True)
class Cost:
    """What one op needs at least: each operand read once, each result written once.

    Attributes:
        flops: floating-point operations; a multiply-add counts as two, exp and its like as one.
        read: bytes read.
        written: bytes written.
    """

    flops: Dim = 0
    read: Dim = 0
    written: Dim = 0

    @property
    def bytes(self) -> Dim:
        """Bytes moved in either direction."""
        return sympy.expand(self.read + self.written)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            sympy.expand(self.flops + other.flops),
            sympy.expand(self.read + other.read),
            sympy.expand(self.written + other.written),
        )

    def __sub__(self, other: "Cost") -> "Cost":
        return self + Cost(-other.flops, -other.read, -other.written)
