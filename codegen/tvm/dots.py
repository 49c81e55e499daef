"""Products in integers of 32 bits, of weights in NVFP4: dot products of four bytes (VNNI).

Rows may be rounded to int8. Or they are as they are: then a number is three bytes, each with a sum of its own, and
integers of 24 bits hold of a block's numbers what sums in float32 hold of its products. That takes half the
instructions of those sums for one row.

The instruction wants four k of one output feature in a word, while a panel has one row for two k; so four rows of it
are interleaved, and their low halves make one word, their high halves another.
"""

from dataclasses import dataclass

from nemoc.codegen.tvm.e2m1 import OFFSET, Decoder
from nemoc.codegen.tvm.int8 import SHARED_ROWS
from nemoc.codegen.tvm.integers import IntegerBlock, steps_of_bytes
from nemoc.codegen.tvm.linear import RowBlock, Strip, prefetch
from nemoc.codegen.tvm.nvfp4 import PackedProduct
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.nvfp4 import BLOCK

_MULTIPLY = "llvm.x86.avx512.vpdpbusd.512"
_SHUFFLE = "llvm.x86.avx512.pshuf.b.512"
_LANES = 16
"""Output features of a vector of words."""

_ROWS = 4
"""Rows of a panel that are interleaved."""

_COLUMNS = 2 * _LANES
"""Output features that are decoded at once."""

_LEAST_EXPONENT = 23
"""Of blocks of smaller numbers, biased, the step is 2⁻¹²⁶ as of these: what is smaller than that is lost."""


def dot_decoder(writer: KernelWriter, target: CpuTarget, b: int) -> Decoder | None:
    """What decodes panels of b features for these products, if the CPU has them."""
    if b % _COLUMNS or not {"avx512bw", "avx512vnni"} <= set(target.features):
        return None
    return Decoder(writer, _LANES, _SHUFFLE)


@dataclass(frozen=True)
class Quads:
    """Rows in words of four bytes, k apart by two.

    Attributes:
        digits: bytes of a number: 1 after `round_to_int8`, 3 for rows as they are.
    """

    digits: int
    lanes = BLOCK
    unit = 0.5

    @property
    def words(self) -> int:
        return BLOCK // 4 * self.digits

    def steps(self, math: VectorMath, size: str) -> tuple[str, str]:
        if self.digits == 1:
            return steps_of_bytes(math, size)
        # The power of two, a bit more than the size, that makes 2²² of itself. A bit, since what is next to 2²³ has
        # no three signed bytes.
        bits = f'T.reinterpret("int32x{math.lanes}", {size} * {math.const(1 + 2.0**-7)})'
        least = f"T.Broadcast(T.int32({_LEAST_EXPONENT << 23}), {math.lanes})"
        exponent = math.whole(
            "exponent", f"T.max(T.bitwise_and({bits}, T.int32({0x7F800000})), {least})"
        )
        kind = f"float32x{math.lanes}"
        step = math.let("step", f'T.reinterpret("{kind}", {exponent} - T.int32({22 << 23}))')
        above = f"({exponent} - T.int32({_LEAST_EXPONENT << 23}))"
        inverse = f'T.reinterpret("{kind}", T.int32({(276 - _LEAST_EXPONENT) << 23}) - {above})'
        return step, math.let("inverse", inverse)

    def packed(self, math: VectorMath, whole: list[str]) -> list[tuple[str, int]]:
        (number,) = whole
        if self.digits > 1:
            # Bytes of a number are its digits from −128 on, all of them 128 larger; the sign bit takes that back.
            offsets = f"T.int32({sum(128 << 8 * d for d in range(self.digits))})"
            number = f"T.bitwise_xor({number} + {offsets}, {offsets})"
        bits = math.writer.value(
            "bits", f'T.reinterpret("uint8x{4 * BLOCK}", {number})', 4 * BLOCK, "uint8"
        )
        order = [
            2 * (_ROWS * g + row) + half for g in (0, 1) for half in (0, 1) for row in range(_ROWS)
        ]
        return [
            (
                f'T.reinterpret("int32x4", T.Shuffle([{bits}], {[4 * k + digit for k in order]}))',
                BLOCK // 4,
            )
            for digit in reversed(range(self.digits))
        ]

    def starts(self, math: VectorMath, total: str) -> str:
        return f"{total} * T.int32({-OFFSET})"


@dataclass(frozen=True)
class DotProduct(PackedProduct):
    """The product with rows that `Quads` made integers of."""

    @property
    def columns(self) -> int:
        return _COLUMNS

    def write_panel(self, block: RowBlock, panel: str, at: str) -> None:
        assert isinstance(block, IntegerBlock)
        together = int(SHARED_ROWS.default) if self.few else self.writer.pick(SHARED_ROWS)
        with self.strips(panel, at) as strip:
            with self.writer.loop("t", f"{block.count} // {together}") as t:
                self._rows(block, f"{block.first} + {t} * {together}", together, strip)
            rest = self.writer.let("rest", f"{block.count} % {together}")
            with self.writer.loop("t", rest) as t:
                self._rows(block, f"{block.first} + {block.count} - {rest} + {t}", 1, strip)

    def _rows(self, block: IntegerBlock, row: str, rows: int, strip: Strip) -> None:
        """Some rows by the columns that are decoded at once."""
        writer, halves = self.writer, (0, 1)
        digits = block.words * 4 // BLOCK
        first = writer.let("row", row)
        words, starts, steps = (b.tile(first, rows) for b in (block, block.starts, block.steps))
        acc = writer.local("acc", 2 * rows, _LANES)
        sums = writer.local("sums", 2 * digits, _LANES, "int32")
        with writer.loop("v", 2 * rows, "T.unroll") as v:
            writer.line(f"{acc}[{v}] = T.Broadcast(T.float32(0), {_LANES})")
        with writer.loop("k", self.k // BLOCK) as k:
            codes = self._quads(strip, k)
            scales = self._scales(strip, k)
            with writer.loop("i", rows, "T.unroll") as i:
                first_sums = self._starts(starts(i, k), digits)
                for digit in range(digits):
                    for half in halves:
                        writer.line(f"{sums}[{2 * digit + half}] = {first_sums[digit]}")
                    for n, pair in enumerate(codes):
                        word = words(i, f"({k} * {digits} + {digit}) * {len(codes)} + {n}")
                        bits = f'T.reinterpret("uint8x{4 * _LANES}", T.Broadcast({word}, {_LANES}))'
                        x = writer.value("x", bits, 4 * _LANES, "uint8")
                        for half in halves:
                            at = f"{sums}[{2 * digit + half}]"
                            operands = f"{at}, {pair[half]}, {x}"
                            writer.line(
                                f'{at} = T.call_llvm_pure_intrin("int32x{_LANES}", "{_MULTIPLY}", {operands})'
                            )
                step = writer.value("step", f"T.Broadcast({steps(i, k)}, {_LANES})", _LANES)
                for half in halves:
                    total = f"{sums}[{half}]"
                    for digit in range(1, digits):
                        total = f"(T.shift_left({total}, T.int32(8)) + {sums}[{2 * digit + half}])"
                    at = f"{acc}[{i} * 2 + {half}]"
                    number = f'T.Cast("float32x{_LANES}", {total})'
                    writer.line(f"{at} = {at} + {number} * ({scales[half]} * {step})")
        self.store(acc, rows, first, strip)

    def _starts(self, start: str, digits: int) -> list[str]:
        """What the sums of each digit begin from.

        The highest digit's begins from what the start has of its units, since 32 bits do not hold the sum of a
        block without it.
        """
        whole = self.writer.value("start", f"T.Broadcast({start}, {_LANES})", _LANES, "int32")
        if digits == 1:
            return [whole]
        bits = 8 * (digits - 1)
        high = f"T.shift_right({whole}, T.int32({bits}))"
        low = f"T.bitwise_and({whole}, T.int32({(1 << bits) - 1}))"
        return [high, *[f"T.Broadcast(T.int32(0), {_LANES})"] * (digits - 2), low]

    def _quads(self, strip: Strip, k: str) -> list[tuple[str, str]]:
        """Twice the codes of a block plus `OFFSET`, for each word of x: of the first and of the second features."""
        writer, found = self.writer, []
        for g in range(BLOCK // 2 // _ROWS):
            rows = []
            for row in range(_ROWS):
                pair = f"{k} * {BLOCK // 2} + {_ROWS * g + row}"
                if row * self.b % 64 == 0:
                    prefetch(writer, self.packed.codes, f"{strip.at}{pair}, 0")
                rows.append(
                    self.bytes(self.packed.codes, f"{strip.at}{pair}, {strip.column}", _COLUMNS)
                )
            halves = []
            for start in (0, _LANES):
                order = [_COLUMNS * row + start + f for f in range(_LANES) for row in range(_ROWS)]
                quads = f"T.Shuffle([{', '.join(rows)}], {order})"
                halves.append(writer.value("quads", quads, 4 * _LANES, "uint8"))
            nibbles = [self.decoder.nibbles(quads) for quads in halves]
            for parity in (0, 1):
                low, high = (self.decoder.twice(n[parity]) for n in nibbles)
                found.append((low, high))
        return found

    def _scales(self, strip: Strip, k: str) -> list[str]:
        """The scales of a block, for the first and the second 16 features."""
        found = []
        for start in (0, _LANES):
            index = f"{strip.at}{k}, {strip.column} + {start}"
            scale = self.writer.load(self.packed.scales, index, _LANES, weight=True)
            found.append(self.writer.value("scale", scale, _LANES))
        return found
