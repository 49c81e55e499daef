"""Tiles of tokens: some of one sequence, next to each other in memory's order or the one token of a step."""

from dataclasses import dataclass

from nemoc.codegen.triton.seen import Place
from nemoc.codegen.triton.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim


@dataclass(frozen=True)
class Tokens:
    """The tokens that a program has at hand.

    Attributes:
        n: their sequence.
        row: their rows, those past the last clamped to it.
        t: their numbers within the sequence, not clamped; empty for the one token of a step.
        first: the first of these numbers.
        rows: the tile's size.
        exists: which exist; empty for all.
    """

    n: str
    row: str
    t: str = ""
    first: str = ""
    rows: int = 1
    exists: str = ""

    @classmethod
    def block(cls, writer: KernelWriter, n: str, first: str, rows: int, length: Dim) -> "Tokens":
        """The tokens from one on, of sequences of a length: tiles [rows, 1]."""
        size = size_text(length)
        t = writer.let("t", f"{first} + tl.arange(0, {rows})[:, None]")
        row = writer.let("row", f"{n} * {size} + tl.minimum({t}, {size} - 1)")
        return cls(n, row, t, first, rows, writer.let("exists", f"{t} < {size}"))

    @property
    def place(self) -> Place:
        """Their rows, without columns."""
        return Place(self.row, "0", self.rows, 1, exists=self.exists)
