"""Decoding E2M1, four vectors of output features at a time, by byte shuffles.

A code stands for 0, 0.5, 1, 1.5, 2, 3, 4, 6 or their negatives (`nemoc.ir.nvfp4`). A shuffle looks up the two bytes
that it has as bf16; interleaving those makes words of two features each, of which a shift and a mask make float32. So
vectors hold features in an order of their own, which only what leaves a product's loop has to undo.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, lanes_of

OFFSET = 12
"""What makes twice a code no negative number."""

_LOW = bytes((0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0) * 2)
_TOP = bytes((0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40))
_TOP += bytes(byte | 0x80 for byte in _TOP)
"""The two bytes of what codes stand for as bf16."""

_WHOLE = bytes(OFFSET + sign * n for sign in (1, -1) for n in (0, 1, 2, 3, 4, 6, 8, 12))
"""Twice what codes stand for, plus `OFFSET`."""


@dataclass(frozen=True)
class Decoder:
    """Writes the decoding of four vectors of features.

    Attributes:
        writer: the kernel.
        part: features of a vector: 8, or 4. In `nemoc.codegen.tvm.dots`, which has four codes of a feature side by side
            and uses `nibbles` and `twice` alone, the words of a vector.
        shuffle: LLVM's intrinsic that looks up as many bytes as there are features; empty where the CPU has none.
        multiply: the one that multiplies unsigned bytes by signed ones and adds neighbours, in 16 bits; likewise.
        nothing: a vector of zeros that LLVM does not know to be zeros; see `local_to`.
    """

    writer: KernelWriter
    part: int
    shuffle: str = ""
    multiply: str = ""
    nothing: str = ""

    @classmethod
    def of(cls, writer: KernelWriter, target: CpuTarget, b: int) -> Self:
        """The decoder of panels of b features, a multiple of 16, on a CPU."""
        if b % 32 == 0 and "avx2" in target.features:
            return cls(writer, 8, "llvm.x86.avx2.pshuf.b", "llvm.x86.avx2.pmadd.ub.sw")
        if "ssse3" in target.features:
            return cls(writer, 4, "llvm.x86.ssse3.pshuf.b.128", "llvm.x86.ssse3.pmadd.ub.sw.128")
        if target.architecture in ("aarch64", "arm64"):
            return cls(writer, 4, "llvm.aarch64.neon.tbl1.v16i8")
        return cls(writer, 4)

    def local_to(self, count: str) -> Self:
        """The same decoder, whose tables LLVM takes to depend on a number that is never negative.

        It moves constants out of all loops, and then has registers for them in every other loop of the kernel, even in
        one that needs these for its sums. So they must not be constants.
        """
        n = self.width
        bits = f'T.Broadcast(T.Cast("uint8", T.min({count}, 0)), {n})'
        return dataclasses.replace(self, nothing=self.writer.value("nothing", bits, n, "uint8"))

    @property
    def width(self) -> int:
        """Features that are decoded at once."""
        return 4 * self.part

    @property
    def order(self) -> tuple[int, ...]:
        """Which feature each element of the four vectors is, one vector after the other."""
        pairs = [self._interleaving(half)[::2] for half in (0, 1)]
        return tuple(n for pair in pairs for parity in (0, 1) for n in pair[parity::2])

    def nibbles(self, codes: str) -> tuple[str, str]:
        """The codes of even k and of odd k, a byte each."""
        writer, n = self.writer, self.width
        mask = self._table(f"T.Broadcast(T.uint8(15), {n})")
        low = f"T.bitwise_and({codes}, {mask})"
        high = f"T.shift_right({codes}, T.Broadcast(T.uint8(4), {n}))"
        return (
            writer.value("low", low, n, "uint8"),
            writer.value("high", high, n, "uint8"),
        )

    def numbers(self, nibbles: str) -> list[str]:
        """What codes stand for: four vectors of float32, in the decoder's order."""
        return [
            self._float(bits)
            for words in self._bf16(nibbles)
            for bits in (
                f"T.shift_left({words}, T.uint32(16))",
                f"T.bitwise_and({words}, {self._word(0xFFFF0000)})",
            )
        ]

    def multiplier(self, nibbles: tuple[str, str]) -> Callable[[str], list[str]]:
        """Writes twice the codes of two neighbouring k, plus `OFFSET`, times two numbers, and their sum.

        Args:
            nibbles: the codes.

        Returns:
            Given the two numbers as int8, over and over, two vectors of int16 with a feature in each element, which
            `wide` puts into the decoder's order.
        """
        even, odd = (self.twice(n) for n in nibbles)
        pairs = [self._paired(even, odd, half) for half in (0, 1)]
        kind = lanes_of("int16", 2 * self.part)
        return lambda x: [
            f'T.call_llvm_pure_intrin("{kind}", "{self.multiply}", {pair}, {x})' for pair in pairs
        ]

    def twice(self, nibbles: str) -> str:
        """Twice what codes stand for, plus `OFFSET`, a byte each."""
        return self._looked_up(_WHOLE, nibbles)

    def wide(self, sums: tuple[str, str]) -> list[str]:
        """Two such vectors as four of float32 in the decoder's order, 2¹⁶ times as large."""
        kinds = lanes_of("int32", self.part), lanes_of("float32", self.part)
        words = [
            self.writer.value("words", f'T.reinterpret("{kinds[0]}", {s})', self.part, "int32")
            for s in sums
        ]
        return [
            f'T.Cast("{kinds[1]}", {bits})'
            for word in words
            for bits in (
                f"T.shift_left({word}, T.int32(16))",
                f"T.bitwise_and({word}, T.int32(-65536))",
            )
        ]

    def scales(self, codes: str) -> list[str]:
        """E4M3 numbers, of which none is negative or NaN, as four vectors of float32 in the decoder's order.

        Exponent and mantissa are shifted to where float32 has them; the factor makes up for the different bias, and is
        right for denormals too.
        """
        zeros = f"T.Broadcast(T.uint8(0), {self.width})"
        bias = self._float(self._word(0x7B800000))  # 2¹²⁰
        return [
            self._float(bits, f" * {bias}")
            for words in self._words(codes, zeros)
            for bits in (
                f"T.shift_left({words}, T.uint32(20))",
                f"T.shift_left(T.bitwise_and({words}, {self._word(0xFFFF0000)}), T.uint32(4))",
            )
        ]

    def ordered(self, vectors: list[str], lanes: int) -> list[str]:
        """Four vectors as vectors of so many lanes, features in their own order."""
        order = self.order
        places = [order.index(feature) for feature in range(self.width)]
        joined = ", ".join(vectors)
        return [
            f"T.Shuffle([{joined}], {places[start : start + lanes]})"
            for start in range(0, self.width, lanes)
        ]

    def _bf16(self, nibbles: str) -> list[str]:
        """Codes as bf16, two in a word."""
        if self.shuffle:
            return self._words(self._looked_up(_LOW, nibbles), self._looked_up(_TOP, nibbles))
        words = self._words(nibbles, f"T.Broadcast(T.uint8(0), {self.width})")
        return [self._computed(word) for word in words]

    def _looked_up(self, table: bytes, nibbles: str) -> str:
        n = self.width
        numbers = [int.from_bytes(table[i : i + 4], "little") for i in (0, 4, 8, 12)] * (n // 16)
        parts = ", ".join(f"T.uint32({number})" for number in numbers)
        constant = f'T.reinterpret("uint8x{n}", T.Shuffle([{parts}], {list(range(n // 4))}))'
        operands = f"{self._table(constant)}, {nibbles}"
        call = f'T.call_llvm_pure_intrin("uint8x{n}", "{self.shuffle}", {operands})'
        return self.writer.value("found", call, n, "uint8")

    def _table(self, constant: str) -> str:
        return f"T.bitwise_or({constant}, {self.nothing})" if self.nothing else constant

    def _word(self, bits: int) -> str:
        """The same 32 bits for each feature of a vector."""
        kind = lanes_of("uint32", self.part)
        constant = f"T.Broadcast(T.uint32({bits}), {self.part})"
        if not self.nothing:
            return constant
        return f'T.bitwise_or({constant}, T.reinterpret("{kind}", {self.nothing}))'

    def _computed(self, words: str) -> str:
        """Two codes, one in each half of a word, as two bf16: of a magnitude above 1 its exponent and mantissa are
        the code's, from 0.5 on; 0 and 1 are 0 and 0.5."""
        both, kind = 0x00010001, lanes_of("uint16", 2 * self.part)

        def each(text: str) -> str:
            return f'T.reinterpret("{kind}", {text})'

        size = each(f"T.bitwise_and({words}, T.uint32({7 * both}))")
        sign = f"T.shift_left(T.bitwise_and({words}, T.uint32({8 * both})), T.uint32(12))"
        size = self.writer.value("size", size, 2 * self.part, "uint16")
        n = 2 * self.part
        small = f"{size} * T.Broadcast(T.uint16({0x3F00}), {n})"
        large = f"{size} * T.Broadcast(T.uint16(64), {n}) + T.Broadcast(T.uint16({0x3F00}), {n})"
        bits = f"T.Select({size} < T.Broadcast(T.uint16(2), {n}), {small}, {large})"
        number = f'T.bitwise_or(T.reinterpret("{lanes_of("uint32", self.part)}", {bits}), {sign})'
        return self.writer.value("words", number, self.part, "uint32")

    def _words(self, low: str, high: str) -> list[str]:
        """Bytes that belong together side by side, so that a word of 32 bits has two features."""
        kind = lanes_of("uint32", self.part)
        return [
            self.writer.value("words", f'T.reinterpret("{kind}", {pair})', self.part, "uint32")
            for pair in (self._paired(low, high, half) for half in (0, 1))
        ]

    def _paired(self, low: str, high: str, half: int) -> str:
        """Half of the bytes of two vectors, one from each in turn."""
        shuffled = f"T.Shuffle([{low}, {high}], {self._interleaving(half)})"
        return self.writer.value("paired", shuffled, self.width, "uint8")

    def _interleaving(self, half: int) -> list[int]:
        """Which bytes of two vectors a half is made of, as unpacking instructions take them: from every 16 bytes 8."""
        n = self.width
        own = [lane + half * 8 + i for lane in range(0, n, 16) for i in range(8)]
        return [index for i in own for index in (i, n + i)]

    def _float(self, bits: str, factor: str = "") -> str:
        kind = lanes_of("float32", self.part)
        return self.writer.value("v", f'T.reinterpret("{kind}", {bits}){factor}', self.part)
