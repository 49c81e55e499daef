"""Products in integers of 32 bits, of weights in NVFP4: dot products of four bytes (VNNI).

Rows may be rounded to int8. Otherwise a number is three bytes, each with sums of its own: 23 bits and a sign, from the
largest number of its block on. Sums in float32 keep about as much of it, unless a code of 0 leaves that number out. For
one row that is half the instructions of those sums.

The instruction wants four k of one output feature in a word, while a panel has one row for two k; so four rows of it
are interleaved, and their low halves make one word, their high halves another.
"""

from dataclasses import dataclass

from nemoc.codegen.tvm.e2m1 import OFFSET, Decoder
from nemoc.codegen.tvm.integers import IntegerBlock, IntegerProduct, steps_of_bytes
from nemoc.codegen.tvm.linear import Strip, prefetch
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.nvfp4 import BLOCK

_MULTIPLY = "llvm.x86.avx512.vpdpbusd.512"
_SHUFFLE = "llvm.x86.avx512.pshuf.b.512"
_LANES = 16
"""Output features of a vector of words."""

_INTERLEAVED = 4
"""Rows of a panel that are interleaved."""

_COLUMNS = 2 * _LANES
"""Output features that are decoded at once."""

_LEAST_EXPONENT = 23
"""Blocks of smaller numbers, by their biased exponent, have the step of this one, 2⁻¹²⁶; half of that becomes 0."""


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
            2 * (_INTERLEAVED * g + row) + half
            for g in (0, 1)
            for half in (0, 1)
            for row in range(_INTERLEAVED)
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
class DotProduct(IntegerProduct):
    """The product with rows that `Quads` made integers of."""

    @property
    def columns(self) -> int:
        return _COLUMNS

    def write_rows(self, block: IntegerBlock, row: str, rows: int, strip: Strip) -> None:
        writer = self.writer
        digits = block.words * 4 // BLOCK
        first = writer.let("row", row)
        words, starts, steps = (b.tile(first, rows) for b in (block, block.starts, block.steps))
        acc = writer.local("acc", 2 * rows, _LANES)
        with writer.loop("v", 2 * rows, "T.unroll") as v:
            writer.line(f"{acc}[{v}] = T.Broadcast(T.float32(0), {_LANES})")
        with writer.loop("k", self.k // BLOCK) as k:
            codes = self._quads(strip, k)
            scales = self._scales(strip, k)
            with writer.loop("i", rows, "T.unroll") as i:
                sums = [
                    self._dots(start, [words(i, f"{k} * {block.words} + {n}") for n in at], codes)
                    for start, at in self._digits(starts(i, k), digits)
                ]
                step = writer.value("step", f"T.Broadcast({steps(i, k)}, {_LANES})", _LANES)
                for half, scale in enumerate(scales):
                    total = sums[0][half]
                    for lower in sums[1:]:
                        total = f"(T.shift_left({total}, T.int32(8)) + {lower[half]})"
                    number = f'T.Cast("float32x{_LANES}", {total})'
                    at = f"{acc}[{i} * 2 + {half}]"
                    writer.line(f"{at} = {at} + {number} * ({scale} * {step})")
        self.store(acc, rows, first, strip)

    def _dots(self, start: str, words: list[str], codes: list[tuple[str, str]]) -> list[str]:
        """The sums of a block for one digit of its numbers: of the first and of the second features."""
        writer, bytes_ = self.writer, 4 * _LANES
        sums = [writer.value("sums", start, _LANES, "int32") for _ in range(2)]
        for word, of_word in zip(words, codes, strict=True):
            bits = f'T.reinterpret("uint8x{bytes_}", T.Broadcast({word}, {_LANES}))'
            x = writer.value("x", bits, bytes_, "uint8")
            for total, code in zip(sums, of_word, strict=True):
                call = f'"int32x{_LANES}", "{_MULTIPLY}", {total}, {code}, {x}'
                writer.line(f"{total} = T.call_llvm_pure_intrin({call})")
        return sums

    def _digits(self, start: str, digits: int) -> list[tuple[str, range]]:
        """For each digit, from the highest on, what its sums begin from, and which words of a block it is.

        The highest digit's sums begin from what the start has of its units, since 32 bits do not hold the sum of a
        block without it.
        """
        words = [range(n * BLOCK // 4, (n + 1) * BLOCK // 4) for n in range(digits)]
        whole = self.writer.value("start", f"T.Broadcast({start}, {_LANES})", _LANES, "int32")
        if digits == 1:
            return [(whole, words[0])]
        bits = 8 * (digits - 1)
        high = f"T.shift_right({whole}, T.int32({bits}))"
        low = f"T.bitwise_and({whole}, T.int32({(1 << bits) - 1}))"
        between = [f"T.Broadcast(T.int32(0), {_LANES})"] * (digits - 2)
        return list(zip([high, *between, low], words, strict=True))

    def _quads(self, strip: Strip, k: str) -> list[tuple[str, str]]:
        """Twice the codes of a block plus `OFFSET`, for each word of x: of the first and of the second features."""
        writer, found = self.writer, []
        for g in range(BLOCK // 2 // _INTERLEAVED):
            rows = []
            for row in range(_INTERLEAVED):
                pair = f"{k} * {BLOCK // 2} + {_INTERLEAVED * g + row}"
                if row * self.b % 64 == 0:
                    prefetch(writer, self.packed.codes, f"{strip.at}{pair}, 0")
                rows.append(
                    self.bytes(self.packed.codes, f"{strip.at}{pair}, {strip.column}", _COLUMNS)
                )
            halves = []
            for start in (0, _LANES):
                order = [
                    _COLUMNS * row + start + f for f in range(_LANES) for row in range(_INTERLEAVED)
                ]
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
