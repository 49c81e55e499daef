"""The inner part of attention kernels: online softmax of tiles of query rows over a range of cached rows."""

from nemoc.codegen.plan import Arg, Site
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import prefetch, vector_pieces
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.ops.attention import Attention

KEYS = Tunable("keys", 16, (8, 16, 32), keeps_bits=False)
"""Cached rows of a block: a power of 2, as the depths of register tiles are."""

MASKED = -1e30
"""The score of a row that is not seen: finite, so that no difference of scores is NaN."""

FLOOR = -80.0
"""Exponents are clamped here: 2e-35 of the largest weight is nothing, and denormal numbers would be slow."""


class Flash:
    """Writes the parts of an attention kernel.

    Row r of a kv head is token r // shared and query head r % shared of those that share it. A task has tiles of rows
    that follow each other, of one kv head or of several: then it reads cached rows once for all of them. `begin` names
    the first, `load_queries` and `attend` do the work, `store_result` or `store_state` end it.

    Attributes:
        writer: the kernel.
        site: the attention op.
        lanes: lanes of every vector.
        rows: query rows of a tile.
        keys: cached rows of a block.
        shared: query heads of each kv head.
        kv_heads: how many kv heads there are.
        heads: kv heads of a task; each has a tile, or one has several.
        tiles: tiles of a task at most, of one kv head.
        width: D.
        batch, head, reach: names, after `begin`: the row of the batch, the first kv head, and the end of the cached
            rows that any row of the task sees.
    """

    def __init__(
        self,
        writer: KernelWriter,
        site: Site,
        target: CpuTarget,
        lanes: int,
        vectors: int,
        heads: int = 1,
        tiles: int = 1,
    ) -> None:
        assert isinstance(site.op, Attention)
        self.writer, self.site, self.lanes = writer, site, lanes
        self.rows = lanes * vectors
        self.kv_heads, self.width = (int(n) for n in site.view(site.arg("k")).shape[2:])
        self.shared = int(site.view(site.arg("q")).shape[2]) // self.kv_heads
        self._scale = site.op.scale
        self.heads, self.tiles = heads, tiles
        self._all = max(heads, tiles)
        self._lanes_wide = target.lanes
        self._vectors = vectors
        self.keys = writer.pick(KEYS)
        self._deep = 1 << max(0, (target.registers // (2 * vectors)).bit_length() - 1)
        writer.require(
            self.keys >= self._deep, f"{self.keys} keys, fewer than a tile of {self._deep} takes"
        )
        self._math = VectorMath(writer, lanes)

    def begin(self, batch: str, head: str, first: str, tiles: str = "1") -> None:
        """Name the task's row of the batch, first kv head, first query row and, if it has one head, number of tiles."""
        w = self.writer
        self._count = w.let("tiles", tiles) if self.tiles > 1 else str(self.heads)
        lengths = self._buffer("lengths")
        length, capacity = (size_text(self.site.view(self.site.arg(a)).shape[1]) for a in "qk")
        self.batch, self.head = w.let("b", batch), w.let("head", head)
        self._first = w.let("first", first)
        self._cached = w.let("cached", f"{lengths}[{self.batch}]")
        rows = str(self.rows) if self.tiles == 1 else f"{self._count} * {self.rows}"
        token = f"({self._first} + {rows} - 1) // {self.shared}"
        last = w.let("last", f"T.min({token}, {length} - 1)")
        self.reach = w.let("reach", f"T.min({self._cached} + {last} + 1, {capacity})")

    def load_queries(self) -> None:
        """Copy the scaled queries into tiles [D, rows], zeros past the last token, and set each row's limit."""
        w = self.writer
        q = self._buffer("q")
        self._queries = w.local("queries", self._all * self.width * self.rows)
        self._limits = w.local("limits", self._all * self.rows, dtype="int32")
        with w.loop("i", self._count) as i, w.loop("r", self.rows) as r:
            t, h, inside = self._token(i, r)
            limit = f"T.min({self._cached} + {t}, {self.reach} - 1)"
            w.line(f"{self._limits}[{i} * {self.rows} + {r}] = {limit}")
            with w.loop("d", self.width) as d:
                value = f"{w.load(q, f'{self.batch}, {t}, {h}, {d}')} * T.float32({self._scale!r})"
                guarded = f"T.if_then_else({inside}, {value}, T.float32(0))"
                at = f"({i} * {self.width} + {d}) * {self.rows} + {r}"
                w.line(f"{self._queries}[{at}] = {guarded}")

    def attend(self, start: str, end: str) -> None:
        """o, m and l over the cached rows from start to end, of which each query row sees at least the first."""
        w, vectors = self.writer, self._vectors
        self._k_tile, self._v_tile = (
            w.local(name, self.keys * self.width) for name in ("k_tile", "v_tile")
        )
        self._p = w.local("p", self.keys * self.rows)
        self._o = w.local("o", self._all * self.width * self.rows)
        self._m, self._l = (w.local(name, self._all * vectors, self.lanes) for name in "ml")
        self._top, self._alpha = (w.local(name, vectors, self.lanes) for name in ("top", "alpha"))
        self._k, self._v = self._buffer("k"), self._buffer("v")
        with w.loop("j", f"{self._count} * {self.width * vectors}") as j:
            w.line(f"{self._o}[{self._ramp(f'{j} * {self.lanes}')}] = {self._math.const(0.0)}")
        with w.loop("j", f"{self._count} * {vectors}") as j:
            w.line(f"{self._m}[{j}] = {self._math.const(MASKED)}")
            w.line(f"{self._l}[{j}] = {self._math.const(0.0)}")
        with w.loop("block", f"({end} - {start} + {self.keys - 1}) // {self.keys}") as block:
            key = w.let("key", f"{start} + {block} * {self.keys}")
            count = w.let("count", f"T.min({self.keys}, {end} - {key})")
            groups = w.let("groups", f"({count} + {self._deep - 1}) // {self._deep}")
            with w.loop("head", self.heads) as head:
                self._fill(self._k, self._k_tile, head, key, count, groups)
                self._fill(self._v, self._v_tile, head, key, count, groups)
                if self.tiles == 1:
                    self._take(head, key, groups)
                else:
                    self._take_seen(key, groups)

    def store_result(self, result: Arg) -> None:
        """y = o / l of the rows that are tokens, where the task has one kv head."""
        w, vectors = self.writer, self._vectors
        y = w.buffer("y", result, self.site.view(result))
        scale = w.local("scale", self.rows)
        with w.loop("i", self._count) as i:
            for m in range(vectors):
                at = self._ramp(str(m * self.lanes))
                w.line(
                    f"{scale}[{at}] = {self._math.const(1.0)} / {self._l}[{i} * {vectors} + {m}]"
                )
            with w.loop("r", self.rows) as r:
                t, h, inside = self._token(i, r)
                with w.block(f"if {inside}:"), w.loop("d", self.width) as d:
                    o = f"{self._o}[({i} * {self.width} + {d}) * {self.rows} + {r}]"
                    w.store(y, f"{self.batch}, {t}, {h}, {d}", f"{o} * {scale}[{r}]")

    def store_state(self, sums: str, softmax: str, lead: str) -> None:
        """For each head i of the task, o into `sums[lead, i]` and m and l into `softmax[lead, i]`."""
        w, lanes, vectors = self.writer, self.lanes, self._vectors
        with w.loop("i", self.heads) as i:
            with w.loop("j", self.width * vectors) as j:
                o = f"{self._o}[{self._ramp(f'({i} * {self.width * vectors} + {j}) * {lanes}')}]"
                w.store(sums, f"{lead}, {i}, {j} * {lanes}", o, lanes)
            for m in range(vectors):
                for which, name in enumerate((self._m, self._l)):
                    value = f"{name}[{i} * {vectors} + {m}]"
                    w.store(softmax, f"{lead}, {i}, {which}, {m * lanes}", value, lanes)

    def _take_seen(self, key: str, groups: str) -> None:
        """A block of cached rows into each tile with a row that sees any of them."""
        w = self.writer
        with w.loop("i", self._count) as i:
            furthest = f"{self._limits}[{i} * {self.rows} + {self.rows - 1}]"
            with w.block(f"if {key} <= {furthest}:"):
                self._take(i, key, groups)

    def _take(self, i: str, key: str, groups: str) -> None:
        """A block of cached rows into o, m and l of a tile."""
        self._score(i, key, groups)
        self._exponentiate(i, groups)
        whole = self.width // self._deep
        with self.writer.loop("j", whole) as j:
            self._weigh(i, f"{j} * {self._deep}", self._deep, key, groups)
        if self.width % self._deep:
            self._weigh(i, str(whole * self._deep), self.width % self._deep, key, groups)

    def _fill(self, source: str, to: str, head: str, key: str, count: str, groups: str) -> None:
        """Cached rows as f32 into an array [keys, D], zeros up to the end of the last group."""
        w = self.writer
        view = self.site.view(self.site.arg("k"))
        widest = self._lanes_wide if view.strides[-1] == 1 else 1
        pieces = list(vector_pieces(self.width, widest))
        for rows, filled in ((count, True), (f"{groups} * {self._deep} - {count}", False)):
            with w.loop("k", rows) as k:
                for lanes, vectors, first in pieces:
                    with w.loop("j", vectors) as j:
                        d = f"{first} + {j} * {lanes}"
                        row = k if filled else f"({count} + {k})"
                        at = f"{row} * {self.width} + {d}"
                        at = at if lanes == 1 else f"T.Ramp({at}, 1, {lanes})"
                        index = f"{self.batch}, {key} + {k}, {self.head} + {head}, {d}"
                        zero = VectorMath(w, lanes).const(0.0)
                        value = w.load(source, index, lanes) if filled else zero
                        w.line(f"{to}[{at}] = {value}")

    def _score(self, i: str, key: str, groups: str) -> None:
        """Masked scores into p, their maxima and m into top."""
        w, lanes, vectors = self.writer, self.lanes, self._vectors
        for m in range(vectors):
            w.line(f"{self._top}[{m}] = {self._m}[{i} * {vectors} + {m}]")
        with w.loop("group", groups) as group:
            acc = w.local("acc", self._deep * vectors, lanes)
            with w.loop("j", self._deep * vectors, "T.unroll") as j:
                w.line(f"{acc}[{j}] = {self._math.const(0.0)}")
            with w.loop("d", self.width) as d:
                done = f"({i} * {self.keys // self._deep} + {group}) * {self.width} + {d}"
                self._prefetch(self._k, key, done)
                q = self._vector_row(self._queries, f"({i} * {self.width} + {d})")
                with w.loop("j", self._deep, "T.unroll") as j:
                    element = f"{self._k_tile}[({group} * {self._deep} + {j}) * {self.width} + {d}]"
                    self._accumulate(acc, j, element, q)
            with w.loop("j", self._deep, "T.unroll") as j:
                row = w.let("row", f"{group} * {self._deep} + {j}")
                for m in range(vectors):
                    limit = f"{self._limits}[{self._ramp(f'{i} * {self.rows} + {m * lanes}')}]"
                    seen = f"T.Broadcast({key} + {row}, {lanes}) <= {limit}"
                    at = f"{j} * {vectors} + {m}"
                    masked = f"T.Select({seen}, {acc}[{at}], {self._math.const(MASKED)})"
                    s = w.value("s", masked, lanes)
                    w.line(f"{self._p}[{self._ramp(f'{row} * {self.rows} + {m * lanes}')}] = {s}")
                    w.line(f"{self._top}[{m}] = T.max({self._top}[{m}], {s})")

    def _exponentiate(self, i: str, groups: str) -> None:
        """p = exp(s − top); l and m follow; alpha is what o must be scaled by."""
        w, lanes, math = self.writer, self.lanes, self._math
        for m in range(self._vectors):
            at = f"{i} * {self._vectors} + {m}"
            old = w.value("old", math.maximum(f"{self._m}[{at}] - {self._top}[{m}]", FLOOR), lanes)
            w.line(f"{self._alpha}[{m}] = {math.exp(old)}")
            w.line(f"{self._l}[{at}] = {self._l}[{at}] * {self._alpha}[{m}]")
            w.line(f"{self._m}[{at}] = {self._top}[{m}]")
        with w.loop("k", f"{groups} * {self._deep}") as k:
            for m in range(self._vectors):
                at = self._ramp(f"{k} * {self.rows} + {m * lanes}")
                rest = math.maximum(f"{self._p}[{at}] - {self._top}[{m}]", FLOOR)
                e = math.exp(w.value("rest", rest, lanes))
                w.line(f"{self._p}[{at}] = {e}")
                total = f"{self._l}[{i} * {self._vectors} + {m}]"
                w.line(f"{total} = {total} + {e}")

    def _weigh(self, i: str, first: str, deep: int, key: str, groups: str) -> None:
        """o ← o · alpha + Σ v · p for `deep` of the D columns."""
        w, vectors = self.writer, self._vectors
        acc = w.local("acc", deep * vectors, self.lanes)
        for out in (False, True):
            with w.loop("j", deep, "T.unroll") as j:
                for m in range(vectors):
                    d = f"({i} * {self.width} + {first} + {j})"
                    at = f"{self._o}[{self._ramp(f'{d} * {self.rows} + {m * self.lanes}')}]"
                    held = f"{acc}[{j} * {vectors} + {m}]"
                    w.line(f"{at} = {held}" if out else f"{held} = {at} * {self._alpha}[{m}]")
            if not out:
                with w.loop("k", f"{groups} * {self._deep}") as k:
                    if deep == self._deep:
                        column = f"({i} * {self.width} + {first}) // {self._deep}"
                        self._prefetch(self._v, key, f"{column} * {self.keys} + {k}")
                    p = self._vector_row(self._p, k)
                    with w.loop("j", deep, "T.unroll") as j:
                        element = f"{self._v_tile}[{k} * {self.width} + {first} + {j}]"
                        self._accumulate(acc, j, element, p)

    def _prefetch(self, source: str, key: str, step: str) -> None:
        """Bring one piece of the next block nearer; the steps of a block go through all its heads and rows in order."""
        if self.heads < self.kv_heads or self.tiles > 1:
            return
        row = self.kv_heads * self.width
        at = self.writer.let("at", f"({step}) * {self._deep}")
        index = f"{self.batch}, {key} + {self.keys} + {at} // {row}, {at} % {row} // {self.width}, {at} % {self.width}"
        prefetch(self.writer, source, index)

    def _accumulate(self, acc: str, j: str, element: str, vectors: list[str]) -> None:
        for m, vector in enumerate(vectors):
            held = f"{acc}[{j} * {len(vectors)} + {m}]"
            self.writer.line(f"{held} = {held} + T.Broadcast({element}, {self.lanes}) * {vector}")

    def _vector_row(self, tile: str, row: str) -> list[str]:
        """The vectors of one row of a tile with `rows` columns."""
        starts = (f"{row} * {self.rows} + {m * self.lanes}" for m in range(self._vectors))
        return [self.writer.value("v", f"{tile}[{self._ramp(at)}]", self.lanes) for at in starts]

    def _token(self, i: str, r: str) -> tuple[str, str, str]:
        """The token and the query head of a row of tile i, and the condition that it is one."""
        w = self.writer
        head = self.head if self.heads == 1 else f"({self.head} + {i})"
        row = r if self.tiles == 1 else f"{i} * {self.rows} + {r}"
        t = w.let("t", f"({self._first} + {row}) // {self.shared}")
        h = w.let("h", f"{head} * {self.shared} + ({self._first} + {row}) % {self.shared}")
        return t, h, f"{t} < {size_text(self.site.view(self.site.arg('q')).shape[1])}"

    def _buffer(self, name: str) -> str:
        arg = self.site.arg(name)
        return self.writer.buffer(name, arg, self.site.view(arg))

    def _ramp(self, first: str) -> str:
        return f"T.Ramp({first}, 1, {self.lanes})"
