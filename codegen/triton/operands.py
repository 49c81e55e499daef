"""Operands of products: tiles of them as the loop over the reduction multiplies them, and what is left for its sums.

An element of NVFP4 is code · s · g (`nemoc.ir.nvfp4`). The tensor scale g is one number for a whole row of activations,
or for a whole matrix of weights, so it is applied to sums, and the loop sees code · s alone: as codes and scales where
the target multiplies these, otherwise as bf16, which holds all its bits.
"""

from dataclasses import dataclass

from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.row_ops import row_op, scale_of
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.ops import DequantizeNvfp4, Reshape, TakeRows
from nemoc.ir.types import Value

_THROUGH = (Reshape, TakeRows)
"""The ops whose elements are elements of what they read first."""


def is_packed(graph: Graph, value: Value) -> bool:
    """Whether a value's rows are what rows of codes stand for, not rounded."""
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

    def scaled(self, sums: str, rows: Place) -> str:
        """Sums of products times what tiles of these rows leave out."""
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

    def parts(self, place: Place) -> tuple[str, str]:
        """Tiles of codes by twos [rows, columns / 2] and of E4M3 bits [rows, columns / 16], for a tile of columns."""
        op, seen, at = self._source(place)
        found = []
        for value, each in ((op.packed, 2), (op.scales, BLOCK)):
            width = seen.width // each
            there = self.body.resized(at, at.columns // each, width)
            found.append(self.body.tile(Seen(value, width), there))
        codes, scales = found
        return codes, scales

    def tile(self, place: Place) -> str:
        codes, scales = self.parts(place)
        text = f"nvfp4_units({codes}, {scales}, {place.rows}, {place.columns // BLOCK})"
        return self.body.writer.let("units", text)

    def scaled(self, sums: str, rows: Place) -> str:
        op, _, at = self._source(rows)
        scale = self.body.tile(*scale_of(self.body, op, at))
        by = "/" if DIALECTS[op.dialect].divides else "*"
        return self.body.writer.let("scaled", f"{sums} {by} {scale}")

    def _source(self, place: Place) -> tuple[DequantizeNvfp4, Seen, Place]:
        """What decodes the elements at a place, and where in its result they are."""
        seen = self.seen
        while True:
            op = self.body.graph.producers[seen.value].op
            if isinstance(op, DequantizeNvfp4):
                return op, seen, place
            ((seen, place),) = row_op(op).sources(self.body, op, seen, place)


def operand(body: Body, seen: Seen) -> Operand:
    """An operand as the loop over the reduction takes it."""
    return (Packed if is_packed(body.graph, seen.value) else Operand)(body, seen)
