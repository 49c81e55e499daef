"""Operands of products: tiles of them as the loop over the reduction multiplies them, and what is left for its sums.

An element of NVFP4 is code · s · g (`nemoc.ir.nvfp4`). The tensor scale g is one number for a whole row of activations,
or for a whole matrix of weights, so it is applied to sums, and the loop sees code · s alone: as codes and scales where
the target multiplies these, otherwise as bf16, which holds all its bits.
"""

from dataclasses import dataclass

from nemoc.codegen.plan import RegionError
from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.row_ops import row_op, scale_of
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.ops import DequantizeNvfp4, Nvfp4ToFp8, Reshape, TakeRows
from nemoc.ir.types import Value

CODES = 8
"""Codes of a word of four bytes."""

WHOLE = Place("0", "0", 1, 1)
"""Where a matrix has what it has one of."""

WORD_UNITS = 2.0**7
"""What `nvfp4_word_units` leaves out of every element."""

EIGHTHS = 2.0**14
"""What `e2m1_eighths` leaves out of every element."""

_THROUGH = (Reshape, TakeRows)
"""The ops whose elements are elements of what they read first."""


def is_packed(graph: Graph, value: Value) -> bool:
    """Whether a value's rows are what rows of codes stand for."""
    width, op = value.shape[-1], _maker(graph, value)
    while isinstance(op, _THROUGH):
        op = _maker(graph, op.operands()[0])
    return isinstance(op, DequantizeNvfp4) and op.interleave == 1 and op.infer().shape[-1] == width


def _maker(graph: Graph, value: Value) -> object:
    return graph.producers[value].op if value in graph.producers else None


@dataclass(frozen=True)
class Operand:
    """An operand of a product, in rows of the reduction.

    Attributes:
        body: what it belongs to.
        seen: the value.
    """

    body: Body
    seen: Seen

    @property
    def dtype(self) -> DType:
        """The element type of tiles."""
        return self.seen.value.dtype

    def prepare(self, rows: Place) -> None:
        """Write what is computed once for whole rows."""
        self.body.prepare(self.seen, rows)

    def tile(self, place: Place) -> str:
        """The elements at a place."""
        return self.body.tile(self.seen, place)

    def numbers(self, place: Place) -> str:
        """The same in f32."""
        return self.body.writer.let("wide", f"{self.tile(place)}.to(tl.float32)")

    def by_words(self, place: Place) -> str:
        """The same of a single row, bf16 by twos where they can be read so: that takes fewer instructions.

        Of weights in bf16 it takes more registers, so that some do not fit.
        """
        value, width = self.seen.value, self.seen.width
        if value.dtype != DType.BF16 or width % 2 or not self.body.has_words(value):
            return self.numbers(place)
        at = self.body.resized(place, place.columns // 2, width // 2)
        words = self.body.words(Seen(value, width // 2), at)
        return self.body.writer.let("wide", f"bf16_numbers({words}, {place.columns})")

    @property
    def left_out(self) -> float:
        """What elements of tiles have to be multiplied by, besides the scale of their rows."""
        return 1.0

    def prepare_scale(self, rows: Place) -> None:
        """Ask for what `scaled` needs ahead of the sums, so that nothing waits for it behind them."""

    def scaled(self, sums: str, rows: Place, left_out: float = 1.0) -> str:
        """Sums of products times the scale of these rows, and what else elements leave out."""
        return sums


class Packed(Operand):
    """An operand for which `is_packed` holds."""

    @property
    def dtype(self) -> DType:
        return DType.BF16

    def prepare(self, rows: Place) -> None:
        op, _, at = self._source(rows)
        for value in (op.packed, op.scales):
            self.body.prepare(Seen(value, int(value.shape[-1])), at)

    def prefetch(self, rows: Place) -> None:
        """Ask for whole rows, before former kernels have ended.

        On an H100 products of one row in a row of kernels took up to 13 % less time; of bf16, whose rows are nearly
        four times as long, up to 17 % more.
        """
        op, seen, at = self._source(rows)
        for value, each in ((op.packed, 2), (op.scales, BLOCK)):
            self.body.prefetch(Seen(value, seen.width // each), at)

    def parts(self, place: Place) -> tuple[str, str]:
        """Tiles of codes by twos [rows, columns / 2] and of E4M3 bits [rows, columns / 16], for a tile of columns.

        Raises:
            RegionError: codes are not in the order of their elements.
        """
        op, seen, at = self._source(place)
        if self.is_spread:
            raise RegionError(f"%{op.packed.name}: spread codes are read eight at a time")
        found = []
        for value, each in ((op.packed, 2), (op.scales, BLOCK)):
            width = seen.width // each
            there = self.body.resized(at, at.columns // each, width)
            found.append(self.body.tile(Seen(value, width), there))
        codes, scales = found
        return codes, scales

    @property
    def has_words(self) -> bool:
        """Whether eight codes can be read at a time, and decoded two at a time."""
        op = self._decoder
        return self.body.has_words(op.packed)

    def words(self, place: Place) -> tuple[str, str]:
        """Tiles of words of eight codes [rows, columns / 8] and of E4M3 bits [rows, columns / 16]."""
        op, seen, at = self._source(place)
        scales, words = (
            (
                Seen(value, seen.width // each),
                self.body.resized(at, at.columns // each, seen.width // each),
            )
            for value, each in ((op.scales, BLOCK), (op.packed, CODES))
        )
        # Scales first: the compiler lays out what follows as it does the tile that it meets last.
        bits = self.body.tile(*scales)
        return self.body.words(*words), bits

    @property
    def is_spread(self) -> bool:
        """Whether codes are as `spread_codes` orders them."""
        op = self._decoder
        return isinstance(op, DequantizeNvfp4) and op.spread

    @property
    def is_direct(self) -> bool:
        """Whether rows are those that codes and scales have in memory, one for one."""
        op = self.body.graph.producers[self.seen.value].op
        return isinstance(op, DequantizeNvfp4) and all(
            self.body.is_operand(value) for value in (op.packed, op.scales)
        )

    @property
    def is_weight(self) -> bool:
        """Whether codes and scales of blocks are weights, which no kernel writes."""
        op = self._decoder
        return self.body.is_weight(op.packed) and self.body.is_weight(op.scales)

    def load_early(self) -> None:
        """Let what is a weight be loaded before former kernels have ended; a dense one's tensor scale is."""
        for value in filter(self.body.is_weight, self._decoder.operands()):
            self.body.writer.load_early(self.body.arg(value))
        op = self._decoder
        if isinstance(op, DequantizeNvfp4) and self.body.is_weight(op.global_scale):
            self.prepare_scale(WHOLE)

    def words_at(self, place: Place) -> str:
        """Words of eight codes, whichever columns of such words a place has."""
        return self.body.words(Seen(self._decoder.packed, self.seen.width // CODES), place)

    def scales_at(self, place: Place) -> str:
        """E4M3 bits of scales, whichever columns of blocks a place has."""
        return self.body.tile(Seen(self._decoder.scales, self.seen.width // BLOCK), place)

    def tile(self, place: Place) -> str:
        if self.has_words:
            codes, scales = self.words(place)
            decode = "nvfp4_spread_units" if self.is_spread else "nvfp4_word_units"
            text = f"{decode}({codes}, {scales}, {place.rows}, {place.columns // BLOCK})"
        else:
            codes, scales = self.parts(place)
            text = f"nvfp4_units({codes}, {scales}, {place.rows}, {place.columns // BLOCK})"
        return self.body.writer.let("units", text)

    @property
    def left_out(self) -> float:
        return WORD_UNITS if self.has_words else 1.0

    def scaled(self, sums: str, rows: Place, left_out: float = 1.0) -> str:
        op = self._decoder
        assert isinstance(op, DequantizeNvfp4)
        by = "/" if DIALECTS[op.dialect].divides else "*"
        wide = sums if left_out == 1.0 else f"{sums} * {left_out!r}"
        return self.body.writer.let("scaled", f"{wide} {by} {self._scale(rows)}")

    def prepare_scale(self, rows: Place) -> None:
        self._scale(rows)

    def _scale(self, rows: Place) -> str:
        """The tensor scale of these rows."""
        op, _, at = self._source(rows)
        assert isinstance(op, DequantizeNvfp4)
        return self.body.tile(*scale_of(self.body, op, at))

    @property
    def _decoder(self) -> DequantizeNvfp4 | Nvfp4ToFp8:
        """What decodes the elements, wherever they are."""
        return self._source(WHOLE)[0]

    def _source(self, place: Place) -> tuple[DequantizeNvfp4 | Nvfp4ToFp8, Seen, Place]:
        """What decodes the elements at a place, and where in its result they are."""
        seen = self.seen
        while True:
            op = self.body.graph.producers[seen.value].op
            if isinstance(op, DequantizeNvfp4 | Nvfp4ToFp8):
                return op, seen, place
            ((seen, place),) = row_op(op).sources(self.body, op, seen, place)


class Fp8(Operand):
    """An operand of E4M3, whose tiles are bf16: it holds all its bits."""

    @property
    def dtype(self) -> DType:
        return DType.BF16

    def bits(self, place: Place) -> str:
        """The elements at a place as they are in memory, u8."""
        return self.body.tile(self.seen, place)

    def native(self, place: Place) -> str:
        """The elements at a place as matrix units take them."""
        if self.body.is_operand(self.seen.value):
            return self.body.fp8(self.seen, place)
        return self.bits(place)

    def tile(self, place: Place) -> str:
        return self.body.writer.let("narrow", f"{self.numbers(place)}.to(tl.bfloat16)")

    def numbers(self, place: Place) -> str:
        return self.body.writer.let("wide", f"from_e4m3({self.bits(place)})")


class Recoded(Fp8):
    """An operand in FP8 that is made of one in NVFP4 (`Nvfp4ToFp8`)."""

    def native(self, place: Place) -> str:
        codes = Packed(self.body, self.seen)
        if not codes.has_words:
            return self.bits(place)
        words, scales = codes.words(place)
        text = f"nvfp4_word_fp8({words}, {scales}, {place.rows}, {place.columns // BLOCK})"
        return self.body.writer.let("recoded", text)


def operand(body: Body, seen: Seen) -> Operand:
    """An operand as the loop over the reduction takes it."""
    if is_packed(body.graph, seen.value):
        return Packed(body, seen)
    if isinstance(_maker(body.graph, seen.value), Nvfp4ToFp8):
        return Recoded(body, seen)
    if seen.value.dtype == DType.F8E4M3:
        return Fp8(body, seen)
    return Operand(body, seen)
