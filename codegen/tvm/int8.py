"""Products in integers of 16 bits: rows of x rounded to int8, weights in NVFP4.

The instruction multiplies bytes and adds neighbours. For one row that is half the instructions of the product in
float32, and fewer still for several, which share the decoding. Where a CPU has no such instruction the rounded numbers
are multiplied in float32, and where it multiplies words of four bytes, `nemoc.codegen.tvm.dots` is taken instead.
"""

from dataclasses import dataclass

from nemoc.codegen.tvm.e2m1 import OFFSET
from nemoc.codegen.tvm.integers import IntegerBlock, IntegerProduct, steps_of_bytes
from nemoc.codegen.tvm.linear import Strip, prefetch
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import lanes_of
from nemoc.ir.nvfp4 import BLOCK


class Pairs:
    """Rows rounded to int8 (`round_to_int8`); a word is two neighbours as bytes, twice."""

    words = BLOCK // 2
    lanes = BLOCK // 2
    # A code is half an integer, and sums are read where they are 2¹⁶ times what they are.
    unit = 2.0**-17
    steps = staticmethod(steps_of_bytes)

    def packed(self, math: VectorMath, whole: list[str]) -> list[tuple[str, int]]:
        low, high = (
            f"T.bitwise_and(T.Shuffle([{', '.join(whole)}], {list(range(i, BLOCK, 2))}), T.int32(255))"
            for i in (0, 1)
        )
        pair = math.whole("pair", f"T.bitwise_or({low}, T.shift_left({high}, T.int32(8)))")
        return [(f"T.bitwise_or({pair}, T.shift_left({pair}, T.int32(16)))", self.lanes)]

    def starts(self, math: VectorMath, total: str) -> str:
        start = math.whole("start", f"T.bitwise_and({total} * T.int32({-OFFSET}), T.int32(65535))")
        return f"T.bitwise_or({start}, T.shift_left({start}, T.int32(16)))"


@dataclass(frozen=True)
class Int8Product(IntegerProduct):
    """The product with rows that `Pairs` made integers of."""

    def write_rows(self, block: IntegerBlock, row: str, rows: int, strip: Strip) -> None:
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
