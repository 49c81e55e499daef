"""Products with weights in NVFP4, decoded as they are read.

A panel of b output features is bytes [K/2, b], two codes each (even k in the low half), and scales [K/16, b];
`nemoc.codegen.tvm.e2m1` decodes it in registers. One row of x is multiplied by what comes out of that at once: the sums
of a block of 16 meet its scale when they are complete. For more rows the panel is decoded once, into a local array of
bf16, which the ordinary product then reads; code times block scale has six significant bits, so bf16 holds it exactly.
The scale of the matrix meets the sums.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from nemoc.codegen.plan import Arg, Plan, RegionError, Site
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body
from nemoc.codegen.tvm.e2m1 import Decoder
from nemoc.codegen.tvm.elementwise import unflatten
from nemoc.codegen.tvm.linear import PANEL_BYTES, Product, RowBlock, Sink, Strip, prefetch
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.ops import DequantizeNvfp4, GroupedLinear, Linear
from nemoc.ir.types import Value

_DECODED = Tunable("decoded", 6, (2, 4, 6, 12, 24), keeps_bits=False)
"""Rows of x from which on decoding a panel beforehand pays."""


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
    """A weight unpacked, for whoever needs it as a whole: one code after the other.

    Raises:
        RegionError: codes are in the order of bits that is for GPUs.
    """
    op = site.op
    assert isinstance(op, DequantizeNvfp4)
    if op.spread:
        raise RegionError(f"%{op.packed.name}: spread codes are for GPUs, expected those of files")
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
class PackedProduct(Product):
    """Writes the product of rows of x and a panel of w, which is packed.

    Attributes:
        packed: the weight.
        decoder: how codes are decoded.
    """

    packed: Packed
    decoder: Decoder

    @classmethod
    def of_packed(
        cls,
        writer: KernelWriter,
        target: CpuTarget,
        op: Linear | GroupedLinear,
        packed: Packed,
        decoder: Decoder,
        sink: Sink,
    ) -> Self:
        """The product of an op with a weight that the region unpacks."""
        plain = Product.of(writer, target, op, packed.codes, sink)
        fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        return cls(**fields, packed=packed, decoder=decoder)

    @property
    def columns(self) -> int:
        """Output features that are decoded at once."""
        return self.decoder.width

    def write(self, block: RowBlock, panel: str, group: str = "") -> None:
        which = group if self.packed.stacked else "0"
        scale = self.writer.value("whole", self.writer.load(self.packed.tensor_scale, which))
        scaled = dataclasses.replace(self, sink=self._scaled(scale))
        scaled.write_panel(block, panel, f"{group}, {panel}, " if group else f"{panel}, ")

    def write_panel(self, block: RowBlock, panel: str, at: str) -> None:
        """A block of rows times one panel, whose indices in w are `at`; the sink scales sums."""
        raise NotImplementedError

    @contextmanager
    def strips(self, panel: str, at: str) -> Iterator[Strip]:
        """A loop over the columns of a panel that are decoded at once."""
        width = self.columns
        with self.writer.loop("s", self.b // width) as s:
            column = self.writer.let("column", f"{s} * {width}")
            yield Strip(panel, at, column, width // self.lanes)

    def codes(self, strip: Strip, pair: str) -> tuple[str, str]:
        """The codes of two neighbouring k of a strip, a byte each."""
        index = f"{strip.at}{pair}, {strip.column}"
        return self.decoder.nibbles(self.bytes(self.packed.codes, index, self.columns))

    def scales(self, strip: Strip, k: str) -> list[str]:
        """The scales of a block, in the decoder's order."""
        index = f"{strip.at}{k}, {strip.column}"
        return self.decoder.scales(self.bytes(self.packed.scales, index, self.columns))

    def store_ordered(self, acc: str, rows: int, row: str, strip: Strip) -> None:
        """Hand the sums of some rows, each four vectors in the decoder's order, to the sink."""
        writer, wide = self.writer, strip.wide
        ordered = writer.local("ordered", rows * wide, self.lanes)
        for i in range(rows):
            vectors = [f"{acc}[{4 * i + v}]" for v in range(4)]
            for j, vector in enumerate(self.decoder.ordered(vectors, self.lanes)):
                writer.line(f"{ordered}[{i * wide + j}] = {vector}")
        self.store(ordered, rows, row, strip)

    def _scaled(self, scale: str) -> Sink:
        """The sink of sums that the scale of the matrix is still missing from."""
        writer, sink = self.writer, self.sink
        sign = "/" if self.packed.divides else "*"

        def put(row: str, column: str, sums: str, lanes: int) -> None:
            whole = scale if lanes == 1 else f"T.Broadcast({scale}, {lanes})"
            sink.put(row, column, writer.value("y", f"{sums} {sign} {whole}", lanes), lanes)

        return dataclasses.replace(sink, put=put)

    def bytes(self, buffer: str, index: str, count: int) -> str:
        """So many codes or scales as they are stored."""
        loaded = self.writer.load(buffer, index, count, raw=True)
        return self.writer.value("bytes", loaded, count, "uint8")


@dataclass(frozen=True)
class FloatProduct(PackedProduct):
    """The product with rows of float32."""

    def write_panel(self, block: RowBlock, panel: str, at: str) -> None:
        if 2 * self.k * self.b > PANEL_BYTES:
            self._row_by_row(block, panel, at)
            return
        few = int(_DECODED.default) if self.few else self.writer.pick(_DECODED)
        with self.writer.block(f"if {block.count} < {few}:"):
            self._row_by_row(block, panel, at)
        with self.writer.block("else:"):
            unpacked = self._unpacked(at)
            fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Product)}
            decoded = Product(**fields | {"w": unpacked})
            decoded.write_strip(block, Strip(panel, "", "0", self.b // self.lanes))

    def _row_by_row(self, block: RowBlock, panel: str, at: str) -> None:
        decoder = self.decoder.local_to(f"{panel} + {block.count}")
        local = dataclasses.replace(self, decoder=decoder)
        with self.writer.loop("t", block.count) as t, self.strips(panel, at) as strip:
            local._row(block, f"{block.first} + {t}", strip)

    def _row(self, block: RowBlock, row: str, strip: Strip) -> None:
        """One row by the columns that are decoded at once."""
        writer, decoder, part = self.writer, self.decoder, self.decoder.part
        first = writer.let("row", row)
        element = block.tile(first, 1)
        # More sums, such as one for even and one for odd k, would have constants and `acc` leave the registers.
        acc, sums = writer.local("acc", 4, part), writer.local("sums", 4, part)
        zero = f"T.Broadcast(T.float32(0), {part})"
        with writer.loop("v", 4, "T.unroll") as v:
            writer.line(f"{acc}[{v}] = {zero}")
        with writer.loop("k", self.k // BLOCK) as k:
            with writer.loop("v", 4, "T.unroll") as v:
                writer.line(f"{sums}[{v}] = {zero}")
            with writer.loop("j", BLOCK // 2) as j:
                pair = writer.let("pair", f"{k} * {BLOCK // 2} + {j}")
                prefetch(writer, self.packed.codes, f"{strip.at}{pair}, 0")
                for half, nibbles in enumerate(self.codes(strip, pair)):
                    x = element("0", f"{k} * {BLOCK} + {j} * 2 + {half}")
                    xs = writer.value("xs", f"T.Broadcast({x}, {part})", part)
                    for i, numbers in enumerate(decoder.numbers(nibbles)):
                        at = f"{sums}[{i}]"
                        writer.line(f"{at} = {at} + {numbers} * {xs}")
            for i, scales in enumerate(self.scales(strip, k)):
                writer.line(f"{acc}[{i}] = {acc}[{i}] + {sums}[{i}] * {scales}")
        self.store_ordered(acc, 1, first, strip)

    def _unpacked(self, at: str) -> str:
        """The panel as a local array of bf16 [K, b], without the scale of the matrix; returns its name."""
        writer, decoder, lanes = self.writer, self.decoder, self.lanes
        local = writer.matrix("panel", self.k, self.b, DType.BF16)
        with self.strips("", at) as strip, writer.loop("k", self.k // BLOCK) as k:
            scales = self.scales(strip, k)
            with writer.loop("j", BLOCK // 2) as j:
                pair = writer.let("pair", f"{k} * {BLOCK // 2} + {j}")
                for half, nibbles in enumerate(self.codes(strip, pair)):
                    products = zip(decoder.numbers(nibbles), scales, strict=True)
                    names = [writer.value("w", f"{n} * {s}", decoder.part) for n, s in products]
                    for i, vector in enumerate(decoder.ordered(names, lanes)):
                        to = f"{pair} * 2 + {half}, {strip.column} + {i * lanes}"
                        writer.store_exact(local, to, vector, lanes)
        return local
