"""Attention of one token, vectorised along the elements of cached rows, where few query heads share each of them.

Lanes that hold query heads (`nemoc.codegen.tvm.attention`) are mostly idle where two or five heads share a kv head.
Here a vector is a piece of a cached row, which all query heads of its kv head use; what is left is to sum along lanes,
for as many rows at once as there are lanes, so that each sum takes three instructions:

    for each block of cached rows, of each kv head:
        s[g, rows] = Σ k[row, d] · q[g, d]: partial sums of four rows folded in pairs, and these again
        m' = max(m, max s);  p = exp(s − m');  l ← l · exp(m − m') + Σ p
        o[g, d] ← o[g, d] · exp(m − m') + Σ p[g, row] · v[row, d];  m ← m'

As there, a task takes a part of the cached rows with all their heads, and leaves (o, m, l) in scratch; a second launch
merges the parts.
"""

from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.flash import FLOOR, MASKED
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import prefetch
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.attention import Attention
from nemoc.ir.types import TensorType

ROWS = {
    lanes: Tunable("rows", 16 if lanes == 16 else 32, (16, 32, 64), keeps_bits=False)
    for lanes in (4, 8, 16)
}
"""Cached rows of a block, by the lanes of vectors: on a Zen 4 fewer are better where vectors are whole cache lines."""

_MOST_SHARED = {4: 2, 8: 5, 16: 5}
"""Query heads of a kv head up to which this form is taken, by the lanes of vectors.

With 8 and 16 lanes it was faster up to there on a Zen 4; with 4 it takes fewer instructions.
"""

_Y = Arg("result", 0)
_SUMS = Arg("scratch", 0)
_SOFTMAX = Arg("scratch", 1)


def takes(site: Site, target: CpuTarget) -> bool:
    """Whether this form is for an attention of one token: rows are whole vectors, and few heads share them.

    A row of D elements takes D vectors where lanes are heads, and here D / lanes for each head and the folding.
    """
    view, lanes = site.view(site.arg("k")), target.lanes
    shared = int(site.view(_Y).shape[2]) // int(view.shape[2])
    unit = all(site.view(site.arg(name)).strides[-1] == 1 for name in "qkv")
    return unit and int(view.shape[3]) % lanes == 0 and shared <= _MOST_SHARED[lanes]


def emit_attention_step(site: Site, target: CpuTarget, splits: int, rows_per_split: int) -> Plan:
    """The plan of an `Attention` with one token for which `takes` says so.

    Args:
        site, target: as for any emitter.
        splits: parts of the cached rows at most.
        rows_per_split: cached rows of a part at least.
    """
    batch, _, heads, width = site.view(_Y).shape
    kv_heads = int(site.view(site.arg("k")).shape[2])
    shared = int(heads) // kv_heads
    lanes = next(n for n in (4, 8, 16) if n >= shared)
    sums = View.dense(TensorType.of(DType.F32, (batch, splits, kv_heads, shared, width)))
    softmax = View.dense(TensorType.of(DType.F32, (batch, splits, kv_heads, 2, lanes)))
    split, merge = (
        _Step(KernelWriter(f"attention_step_{stem}", site.choices), site, target, lanes)
        for stem in ("split", "merge")
    )
    parts = (splits, rows_per_split)
    stages = (split.split(sums, softmax, *parts), merge.merge(sums, softmax, *parts))
    return Plan(stages, scratch=(sums, softmax))


class _Step:
    """Writes the two kernels.

    Args:
        writer: the kernel.
        site: the attention op.
        target: the CPU.
        heads_wide: lanes of vectors of query heads, at least as many as share a kv head.
    """

    def __init__(
        self, writer: KernelWriter, site: Site, target: CpuTarget, heads_wide: int
    ) -> None:
        assert isinstance(site.op, Attention)
        self._w, self._site, self._scale = writer, site, site.op.scale
        self._wide, self._heads_wide = target.lanes, heads_wide
        self._batch, _, heads, width = site.view(_Y).shape
        self._kv_heads, self._width = int(site.view(site.arg("k")).shape[2]), int(width)
        self._shared = int(heads) // self._kv_heads
        self._pieces = self._width // self._wide
        self._rows = writer.pick(ROWS[self._wide])
        turns = -(-self._shared // ((target.registers - 4) // 4))
        self._together = -(-self._shared // turns)
        """Query heads at a time: four rows of each are summed in registers."""
        room = target.registers // (self._together + 1)
        self._columns = max(n for n in (1, 2, 4, 8) if self._pieces % n == 0 and n <= max(1, room))
        """Vectors of a row of o at a time, for as many heads."""

    def split(self, sums: View, softmax: View, splits: int, least: int) -> Stage:
        """o, m and l over one part of the cached rows; nothing for a part without rows."""
        w = self._w
        part = w.let("split", f"task % {splits}")
        self._b = w.let("b", f"task // {splits}")
        reach, size = self._parts(splits, least)
        start = w.let("start", f"{part} * {size}")
        with w.block(f"if {start} >= {reach}:"):
            w.line("return 0")
        end = w.let("end", f"T.min({start} + {size}, {reach})")
        self._begin()
        with w.loop("block", f"({end} - {start} + {self._rows - 1}) // {self._rows}") as block:
            self._first = w.let("first", f"{start} + {block} * {self._rows}")
            with w.loop("head", self._kv_heads) as head:
                self._score(head, end)
                self._exponentiate(head)
                self._weigh(head, end)
        lead = f"{self._b}, {part}"
        o, state = w.buffer("sums", _SUMS, sums), w.buffer("softmax", _SOFTMAX, softmax)
        every, wide = VectorMath(w, self._wide), self._heads_wide
        with w.loop("head", self._kv_heads) as head:
            with w.loop("g", self._shared) as g, w.loop("c", self._pieces) as c:
                at = self._ramp(self._o_at(head, g, f"{c} * {self._wide}"), self._wide)
                index = f"{lead}, {head}, {g}, {c} * {self._wide}"
                w.store(o, index, f"{self._o}[{at}]", self._wide)
            for own in range(self._shared):
                total = every.total(f"{self._l}[{head} * {self._shared} + {own}]")
                w.line(f"{self._top}[{own}] = {total}")
            kept = f"{self._m}[{self._ramp(f'{head} * {wide}', wide)}]"
            w.store(state, f"{lead}, {head}, 0, 0", kept, wide)
            w.store(state, f"{lead}, {head}, 1, 0", f"{self._top}[{self._ramp('0', wide)}]", wide)
        return w.finish(product((self._batch, splits)))

    def merge(self, sums: View, softmax: View, splits: int, least: int) -> Stage:
        """y from the parts: their o scaled to a common maximum, summed, and divided by the sum of their l."""
        w, wide = self._w, self._heads_wide
        math = VectorMath(w, wide)
        head = w.let("head", f"task % {self._kv_heads}")
        self._b = w.let("b", f"task // {self._kv_heads}")
        reach, size = self._parts(splits, least)
        count = w.let("count", f"({reach} + {size} - 1) // {size}")
        o, state = w.buffer("sums", _SUMS, sums), w.buffer("softmax", _SOFTMAX, softmax)
        y = w.buffer("y", _Y, self._site.view(_Y))
        weights, totals = w.local("weights", splits * wide), w.local("totals", wide)
        top = w.value("top", math.const(MASKED), wide)
        with w.loop("s", count) as s:
            w.line(f"{top} = T.max({top}, {w.load(state, f'{self._b}, {s}, {head}, 0, 0', wide)})")
        total = w.value("total", math.const(0.0), wide)
        with w.loop("s", count) as s:
            rest = f"{w.load(state, f'{self._b}, {s}, {head}, 0, 0', wide)} - {top}"
            weight = math.exp(w.value("rest", rest, wide))
            w.line(f"{weights}[{self._ramp(f'{s} * {wide}', wide)}] = {weight}")
            own = w.load(state, f"{self._b}, {s}, {head}, 1, 0", wide)
            w.line(f"{total} = {total} + {weight} * {own}")
        w.line(f"{totals}[{self._ramp('0', wide)}] = {total}")
        with w.loop("g", self._shared) as g, w.loop("c", self._pieces) as c:
            acc = w.value("acc", VectorMath(w, self._wide).const(0.0), self._wide)
            with w.loop("s", count) as s:
                index = f"{self._b}, {s}, {head}, {g}, {c} * {self._wide}"
                weight = f"T.Broadcast({weights}[{s} * {wide} + {g}], {self._wide})"
                w.line(f"{acc} = {acc} + {weight} * {w.load(o, index, self._wide)}")
            index = f"{self._b}, 0, {head} * {self._shared} + {g}, {c} * {self._wide}"
            over = f"T.Broadcast({totals}[{g}], {self._wide})"
            w.store(y, index, f"{acc} / {over}", self._wide)
        return w.finish(product((self._batch, self._kv_heads)))

    def _parts(self, splits: int, least: int) -> tuple[str, str]:
        """The end of the cached rows that the token sees, and rows of each part, as equal as whole blocks allow."""
        w = self._w
        lengths = self._buffer("lengths")
        capacity = size_text(self._site.view(self._site.arg("k")).shape[1])
        reach = w.let("reach", f"T.min({lengths}[{self._b}] + 1, {capacity})")
        together = splits * self._rows
        blocks = f"({reach} + {together - 1}) // {together}"
        return reach, w.let("size", f"T.max({least}, {blocks} * {self._rows})")

    def _begin(self) -> None:
        """Scaled queries; o, m and l of nothing."""
        w, wide = self._w, self._wide
        heads = self._kv_heads * self._shared
        q = self._buffer("q")
        self._k, self._v = self._buffer("k"), self._buffer("v")
        self._q = w.local("queries", heads * self._width)
        self._o = w.local("o", heads * self._width)
        self._l = w.local("l", heads, wide)
        self._m = w.local("m", self._kv_heads * self._heads_wide)
        self._top = w.local("top", self._heads_wide)
        self._alpha = w.local("alpha", self._heads_wide)
        self._p = w.local("p", self._shared * self._rows)
        math = VectorMath(w, wide)
        with w.loop("h", heads) as h:
            with w.loop("c", self._pieces) as c:
                at = self._ramp(f"{h} * {self._width} + {c} * {wide}", wide)
                given = w.load(q, f"{self._b}, 0, {h}, {c} * {wide}", wide)
                w.line(f"{self._q}[{at}] = {given} * {math.const(self._scale)}")
                w.line(f"{self._o}[{at}] = {math.const(0.0)}")
            w.line(f"{self._l}[{h}] = {math.const(0.0)}")
        every = VectorMath(w, self._heads_wide)
        with w.loop("h", self._kv_heads) as h:
            at = self._ramp(f"{h} * {self._heads_wide}", self._heads_wide)
            w.line(f"{self._m}[{at}] = {every.const(MASKED)}")
        w.line(f"{self._top}[{self._ramp('0', self._heads_wide)}] = {every.const(MASKED)}")

    def _score(self, head: str, end: str) -> None:
        """Scores of a block into p, masked behind the last row, and the largest of each query head into top."""
        w, wide = self._w, self._wide
        for begin in range(0, self._shared, self._together):
            heads = range(begin, min(begin + self._together, self._shared))
            largest = {
                g: w.value("largest", VectorMath(w, wide).const(MASKED), wide) for g in heads
            }
            with w.loop("n", self._rows // wide) as n:
                key = w.let("key", f"{self._first} + {n} * {wide}")
                parts: dict[int, list[str]] = {g: [] for g in heads}
                for quad in range(wide // 4):
                    folded = self._four_rows(head, f"({n} * {wide} + {4 * quad})", end, heads)
                    for g, part in folded.items():
                        parts[g].append(part)
                for g in heads:
                    score = self._joined(parts[g])
                    ramp = f"{self._ramp(key, wide)} < T.Broadcast({end}, {wide})"
                    masked = f"T.Select({ramp}, {score}, {VectorMath(w, wide).const(MASKED)})"
                    s = w.value("s", masked, wide)
                    at = self._ramp(f"{g * self._rows} + {n} * {wide}", wide)
                    w.line(f"{self._p}[{at}] = {s}")
                    w.line(f"{largest[g]} = T.max({largest[g]}, {s})")
            for g in heads:
                w.line(f"{self._top}[{g}] = {VectorMath(w, wide).largest(largest[g])}")

    def _four_rows(self, head: str, at: str, end: str, heads: range) -> dict[int, str]:
        """Products of four rows of a block with queries, summed within each four lanes: lane i of four is row i's."""
        w, wide = self._w, self._wide
        rows = [w.let("row", f"T.min({self._first} + {at} + {j}, {end} - 1)") for j in range(4)]
        acc = w.local("acc", 4 * len(heads), wide)
        for i in range(4 * len(heads)):
            w.line(f"{acc}[{i}] = {VectorMath(w, wide).const(0.0)}")
        with w.loop("c", self._pieces) as c:
            for j, row in enumerate(rows):
                index = f"{self._b}, {row}, {head}, {c} * {wide}"
                if heads[0] == 0:
                    self._prefetch(self._k, head, f"({at} + {j})", c)
                x = w.value("x", w.load(self._k, index, wide), wide)
                for i, g in enumerate(heads):
                    place = self._ramp(self._o_at(head, str(g), f"{c} * {wide}"), wide)
                    held = f"{acc}[{i * 4 + j}]"
                    w.line(f"{held} = {held} + {x} * {self._q}[{place}]")
        found = {}
        for i, g in enumerate(heads):
            pairs = [self._within(f"{acc}[{i * 4 + j}]", f"{acc}[{i * 4 + j + 1}]") for j in (0, 2)]
            found[g] = self._within(*pairs)
        return found

    def _prefetch(self, source: str, head: str, row: str, piece: str) -> None:
        """Bring a piece of the next block nearer, as many pieces behind its start as are done of this block."""
        w = self._w
        step = f"(({head} * {self._rows} + {row}) * {self._pieces} + {piece})"
        at = w.let("at", f"{step} * {self._wide}")
        line = self._kv_heads * self._width
        lead = f"{self._b}, {self._first} + {self._rows} + {at} // {line}"
        prefetch(w, source, f"{lead}, {at} % {line} // {self._width}, {at} % {self._width}")

    def _within(self, x: str, y: str) -> str:
        """Neighbouring lanes of two vectors added: of each four lanes, two sums of x and two of y."""
        places = [
            (at, at + 2, self._wide + at, self._wide + at + 2) for at in range(0, self._wide, 4)
        ]
        return self._added(x, y, [lane for four in places for lane in four], 1)

    def _joined(self, parts: list[str]) -> str:
        """One vector of the sums of all rows, in order, from vectors that have a part of the sum in each four lanes."""
        while len(parts) > 1:
            evens = [at + i for at in range(0, 2 * self._wide, 8) for i in range(4)]
            parts = [
                self._added(x, y, evens, 4) for x, y in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    def _added(self, x: str, y: str, lanes: list[int], distance: int) -> str:
        """Some lanes of two vectors, added to those at a distance."""
        one, other = (f"T.Shuffle([{x}, {y}], {[n + d for n in lanes]})" for d in (0, distance))
        return self._w.value("sums", f"{one} + {other}", self._wide)

    def _exponentiate(self, head: str) -> None:
        """p = exp(p − top) with the new maxima; l and m follow; alpha is what o must be scaled by."""
        w, wide = self._w, self._wide
        every = VectorMath(w, self._heads_wide)
        whole = self._ramp("0", self._heads_wide)
        at = self._ramp(f"{head} * {self._heads_wide}", self._heads_wide)
        top = w.value("m", f"T.max({self._m}[{at}], {self._top}[{whole}])", self._heads_wide)
        fall = w.value("fall", every.maximum(f"{self._m}[{at}] - {top}", FLOOR), self._heads_wide)
        w.line(f"{self._alpha}[{whole}] = {every.exp(fall)}")
        w.line(f"{self._top}[{whole}] = {top}")
        w.line(f"{self._m}[{at}] = {top}")
        math = VectorMath(w, wide)
        with w.loop("g", self._shared) as g:
            total = f"{self._l}[{head} * {self._shared} + {g}]"
            w.line(f"{total} = {total} * T.Broadcast({self._alpha}[{g}], {wide})")
            with w.loop("n", self._rows // wide) as n:
                place = self._ramp(f"{g} * {self._rows} + {n} * {wide}", wide)
                below = f"{self._p}[{place}] - T.Broadcast({self._top}[{g}], {wide})"
                e = math.exp(w.value("rest", math.maximum(below, FLOOR), wide))
                w.line(f"{self._p}[{place}] = {e}")
                w.line(f"{total} = {total} + {e}")

    def _weigh(self, head: str, end: str) -> None:
        """o ← o · alpha + Σ p · v over the rows of a block that there are."""
        w, wide, columns = self._w, self._wide, self._columns
        count = w.let("count", f"T.min({self._rows}, {end} - {self._first})")
        for begin in range(0, self._shared, self._together):
            heads = range(begin, min(begin + self._together, self._shared))
            with w.loop("part", self._pieces // columns) as part:
                acc = w.local("acc", len(heads) * columns, wide)
                places = [
                    self._ramp(
                        self._o_at(head, str(g), f"({part} * {columns} + {c}) * {wide}"), wide
                    )
                    for g in heads
                    for c in range(columns)
                ]
                for i, place in enumerate(places):
                    alpha = f"T.Broadcast({self._alpha}[{heads[i // columns]}], {wide})"
                    w.line(f"{acc}[{i}] = {self._o}[{place}] * {alpha}")
                with w.loop("k", count) as k:
                    for c in range(columns):
                        column = f"({part} * {columns} + {c}) * {wide}"
                        if begin == 0:
                            self._prefetch(self._v, head, k, f"({part} * {columns} + {c})")
                        row = w.load(
                            self._v, f"{self._b}, {self._first} + {k}, {head}, {column}", wide
                        )
                        x = w.value("x", row, wide)
                        for i, g in enumerate(heads):
                            held = f"{acc}[{i * columns + c}]"
                            weight = f"T.Broadcast({self._p}[{g * self._rows} + {k}], {wide})"
                            w.line(f"{held} = {held} + {weight} * {x}")
                for i, place in enumerate(places):
                    w.line(f"{self._o}[{place}] = {acc}[{i}]")

    def _o_at(self, head: str, g: str, d: str) -> str:
        """Where element d of a query head lies in arrays of all heads."""
        return f"({head} * {self._shared} + {g}) * {self._width} + {d}"

    def _buffer(self, name: str) -> str:
        arg = self._site.arg(name)
        return self._w.buffer(name, arg, self._site.view(arg))

    def _ramp(self, first: str, lanes: int) -> str:
        return f"T.Ramp({first}, 1, {lanes})"
