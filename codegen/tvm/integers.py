"""Products in integers, of weights in NVFP4: what they have in common, and how rows of x become integers.

A block of 16 numbers has a step, and its numbers are integer multiples of it. Twice an E2M1 code is a small integer
too, so that a block's sum is exact, and only then meets the scales of both. A table lookup gives 12 more than twice
the code, since instructions that multiply bytes want one side unsigned; what that adds, 12 times the sum of the
block's integers, is what sums begin from, negated. They may wrap on the way.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from nemoc.codegen.plan import Arg, Site, Stage, View
from nemoc.codegen.rows import Rows
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body
from nemoc.codegen.tvm.linear import GatheredRows, RowBlock, RowSource, StoredRows, Strip
from nemoc.codegen.tvm.nvfp4 import PackedProduct
from nemoc.codegen.tvm.place import ramp
from nemoc.codegen.tvm.row_ops import expect_short
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops.int8 import LARGEST, SMALLEST_STEP
from nemoc.ir.types import TensorType, Value

SHARED_ROWS = Tunable("shared_rows", 4, (2, 3, 4, 6))
"""Rows that share the decoding of a panel."""


class Integers(Protocol):
    """How the numbers of a block become integers, and in which words an instruction wants those."""

    @property
    def words(self) -> int:
        """Words of 32 bits for a block."""

    @property
    def lanes(self) -> int:
        """Of vectors of x; a block is one or two of them."""

    @property
    def unit(self) -> float:
        """What 1 of the instruction's sums stands for, if the step is 1."""

    def steps(self, math: VectorMath, size: str) -> tuple[str, str]:
        """What 1 stands for in blocks of some largest magnitudes, and what makes integers of their numbers."""

    def packed(self, math: VectorMath, whole: list[str]) -> list[tuple[str, int]]:
        """The words of a block: vectors of int32, each with its lanes."""

    def starts(self, math: VectorMath, total: str) -> str:
        """What sums of blocks begin from, int32, given the sums of their integers, int32."""


def steps_of_bytes(math: VectorMath, size: str) -> tuple[str, str]:
    """The steps of `round_to_int8`, and their reciprocals."""
    step = math.let("step", f"{size} / {math.const(LARGEST)}")
    usable = f"{step} >= {math.const(SMALLEST_STEP)}"
    return step, f"T.Select({usable}, {math.const(1.0)} / {step}, {math.const(0.0)})"


@dataclass(frozen=True)
class IntegerBlock(RowBlock):
    """Rows of x that are at hand as integers; elements of `tile` are words, int32.

    Attributes:
        words: of a block.
        starts: what the sums of a block begin from, int32.
        steps: what 1 stands for in a block, in the instruction's units, f32.
    """

    words: int
    starts: RowBlock
    steps: RowBlock


@dataclass(frozen=True)
class IntegerRows:
    """Rows that a launch of its own makes integers of.

    Attributes:
        stage: that launch: a task makes a row.
        scratch: what it writes: words, starts and steps of each row.
        first: the number of the first of these tensors in the plan.
        words: of a block.
    """

    stage: Stage
    scratch: tuple[View, View, View]
    first: int
    words: int

    @classmethod
    def of(cls, site: Site, target: CpuTarget, x: Value, integers: Integers, first: int) -> Self:
        """The rows of a value of a region.

        Raises:
            RegionError: they are not computed row by row, or too long to hold.
            LayoutError: rows of an operand have no common stride.
        """
        writer = KernelWriter("integers")
        body, rows = Body(writer, site, target), Rows.of(x)
        expect_short(rows)
        body.declare(rows)
        count, blocks = product(rows.lead), rows.width // BLOCK
        # Steps are computed by vectors of blocks.
        whole = -(-blocks // integers.lanes) * integers.lanes
        scratch = (
            View.dense(TensorType.of(DType.I32, (count, blocks * integers.words))),
            View.dense(TensorType.of(DType.I32, (count, whole))),
            View.dense(TensorType.of(DType.F32, (count, whole))),
        )
        words, starts, steps = _buffers(writer, scratch, first)
        values = writer.local("values", rows.width)

        def keep(at: str, n: int, elements: str) -> None:
            writer.line(f"{values}[{ramp(at, n)}] = {elements}")

        row = writer.let("row", "task")
        body.compute(rows, row, keep)
        _Making(writer, integers, blocks, values, words, starts, steps).write(row)
        return cls(writer.finish(count), scratch, first, integers.words)

    def source(self, writer: KernelWriter, number: Callable[[str], str] | None = None) -> RowSource:
        """The rows in another launch of the plan; with `number`, those that it chooses."""
        words, starts, steps = (
            GatheredRows(writer, buffer, number) if number else StoredRows(writer, buffer)
            for buffer in _buffers(writer, self.scratch, self.first)
        )
        return _Source(words, starts, steps, self.words)


@dataclass(frozen=True)
class _Source:
    """Rows of integers in memory."""

    words: StoredRows
    starts: StoredRows
    steps: StoredRows
    each: int

    @contextmanager
    def at_hand(self, first: str, count: str) -> Iterator[RowBlock]:
        """All rows are."""
        starts, steps = (RowBlock(first, count, s.tile) for s in (self.starts, self.steps))
        yield IntegerBlock(first, count, self.words.tile, self.each, starts, steps)


@dataclass(frozen=True)
class IntegerProduct(PackedProduct):
    """The product of such rows and a panel of w. Some rows share the decoding of the panel."""

    def write_panel(self, block: RowBlock, panel: str, at: str) -> None:
        assert isinstance(block, IntegerBlock)
        together = int(SHARED_ROWS.default) if self.few else self.writer.pick(SHARED_ROWS)
        with self.strips(panel, at) as strip:
            with self.writer.loop("t", f"{block.count} // {together}") as t:
                self.write_rows(block, f"{block.first} + {t} * {together}", together, strip)
            rest = self.writer.let("rest", f"{block.count} % {together}")
            with self.writer.loop("t", rest) as t:
                self.write_rows(block, f"{block.first} + {block.count} - {rest} + {t}", 1, strip)

    def write_rows(self, block: IntegerBlock, row: str, rows: int, strip: Strip) -> None:
        """Some rows by the columns that are decoded at once."""
        raise NotImplementedError


def _buffers(writer: KernelWriter, scratch: tuple[View, ...], first: int) -> list[str]:
    names = ("words", "starts", "steps")
    return [
        writer.buffer(name, Arg("scratch", first + i), view)
        for i, (name, view) in enumerate(zip(names, scratch, strict=True))
    ]


@dataclass(frozen=True)
class _Making:
    """Writes the making of integers of a row.

    Attributes:
        writer: the kernel.
        integers: how.
        blocks: of a row.
        values: the row as it is, f32 [K].
        words, starts, steps: where they go: buffers of rows.
    """

    writer: KernelWriter
    integers: Integers
    blocks: int
    values: str
    words: str
    starts: str
    steps: str

    def write(self, row: str) -> None:
        """A row of the buffers. Steps are computed by vectors of blocks."""
        writer, how = self.writer, self.integers
        math = VectorMath(writer, how.lanes)
        vectors = -(-self.blocks // how.lanes)
        sizes, inverses, steps = (
            writer.local(name, vectors * how.lanes) for name in ("sizes", "inverses", "steps")
        )
        totals = writer.local("totals", vectors * how.lanes, dtype="int32")
        spoilt = writer.local("spoilt", 1, how.lanes)
        writer.line(f"{spoilt}[0] = {math.const(0.0)}")
        with writer.loop("b", self.blocks) as b:
            block = self._block(b)
            largest = functools.reduce(lambda x, y: f"T.max({x}, {y})", map(_size, block))
            writer.line(f"{sizes}[{b}] = {math.largest(largest)}")
            for x in block:
                writer.line(f"{spoilt}[0] = {spoilt}[0] + ({x} - {x})")
        with writer.loop("v", vectors) as v:
            at = ramp(f"{v} * {how.lanes}", how.lanes)
            step, inverse = how.steps(math, f"{sizes}[{at}]")
            writer.line(f"{steps}[{at}] = {step}")
            writer.line(f"{inverses}[{at}] = {inverse}")
        with writer.loop("b", self.blocks) as b:
            inverse = math.let("inverse", f"T.Broadcast({inverses}[{b}], {how.lanes})")
            whole = [
                math.whole("whole", f'T.Cast("int32x{how.lanes}", T.nearbyint({x} * {inverse}))')
                for x in self._block(b)
            ]
            writer.line(f"{totals}[{b}] = {_sum(whole)}")
            first = 0
            for words, lanes in how.packed(math, whole):
                index = f"{row}, {b} * {how.words} + {first}"
                writer.store(self.words, index, words, lanes)
                first += lanes
        # 0, or NaN where the row has that or infinity, which integers do not tell.
        none = writer.value("none", math.total(f"{spoilt}[0]"))
        with writer.loop("v", vectors) as v:
            start = f"{v} * {how.lanes}"
            at = ramp(start, how.lanes)
            starts = how.starts(math, f"{totals}[{at}]")
            writer.store(self.starts, f"{row}, {start}", starts, how.lanes)
            step = f"{steps}[{at}] * {math.const(how.unit)} + {none}"
            writer.store(self.steps, f"{row}, {start}", step, how.lanes)

    def _block(self, b: str) -> list[str]:
        """The numbers of a block, in vectors."""
        lanes = self.integers.lanes
        return [
            self.writer.value(
                "x", f"{self.values}[{ramp(f'{b} * {BLOCK} + {start}', lanes)}]", lanes
            )
            for start in range(0, BLOCK, lanes)
        ]


def _size(x: str) -> str:
    return f"T.fabs({x})"


def _sum(vectors: list[str]) -> str:
    """The sum of all lanes of int32 vectors."""
    return f'T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", {" + ".join(vectors)})'
