"""Products in integers: rows of x rounded to int8, weights in NVFP4.

Twice an E2M1 code is a small integer, and so is what x is rounded to, so the sums over a block of 16 are exact in
16 bits, and only then meet the scales of both. A byte shuffle gives 12 more than twice the code, since the instruction
that multiplies bytes wants one side unsigned; what that adds, 12 times the sum of the block's x, is what the sums
begin from, negated. They may wrap on the way.

That is half the instructions of the product in float32 for one row, and fewer still for several, which share the
decoding. Where a CPU has no such instruction the rounded numbers are multiplied in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from nemoc.codegen.rows import Rows
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body
from nemoc.codegen.tvm.e2m1 import OFFSET
from nemoc.codegen.tvm.linear import RowBlock, Strip, prefetch, row_blocks, rows_in_matrix
from nemoc.codegen.tvm.nvfp4 import PackedProduct
from nemoc.codegen.tvm.place import ramp
from nemoc.codegen.tvm.row_ops import expect_short
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, lanes_of
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import RoundToInt8
from nemoc.ir.ops.int8 import LARGEST, SMALLEST_STEP

_UNIT = 2.0**-17
"""A code is half an integer, and sums are read where they are 2¹⁶ times what they are."""

_LANES = BLOCK // 2
"""Elements of a vector while rows are rounded."""

_ROWS = Tunable("shared_rows", 4, (2, 3, 4, 6))
"""Rows that share the decoding of a panel."""

_ARRAY_BYTES = 320 << 10
"""Bytes of rounded rows at once: they lie on the stack."""


@dataclass(frozen=True)
class RoundedBlock(RowBlock):
    """Rows of x that are at hand as integers; elements of `tile` are two neighbours as bytes, twice, int32.

    Attributes:
        starts: −12 times the sum of a block, in each half of an int32.
        steps: what 1 stands for in a block, times 2⁻¹⁷, f32.
    """

    starts: RowBlock
    steps: RowBlock


class RoundedRows:
    """Rows that are computed, and rounded, a few at a time into local arrays.

    Args:
        body: the region's.
        op: the rounding.

    Raises:
        RegionError: what is rounded is not computed row by row.
        LayoutError: rows of an operand have no common stride.
    """

    def __init__(self, body: Body, op: RoundToInt8) -> None:
        self._rows = Rows.of(op.x)
        expect_short(self._rows)
        body.declare(self._rows)
        self._body = body

    @contextmanager
    def at_hand(self, first: str, count: str) -> Iterator[RowBlock]:
        """A loop over blocks."""
        body, rows, writer = self._body, self._rows, self._body.writer
        width = rows.width
        most = max(1, _ARRAY_BYTES // (3 * width))
        arrays = _Arrays.of(writer, most, width)
        with row_blocks(writer, first, count, most) as (start, some):
            with writer.loop("r", some) as r, body.bindings():

                def keep(at: str, n: int, elements: str) -> None:
                    writer.line(f"{arrays.values}[{ramp(at, n)}] = {elements}")

                body.compute(rows, writer.let("row", f"{start} + {r}"), keep)
                arrays.round(r)
            yield RoundedBlock(
                start,
                some,
                rows_in_matrix(arrays.pairs, start, some).tile,
                rows_in_matrix(arrays.starts, start, some),
                rows_in_matrix(arrays.steps, start, some),
            )


@dataclass(frozen=True)
class _Arrays:
    """Local memory for the rounding of rows, and the rounding.

    Attributes:
        writer: the kernel.
        blocks: of a row.
        values: the row before it is rounded, f32 [K].
        sizes: the largest magnitude of each block, then what makes integers of its numbers, f32.
        totals: the sum of each block's integers, f32.
        pairs, starts, steps: of all rows, as `RoundedBlock` has them: matrices with a word for two elements, and for
            each block.
    """

    writer: KernelWriter
    blocks: int
    values: str
    sizes: str
    totals: str
    pairs: str
    starts: str
    steps: str

    @classmethod
    def of(cls, writer: KernelWriter, rows: int, width: int) -> Self:
        """Room for so many rows of so many elements."""
        blocks = width // BLOCK
        whole = -(-blocks // _LANES) * _LANES  # blocks are gone through by vectors
        return cls(
            writer,
            blocks,
            writer.local("values", width),
            writer.local("sizes", whole),
            writer.local("totals", whole),
            writer.matrix("pairs", rows, width // 2, DType.I32),
            writer.matrix("starts", rows, whole, DType.I32),
            writer.matrix("steps", rows, whole),
        )

    def round(self, row: str) -> None:
        """Round `values` into a row of the matrices. Divisions are by vectors of blocks."""
        writer, math = self.writer, VectorMath(self.writer, _LANES)
        with writer.loop("b", self.blocks) as b:
            low, high = (f"T.fabs({x})" for x in self._block(b))
            writer.line(f"{self.sizes}[{b}] = {math.largest(f'T.max({low}, {high})')}")
        with self._vectors() as at:
            step = math.let("step", f"{self.sizes}[{at}] / {math.const(LARGEST)}")
            usable = f"{step} >= {math.const(SMALLEST_STEP)}"
            inverse = f"T.Select({usable}, {math.const(1.0)} / {step}, {math.const(0.0)})"
            writer.line(f"{self.sizes}[{at}] = {inverse}")
            writer.line(f"{self.steps}[{row}, {at}] = {step}")
        with writer.loop("b", self.blocks) as b:
            inverse = math.let("inverse", f"T.Broadcast({self.sizes}[{b}], {_LANES})")
            whole = [math.let("whole", f"T.nearbyint({x} * {inverse})") for x in self._block(b)]
            writer.line(f"{self.totals}[{b}] = {math.total(f'{whole[0]} + {whole[1]}')}")
            at = ramp(f"{b} * {_LANES}", _LANES)
            writer.line(f"{self.pairs}[{row}, {at}] = {_paired(math, whole)}")
        with self._vectors() as at:
            total = math.let("total", f"{self.totals}[{at}]")
            start = f'T.Cast("int32x{_LANES}", {total}) * T.int32({-OFFSET})'
            start = math.whole("start", f"T.bitwise_and({start}, T.int32(65535))")
            both = f"T.bitwise_or({start}, T.shift_left({start}, T.int32(16)))"
            writer.line(f"{self.starts}[{row}, {at}] = {both}")
            # Where a block has a NaN its total is one, which the integers do not tell.
            step = f"{self.steps}[{row}, {at}] * {math.const(_UNIT)}"
            writer.line(f"{self.steps}[{row}, {at}] = T.Select(T.isnan({total}), {total}, {step})")

    def _block(self, b: str) -> list[str]:
        """The elements of a block, in two vectors."""
        starts = (f"{b} * {BLOCK}", f"{b} * {BLOCK} + {_LANES}")
        return [
            self.writer.value("x", f"{self.values}[{ramp(at, _LANES)}]", _LANES) for at in starts
        ]

    @contextmanager
    def _vectors(self) -> Iterator[str]:
        """A loop over blocks, as many at once as a vector has lanes."""
        with self.writer.loop("v", -(-self.blocks // _LANES)) as v:
            yield ramp(f"{v} * {_LANES}", _LANES)


def _paired(math: VectorMath, whole: list[str]) -> str:
    """The integers of a block as words: two neighbours as bytes, twice."""
    codes = [math.whole("codes", f'T.Cast("int32x{_LANES}", {w})') for w in whole]
    low, high = (
        f"T.bitwise_and(T.Shuffle([{', '.join(codes)}], {list(range(i, BLOCK, 2))}), T.int32(255))"
        for i in (0, 1)
    )
    pair = math.whole("pair", f"T.bitwise_or({low}, T.shift_left({high}, T.int32(8)))")
    return f"T.bitwise_or({pair}, T.shift_left({pair}, T.int32(16)))"


@dataclass(frozen=True)
class Int8Product(PackedProduct):
    """The product with rows that `RoundedRows` has at hand."""

    def write_panel(self, block: RowBlock, panel: str, at: str) -> None:
        assert isinstance(block, RoundedBlock)
        together = int(_ROWS.default) if self.few else self.writer.pick(_ROWS)
        with self.strips(panel, at) as strip:
            with self.writer.loop("t", f"{block.count} // {together}") as t:
                self._rows(block, f"{block.first} + {t} * {together}", together, strip)
            rest = self.writer.let("rest", f"{block.count} % {together}")
            with self.writer.loop("t", rest) as t:
                self._rows(block, f"{block.first} + {block.count} - {rest} + {t}", 1, strip)

    def _rows(self, block: RoundedBlock, row: str, rows: int, strip: Strip) -> None:
        """Some rows by the columns that are decoded at once."""
        writer, decoder, part = self.writer, self.decoder, self.decoder.part
        first = writer.let("row", row)
        pairs, starts, steps = (b.tile(first, rows) for b in (block, block.starts, block.steps))
        acc = writer.local("acc", 4 * rows, part)
        sums = writer.local("sums", 2 * rows, 2 * part, "int16")
        with writer.loop("v", 4 * rows, "T.unroll") as v:
            writer.line(f"{acc}[{v}] = T.Broadcast(T.float32(0), {part})")
        with writer.loop("k", self.k // BLOCK) as k:
            with writer.loop("i", rows, "T.unroll") as i:
                start = self._repeated(starts(i, k), "int16")
                for half in (0, 1):
                    writer.line(f"{sums}[{i} * 2 + {half}] = {start}")
            with writer.loop("j", BLOCK // 2) as j:
                pair = writer.let("pair", f"{k} * {BLOCK // 2} + {j}")
                if rows == 1:
                    prefetch(writer, self.packed.codes, f"{strip.at}{pair}, 0")
                multiply = decoder.multiplier(self.codes(strip, pair))
                with writer.loop("i", rows, "T.unroll") as i:
                    for half, products in enumerate(
                        multiply(self._repeated(pairs(i, pair), "int8"))
                    ):
                        at = f"{sums}[{i} * 2 + {half}]"
                        writer.line(f"{at} = {at} + {products}")
            scales = self.scales(strip, k)
            with writer.loop("i", rows, "T.unroll") as i:
                step = writer.value("step", f"T.Broadcast({steps(i, k)}, {part})", part)
                numbers = decoder.wide((f"{sums}[{i} * 2]", f"{sums}[{i} * 2 + 1]"))
                for n, (number, scale) in enumerate(zip(numbers, scales, strict=True)):
                    at = f"{acc}[{i} * 4 + {n}]"
                    writer.line(f"{at} = {at} + {number} * ({scale} * {step})")
        self.store_ordered(acc, rows, first, strip)

    def _repeated(self, word: str, dtype: str) -> str:
        """An int32 over and over, as a vector of smaller integers."""
        part = self.decoder.part
        lanes = {"int8": 4, "int16": 2}[dtype] * part
        bits = f'T.reinterpret("{lanes_of(dtype, lanes)}", T.Broadcast({word}, {part}))'
        return self.writer.value("repeated", bits, lanes, dtype)
