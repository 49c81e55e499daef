"""The inner part of attention kernels: a tile of query rows over cached rows, its softmax taken block by block.

Softmax is online (Milakov and Gimelshein, arXiv 1805.02867). For each query row there are the largest exponent so far,
the sum of weights relative to it, and the sum of values times weights:

    e = q · kᵀ · factor;  top' = max(top, max e);  w = exp2(e − top');  past = exp2(top − top')
    total ← total · past + Σ w;  sums ← sums · past + w · v;  top ← top'

Cached rows behind the last one that a tile sees may hold anything. They are never loaded: that row is, in their place.
"""

import math
from dataclasses import dataclass, replace

from nemoc.codegen.plan import RegionError
from nemoc.codegen.triton.body import Body, narrowest
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.writer import power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.ops import Attention
from nemoc.ir.types import Value


@dataclass(frozen=True)
class Attended:
    """The attention of a region.

    Attributes:
        op, result: the op and what it makes.
        q, k, v: its operands, seen through casts that only widen.
        kv_heads: heads of k and v.
        group: query heads that share a kv head.
        width: D.
    """

    op: Attention
    result: Value
    q: Value
    k: Value
    v: Value
    kv_heads: int
    group: int
    width: int

    @classmethod
    def of(cls, graph: Graph) -> "Attended":
        """The one attention of a body.

        Raises:
            RegionError: there is none, or another, or heads have no fixed width.
        """
        found = [node for node in graph.nodes if isinstance(node.op, Attention)]
        if len(found) != 1:
            raise RegionError(f"there are {len(found)} attentions")
        (node,) = found
        op = node.op
        assert isinstance(op, Attention)
        heads, width = op.q.shape[2:]
        kv_heads = op.k.shape[2]
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(width, int)):
            raise RegionError(f"%{op.q.name} has heads of no fixed width")
        q, k, v = (narrowest(graph, value) for value in (op.q, op.k, op.v))
        return cls(op, node.results[0], q, k, v, kv_heads, heads // kv_heads, width)

    @property
    def batch(self) -> Dim:
        """Sequences."""
        return self.op.q.shape[0]

    @property
    def length(self) -> Dim:
        """Tokens of a sequence."""
        return self.op.q.shape[1]

    @property
    def capacity(self) -> Dim:
        """Rows of the cache."""
        return self.op.k.shape[1]

    @property
    def mean_seen(self) -> Dim:
        """Cached rows that a token sees where the cache is full at the end, on average."""
        return dim(self.capacity - self.length + ceil_div(self.length, 2))

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def columns(self) -> int:
        """Columns of tiles: D, or the next size that tiles can have."""
        return max(16, power_of_two(self.width))

    @property
    def factor(self) -> float:
        """What scores are multiplied by to be exponents of 2; above 0, so that the largest score has the largest."""
        return (self.op.scale if self.op.scale > 0 else 1.0) * math.log2(math.e)


class Flash:
    """Writes the online softmax of a tile of query rows.

    `attend` may follow `attend`; `top`, `total` and `sums` name what there is so far.

    Args:
        body: of the region.
        made: its attention.
        rows: the tile's place among rows of q, without columns.
        keys: cached rows of a block.
        batch, head: the tile's sequence and kv head.

    Attributes:
        writer: the kernel.
        place: the tile of a result.
        top, total: [rows], as above.
        sums: [rows, columns].
    """

    def __init__(
        self, body: Body, made: Attended, rows: Place, keys: int, batch: str, head: str
    ) -> None:
        self.writer = writer = body.writer
        self._body, self._made, self._keys = body, made, keys
        self.place = body.span("0", made.columns, made.width, rows)
        self._queries, self._narrow = self._load_queries(rows)
        before = f"tl.cast({batch}, tl.int64) * {size_text(made.capacity)}"
        self._first = writer.let("first_row", f"{before} * {made.kv_heads} + {head}")
        lowest = 'float("-inf")'
        self.top = writer.fresh("top", f"tl.full([{rows.rows}], {lowest}, tl.float32)")
        self.total = writer.fresh("total", f"tl.zeros([{rows.rows}], tl.float32)")
        shape = f"[{rows.rows}, {made.columns}]"
        self.sums = writer.fresh("sums", f"tl.zeros({shape}, tl.float32)")

    def attend(self, start: str, full: str, stop: str, limit: str) -> None:
        """Take in the cached rows from `start` to `stop`.

        Args:
            start, full: numbers of cached rows at which a block begins, start ≤ full. All query rows see every row
                between the two.
            stop: the end of the rows that any query row sees.
            limit: the last row that each query row sees, [rows, 1] or a number: from `start` on, before `stop`.
        """
        writer = self.writer
        with writer.loop("key", full, start, self._keys) as key:
            self._attend_block(key)
        with writer.loop("key", stop, full, self._keys) as key:
            self._attend_block(key, stop, limit)

    def _load_queries(self, rows: Place) -> tuple[str, DType]:
        """The tile of queries, and its element type."""
        writer, made = self.writer, self._made
        seen = Seen(made.q, made.width)
        self._body.prepare(seen, rows)
        tile = self._filled(made.q, self.place)
        if made.op.scale > 0:
            return tile, made.q.dtype
        # The factor of exponents has to be above 0; rare enough to cost what it does.
        scaled = f"{tile}.to(tl.float32) * {made.op.scale!r}"
        return writer.let("queries", scaled), DType.F32

    def _attend_block(self, key: str, stop: str = "", limit: str = "") -> None:
        """Take in one block of cached rows: whole, or up to `stop` and each query row's limit."""
        writer, made = self.writer, self._made
        number = writer.let("number", f"{key} + tl.arange(0, {self._keys})[:, None]")
        if stop:
            number = writer.let("number", f"tl.minimum({number}, {stop} - 1)")
        row = writer.let("row", f"{self._first} + {number} * {made.kv_heads}")
        rows = Place(row, "0", self._keys, 1)
        scores = writer.let("scores", self._scores(rows))
        if stop:
            across = f"{key} + tl.arange(0, {self._keys})[None, :]"
            seen = writer.let("seen", f"{across} <= {limit}")
            scores = writer.let("scores", f'tl.where({seen}, {scores}, float("-inf"))')
        self._take_in(scores, rows)

    def _scores(self, rows: Place) -> str:
        """q · kᵀ of a block."""
        made = self._made
        zeros = f"tl.zeros([{self.place.rows}, {self._keys}], tl.float32)"
        self._body.prepare(Seen(made.k, made.width), rows)
        keys = self._filled(made.k, self._whole(rows))
        q, k = self._narrow, made.k.dtype
        if q == k:
            return f"dot({self._queries}, tl.trans({keys}), {zeros})"
        if q == DType.F32 and k == DType.BF16:
            return f"dot_wide({self._queries}, tl.trans({keys}), {zeros})"
        wide = f"tl.trans({keys}.to(tl.float32))"
        return f"dot({self._queries}.to(tl.float32), {wide}, {zeros})"

    def _take_in(self, scores: str, rows: Place) -> None:
        """Bring `top`, `total` and `sums` up to date with the scores and values of a block."""
        writer, made = self.writer, self._made
        factor = repr(made.factor)
        top = f"tl.maximum({self.top}, tl.max({scores}, axis=1) * {factor})"
        top = writer.let("higher", top)
        past = writer.let("past", f"tl.exp2({self.top} - {top})")
        weights = writer.let("weights", f"tl.exp2({scores} * {factor} - {top}[:, None])")
        writer.line(f"{self.total} = {self.total} * {past} + tl.sum({weights}, axis=1)")
        self._body.prepare(Seen(made.v, made.width), rows)
        values = self._filled(made.v, self._whole(rows))
        call = "dot_near" if made.v.dtype == DType.BF16 else "dot"
        if made.v.dtype not in (DType.BF16, DType.F32):
            values = f"{values}.to(tl.float32)"
        writer.line(f"{self.sums} = {call}({weights}, {values}, {self.sums} * {past}[:, None])")
        writer.line(f"{self.top} = {top}")

    def _whole(self, rows: Place) -> Place:
        """Whole rows of the cache."""
        at = self.place
        return replace(rows, column=at.column, columns=at.columns, mask=at.mask)

    def _filled(self, value: Value, place: Place) -> str:
        """A tile of q, k or v with zeros beyond the rows' ends, whatever became of them before."""
        tile = self._body.tile(Seen(value, self._made.width), place)
        if not place.mask or self._body.is_operand(value):
            return tile
        return self.writer.let("filled", f"tl.where({place.mask}, {tile}, 0.0)")
