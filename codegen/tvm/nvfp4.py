"""Products with weights in NVFP4, decoded as they are read.

A panel of b output features is bytes [K/2, b], two codes each (even k in the low half), and scales [K/16, b]. Four
vectors of features are decoded at a time: a byte shuffle looks up the two bytes that a code has as bf16, and
interleaving those makes words of two features each, of which a shift and a mask make float32. So vectors hold features
in an order of their own (`Decoder.order`), which only what leaves the product's loop has to undo.

One row of x is multiplied by what comes out of that at once: the sums of a block of 16 meet its scale when they
are complete. For more rows the panel is decoded once, into a local array of bf16, which the ordinary product then
reads; code times block scale has six significant bits, so bf16 holds it exactly. The scale of the matrix meets the
sums.

An E2M1 code decodes to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (`nemoc.ir.nvfp4`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

from nemoc.codegen.plan import Arg, Plan, RegionError, Site
from nemoc.codegen.tvm.body import Body
from nemoc.codegen.tvm.elementwise import unflatten
from nemoc.codegen.tvm.linear import Product, RowBlock, Sink, Strip, prefetch
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, lanes_of, size_text
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.ops import DequantizeNvfp4, GroupedLinear, Linear
from nemoc.ir.types import Value

_FEW = 4
"""Rows of x for which decoding a panel beforehand does not pay."""

_PANEL_BYTES = 1 << 20
"""Bytes of a decoded panel at most: it lies on the stack."""

_TOP = (0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40)
_LOW = (0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0)
"""The two bytes of the magnitudes as bf16."""


def packed_bytes(k: int, features: int) -> int:
    """Bytes of so many rows of K elements."""
    return features * (k // 2 + k // BLOCK)


@dataclass(frozen=True)
class Packed:
    """A weight in NVFP4, declared in a kernel.

    Attributes:
        codes, scales, tensor_scale: names of the buffers.
        divides: whether the tensor scale is a divisor.
        stacked: whether there is a tensor scale for each group.
    """

    codes: str
    scales: str
    tensor_scale: str
    divides: bool
    stacked: bool

    @classmethod
    def of(cls, body: Body, op: DequantizeNvfp4) -> Self:
        """What a region unpacks.

        Raises:
            RegionError: codes or scales are computed in the region, or lie as no kernel reads them.
        """
        if op.interleave % 16:
            raise RegionError(f"no skeleton for NVFP4 in blocks of {op.interleave} rows")
        return cls(
            cls._buffer(body, "codes", op.packed),
            cls._buffer(body, "scales", op.scales),
            cls._buffer(body, "whole", op.global_scale),
            DIALECTS[op.dialect].divides,
            op.global_scale.type.rank > 0,
        )

    @staticmethod
    def _buffer(body: Body, hint: str, value: Value) -> str:
        if not body.is_operand(value):
            raise RegionError(f"%{value.name}, packed in NVFP4, is computed in the region")
        return body.writer.buffer(hint, body.arg(value), body.view(value))


def emit_dequantize_nvfp4(site: Site, target: CpuTarget) -> Plan:
    """A weight unpacked, for whoever needs it as a whole: one code after the other."""
    op = site.op
    assert isinstance(op, DequantizeNvfp4)
    writer = KernelWriter("dequantize_nvfp4")
    codes = writer.buffer("codes", site.arg("packed"), site.view(site.arg("packed")))
    scales = writer.buffer("scales", site.arg("scales"), site.view(site.arg("scales")))
    whole = writer.buffer("whole", site.arg("global_scale"), site.view(site.arg("global_scale")))
    y = writer.buffer("y", Arg("result", 0), site.results[0])
    axis = op.packed.type.rank - (1 if op.interleave == 1 else 2)
    lead, pairs = op.packed.shape[:axis], op.packed.shape[axis]
    at = ", ".join(unflatten(writer, "task", lead))
    stack = ", ".join(unflatten(writer, "task", lead)[: op.global_scale.type.rank]) or "0"
    g = writer.value("g", writer.load(whole, stack))
    sign = "/" if DIALECTS[op.dialect].divides else "*"
    with writer.loop("k", size_text(pairs)) as k, writer.loop("i", op.interleave) as i:
        inner = f", {i}" if op.interleave > 1 else ""
        scale = writer.load(scales, f"{at}, {k} // {BLOCK // 2}{inner}")
        step = writer.value("step", f"{scale} {sign} {g}")
        code = writer.load(codes, f"{at}, {k}{inner}")
        both = writer.value("both", f'T.Cast("uint32", {code})', 1, "uint32")
        for half, bits in enumerate(
            (f"T.bitwise_and({both}, T.uint32(15))", f"T.shift_right({both}, T.uint32(4))")
        ):
            nibble = writer.value("nibble", bits, 1, "uint32")
            size = writer.value("size", f"T.bitwise_and({nibble}, T.uint32(7))", 1, "uint32")
            small = f'T.Cast("float32", {size}) * T.float32(0.5)'
            word = f"T.shift_left({size}, T.uint32(22)) + T.uint32({0x3F000000})"
            number = f'T.Select({size} < T.uint32(2), {small}, T.reinterpret("float32", {word}))'
            signed = f"T.Select({nibble} < T.uint32(8), {number}, T.float32(0) - {number})"
            writer.store(y, f"{at}, {k} * 2 + {half}{inner}", f"{signed} * {step}")
    return Plan((writer.finish(product(lead)),))


@dataclass(frozen=True)
class Nvfp4Product(Product):
    """Writes the product of rows of x and a panel of w, which is packed.

    Attributes:
        packed: the weight.
        decoder: how codes are decoded.
    """

    packed: Packed
    decoder: "Decoder"

    @classmethod
    def of_packed(
        cls,
        writer: KernelWriter,
        target: CpuTarget,
        op: Linear | GroupedLinear,
        packed: Packed,
        sink: Sink,
    ) -> Self:
        """The product of an op with a weight that the region unpacks."""
        plain = Product.of(writer, target, op, packed.codes, sink)
        fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        return cls(**fields, packed=packed, decoder=Decoder.of(writer, target, op.interleave))

    def write(self, block: RowBlock, panel: str, group: str = "") -> None:
        writer, packed = self.writer, self.packed
        at = f"{group}, {panel}, " if group else f"{panel}, "
        which = "0" if not packed.stacked else group
        scale = writer.value("whole", writer.load(packed.tensor_scale, which))
        scaled = dataclasses.replace(self, sink=self._scaled(scale))
        if 2 * self.k * self.b > _PANEL_BYTES:
            scaled._row_by_row(block, panel, at)
            return
        with writer.block(f"if {block.count} < {_FEW}:"):
            scaled._row_by_row(block, panel, at)
        with writer.block("else:"):
            decoded = Product(
                writer,
                self._unpacked(at),
                scaled.sink,
                self.n,
                self.k,
                self.b,
                self.lanes,
                self.high,
            )
            decoded.write_strip(block, Strip(panel, "", "0", self.b // self.lanes))

    def _scaled(self, scale: str) -> Sink:
        """The sink of sums that the scale of the matrix is still missing from."""
        writer, sink = self.writer, self.sink
        sign = "/" if self.packed.divides else "*"

        def put(row: str, column: str, sums: str, lanes: int) -> None:
            whole = scale if lanes == 1 else f"T.Broadcast({scale}, {lanes})"
            sink.put(row, column, writer.value("y", f"{sums} {sign} {whole}", lanes), lanes)

        return dataclasses.replace(sink, put=put)

    def _row_by_row(self, block: RowBlock, panel: str, at: str) -> None:
        width = self.decoder.width
        with (
            self.writer.loop("t", block.count) as t,
            self.writer.loop("s", self.b // width) as s,
        ):
            column = self.writer.let("column", f"{s} * {width}")
            strip = Strip(panel, at, column, width // self.lanes)
            self._row(block, f"{block.first} + {t}", strip)

    def _row(self, block: RowBlock, row: str, strip: Strip) -> None:
        """One row by the columns that are decoded at once."""
        writer, decoder, part = self.writer, self.decoder, self.decoder.part
        first = writer.let("row", row)
        element = block.tile(first, 1)
        acc, sums = writer.local("acc", 4, part), writer.local("sums", 8, part)
        zero = f"T.Broadcast(T.float32(0), {part})"
        with writer.loop("v", 4, "T.unroll") as v:
            writer.line(f"{acc}[{v}] = {zero}")
        with writer.loop("k", self.k // BLOCK) as k:
            with writer.loop("v", 8, "T.unroll") as v:
                writer.line(f"{sums}[{v}] = {zero}")
            with writer.loop("j", BLOCK // 2, "T.unroll") as j:
                pair = writer.let("pair", f"{k} * {BLOCK // 2} + {j}")
                prefetch(writer, self.packed.codes, f"{strip.at}{pair}, 0")
                codes = self._bytes(self.packed.codes, f"{strip.at}{pair}, {strip.column}")
                for half, nibbles in enumerate(decoder.nibbles(codes)):
                    x = element("0", f"{k} * {BLOCK} + {j} * 2 + {half}")
                    xs = writer.value("xs", f"T.Broadcast({x}, {part})", part)
                    for i, numbers in enumerate(decoder.numbers(nibbles)):
                        at = f"{sums}[{half * 4 + i}]"
                        writer.line(f"{at} = {at} + {numbers} * {xs}")
            for i, scales in enumerate(self._scales(k, strip)):
                both = f"({sums}[{i}] + {sums}[{4 + i}])"
                writer.line(f"{acc}[{i}] = {acc}[{i}] + {both} * {scales}")
        ordered = writer.local("ordered", strip.wide, self.lanes)
        for i, vector in enumerate(decoder.ordered([f"{acc}[{v}]" for v in range(4)], self.lanes)):
            writer.line(f"{ordered}[{i}] = {vector}")
        self.store(ordered, 1, first, strip)

    def _unpacked(self, at: str) -> str:
        """The panel as a local array of bf16 [K, b], without the scale of the matrix; returns its name."""
        writer, decoder, lanes, width = self.writer, self.decoder, self.lanes, self.decoder.width
        local = writer.matrix("panel", self.k, self.b, DType.BF16)
        with (
            writer.loop("s", self.b // width) as s,
            writer.loop("k", self.k // BLOCK) as k,
        ):
            strip = Strip("", at, writer.let("column", f"{s} * {width}"), width // lanes)
            scales = self._scales(k, strip)
            with writer.loop("j", BLOCK // 2, "T.unroll") as j:
                pair = writer.let("pair", f"{k} * {BLOCK // 2} + {j}")
                codes = self._bytes(self.packed.codes, f"{at}{pair}, {strip.column}")
                for half, nibbles in enumerate(decoder.nibbles(codes)):
                    numbers = decoder.numbers(nibbles)
                    scaled = [f"{n} * {s}" for n, s in zip(numbers, scales, strict=True)]
                    names = [writer.value("w", number, decoder.part) for number in scaled]
                    for i, vector in enumerate(decoder.ordered(names, lanes)):
                        bits = f'T.reinterpret("{lanes_of("uint32", lanes)}", {vector})'
                        word = f'T.Cast("{lanes_of("uint16", lanes)}", T.shift_right({bits}, T.uint32(16)))'
                        to = f"{pair} * 2 + {half}, {strip.column} + {i * lanes}"
                        writer.store(local, to, word, lanes, raw=True)
        return local

    def _scales(self, k: str, strip: Strip) -> list[str]:
        """The scales of a block, in the decoder's order."""
        index = f"{strip.at}{k}, {strip.column}"
        return self.decoder.scales(self._bytes(self.packed.scales, index))

    def _bytes(self, buffer: str, index: str) -> str:
        writer, width = self.writer, self.decoder.width
        return writer.value("bytes", writer.load(buffer, index, width, raw=True), width, "uint8")


@dataclass(frozen=True)
class Decoder:
    """Writes the decoding of four vectors of features.

    Attributes:
        writer: the kernel.
        part: features of a vector: 8, or 4.
        lookup: LLVM's byte shuffle of as many bytes as there are features, with its operands' order; empty where the
            CPU has none.
    """

    writer: KernelWriter
    part: int
    lookup: str

    @classmethod
    def of(cls, writer: KernelWriter, target: CpuTarget, b: int) -> Self:
        """The decoder of panels of b features, a multiple of 16, on a CPU."""
        if b % 32 == 0 and "avx2" in target.features:
            return cls(writer, 8, "llvm.x86.avx2.pshuf.b")
        if "ssse3" in target.features:
            return cls(writer, 4, "llvm.x86.ssse3.pshuf.b.128")
        if target.architecture in ("aarch64", "arm64"):
            return cls(writer, 4, "llvm.aarch64.neon.tbl1.v16i8")
        return cls(writer, 4, "")

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
        low = f"T.bitwise_and({codes}, T.Broadcast(T.uint8(15), {n}))"
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
                f"T.bitwise_and({words}, T.uint32({0xFFFF0000}))",
            )
        ]

    def scales(self, codes: str) -> list[str]:
        """E4M3 numbers, of which none is negative or NaN, as four vectors of float32 in the decoder's order.

        Exponent and mantissa are shifted to where float32 has them; the factor makes up for the different bias, and is
        right for denormals too.
        """
        zeros = f"T.Broadcast(T.uint8(0), {self.width})"
        bias = f"T.float32({2.0**120!r})"
        return [
            self._float(bits, f" * {bias}")
            for words in self._words(codes, zeros)
            for bits in (
                f"T.shift_left({words}, T.uint32(20))",
                f"T.shift_left(T.bitwise_and({words}, T.uint32({0xFFFF0000})), T.uint32(4))",
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
        if self.lookup:
            return self._words(self._looked_up(_LOW, nibbles), self._looked_up(_TOP, nibbles))
        words = self._words(nibbles, f"T.Broadcast(T.uint8(0), {self.width})")
        return [self._computed(word) for word in words]

    def _looked_up(self, magnitudes: tuple[int, ...], nibbles: str) -> str:
        n = self.width
        sign = 0x80 if magnitudes is _TOP else 0
        table = bytes((*magnitudes, *(m | sign for m in magnitudes)))
        numbers = [int.from_bytes(table[i : i + 4], "little") for i in (0, 4, 8, 12)] * (n // 16)
        parts = ", ".join(f"T.uint32({number})" for number in numbers)
        constant = f'T.reinterpret("uint8x{n}", T.Shuffle([{parts}], {list(range(n // 4))}))'
        call = f'T.call_llvm_pure_intrin("uint8x{n}", "{self.lookup}", {constant}, {nibbles})'
        return self.writer.value("found", call, n, "uint8")

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
            self.writer.value(
                "words",
                f'T.reinterpret("{kind}", T.Shuffle([{low}, {high}], {self._interleaving(half)}))',
                self.part,
                "uint32",
            )
            for half in (0, 1)
        ]

    def _interleaving(self, half: int) -> list[int]:
        """Which bytes of two vectors a half is made of, as unpacking instructions take them: from every 16 bytes 8."""
        n = self.width
        own = [lane + half * 8 + i for lane in range(0, n, 16) for i in range(8)]
        return [index for i in own for index in (i, n + i)]

    def _float(self, bits: str, factor: str = "") -> str:
        kind = lanes_of("float32", self.part)
        return self.writer.value("v", f'T.reinterpret("{kind}", {bits}){factor}', self.part)
