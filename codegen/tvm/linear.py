"""Matrix products with weights: `linear` and `grouped_linear`.

An interleaved weight [⌈N/b⌉, K, b] is a row of panels, each b output features wide and contiguous in memory. A tile is
some rows of x times one panel: its sums stay in registers over the whole of K, a step of which loads one row of the
panel, widens it, and multiplies it by one element of each row of x. Many rows make the tile bound by arithmetic, one
row by the bandwidth of reading the panel, which a prefetch some KiB ahead brings near that of plain reading.

Rows are taken in tiles of three heights, so any number of them works. Sums run in the order of k (in a few
interleaved chains in low tiles), in f32 with fused multiply-add.
"""

from dataclasses import dataclass

from nemoc.codegen.plan import Arg, LayoutError, Plan, Site, View
from nemoc.codegen.tvm.elementwise import merge_axes
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.ops.linear import GroupedLinear, Linear

_AHEAD = 4096
"""Bytes between a load of a panel and the prefetch issued with it."""

_BLOCK_BYTES = 1 << 20
"""Bytes of x that one task may go through for each panel: they should stay in the L2 cache."""

_BLOCK_ROWS = 240
"""Rows of x in one task at most."""

_GROUP_TASKS = 32
"""Tasks of a grouped product at least, where it has so many panels."""

_FEATURE_BLOCK = 16
"""Output features of one task of a product with plain rows."""


def emit_linear(site: Site, target: CpuTarget) -> Plan:
    """The plan of `linear` or `grouped_linear`: one launch."""
    op = site.op
    assert isinstance(op, Linear | GroupedLinear)
    _check_types(site, op)
    x, y = rows_view(site.view(site.arg("x"))), rows_view(site.results[0])
    if op.interleave == 1:
        return _plain(site, x, y, target)
    writer = KernelWriter(op.mnemonic())
    product = _Product.declare(writer, target, site, x, y)
    write = _write_rows if isinstance(op, Linear) else _write_groups
    return Plan((writer.finish(write(product, site)),))


def _write_rows(product: "_Product", site: Site) -> Dim:
    """A task goes through a block of rows with one panel; returns how many tasks there are."""
    writer = product.writer
    rows = rows_view(site.results[0]).shape[0]
    block = _row_block(product.k, product.high)
    panels, blocks = ceil_div(product.n, product.b), ceil_div(rows, block)
    # Panels before rows: a thread's consecutive tasks then read one stretch of the weight, which the
    # memory delivers a quarter faster than every other panel, and each thread has all rows to do.
    panel = writer.let("panel", f"task // {size_text(blocks)}")
    first = writer.let("first", f"task % {size_text(blocks)} * {block}")
    count = writer.let("count", f"T.min({block}, {size_text(rows)} - {first})")
    product.write(first, count, panel)
    return dim(panels * blocks)


def _write_groups(product: "_Product", site: Site) -> Dim:
    """A task takes some panels of every group that has rows; returns how many tasks there are."""
    writer = product.writer
    offsets = writer.buffer("offsets", site.arg("offsets"), site.view(site.arg("offsets")))
    groups = site.view(site.arg("w")).shape[0]
    panels = -(-product.n // product.b)
    each = -(-panels // _GROUP_TASKS)
    with writer.loop("g", size_text(groups)) as group:
        first = writer.let("first", writer.load(offsets, group))
        count = writer.let("count", f"{writer.load(offsets, f'{group} + 1')} - {first}")
        with (
            writer.block(f"if {count} > 0:"),
            writer.loop("p", f"T.min({each}, {panels} - task * {each})") as p,
        ):
            panel = writer.let("panel", f"task * {each} + {p}")
            product.write(first, count, panel, group)
    return -(-panels // each)


def rows_view(view: View) -> View:
    """A view of rank 2, rows by columns, of a tensor of any rank.

    Raises:
        LayoutError: the leading axes have no common stride.
    """
    lead = View(view.dtype, view.shape[:-1], view.strides[:-1])
    (merged,) = merge_axes([lead])
    if merged.rank != 1:
        raise LayoutError(f"rows of {view} have no common stride")
    return View(view.dtype, (*merged.shape, view.shape[-1]), (*merged.strides, view.strides[-1]))


def _check_types(site: Site, op: Linear | GroupedLinear) -> None:
    allowed = (DType.F32, DType.BF16, DType.F16)
    x, w = site.view(site.arg("x")).dtype, site.view(site.arg("w")).dtype
    if op.acc != DType.F32 or x not in allowed or w not in allowed:
        raise NemocError(
            f"the cpu target has no {op.mnemonic()} of {x} by {w} in {op.acc}, "
            f"expected f32, bf16 or f16 operands and acc f32"
        )


def _row_block(k: int, high: int) -> int:
    """Rows of x that a task goes through, a multiple of the highest tile."""
    fitting = min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * k))
    return max(high, fitting // high * high)


@dataclass(frozen=True)
class _Product:
    """Writes the product of rows of x and a panel of w.

    Attributes:
        writer: the kernel.
        x, w, y: names of the buffers; x and y are of rank 2.
        n, k, b: output features, reduction width, features per panel.
        lanes: f32 elements per vector.
        high: rows of the highest tile.
    """

    writer: KernelWriter
    x: str
    w: str
    y: str
    n: int
    k: int
    b: int
    lanes: int
    high: int

    @classmethod
    def declare(
        cls, writer: KernelWriter, target: CpuTarget, site: Site, x: View, y: View
    ) -> "_Product":
        """Declare the three buffers.

        Raises:
            NemocError: the panels are narrower than a vector or ragged.
        """
        w = site.view(site.arg("w"))
        *_, k, b = w.shape
        n = y.shape[1]
        assert isinstance(k, int) and isinstance(b, int) and isinstance(n, int)
        lanes = min(target.lanes, b)
        if b % lanes:
            raise NemocError(
                f"the cpu target needs weights interleaved by a multiple of {lanes}, not {b}"
            )
        return cls(
            writer=writer,
            x=writer.buffer("x", site.arg("x"), x),
            w=writer.buffer("w", site.arg("w"), w),
            y=writer.buffer("y", Arg("result", 0), y),
            n=n,
            k=k,
            b=b,
            lanes=lanes,
            high=12 if target.registers >= 32 else 6,
        )

    def write(self, first: str, count: str, panel: str, group: str = "") -> None:
        """Rows `first` to `first + count` times one panel, of one group when w has groups."""
        writer, low = self.writer, self.high // 3
        at = f"{group}, {panel}" if group else panel
        with writer.loop("t", f"{count} // {self.high}") as t:
            self._high_tile(f"{first} + {t} * {self.high}", panel, at)
        done = writer.let("done", f"{first} + {count} // {self.high} * {self.high}")
        with writer.loop("t", f"{count} % {self.high} // {low}") as t:
            self._tile(low, f"{done} + {t} * {low}", panel, at, "0", self.b // self.lanes)
        rest = writer.let("rest", f"{count} % {low}")
        with writer.loop("t", rest) as t:
            self._tile(1, f"{first} + {count} - {rest} + {t}", panel, at, "0", self.b // self.lanes)

    def _high_tile(self, row: str, panel: str, at: str) -> None:
        """A tile of the full height, in strips of two vectors, as many sums as there are registers for."""
        wide = min(2, self.b // self.lanes)
        strips = self.b // (wide * self.lanes)
        if strips == 1:
            self._tile(self.high, row, panel, at, "0", wide)
            return
        with self.writer.loop("s", strips) as s:
            column = self.writer.let("column", f"{s} * {wide * self.lanes}")
            self._tile(self.high, row, panel, at, column, wide)

    def _tile(self, rows: int, row: str, panel: str, at: str, column: str, wide: int) -> None:
        """`rows` rows by `wide` vectors of columns, all sums in registers."""
        writer, lanes = self.writer, self.lanes
        chains = max(1, 8 // (rows * wide)) if rows < self.high else 1
        unroll = 2 if rows == self.high else chains
        first = writer.let("row", row)
        acc = writer.local("acc", chains * rows * wide, lanes)
        weights = writer.local("wv", wide, lanes)
        with writer.loop("i", chains * rows * wide, "T.unroll") as i:
            writer.line(f"{acc}[{i}] = T.Broadcast(T.float32(0), {lanes})")

        def step(k: str, chain: str) -> None:
            if rows < self.high:
                self._prefetch(f"{at}, {k}, 0")
            with writer.loop("v", wide, "T.unroll") as v:
                value = writer.load(self.w, f"{at}, {k}, {column} + {v} * {lanes}", lanes)
                writer.line(f"{weights}[{v}] = {value}")
            with writer.loop("i", rows, "T.unroll") as i:
                x = writer.load(self.x, f"{first} + {i}, {k}")
                xs = writer.value("xs", f"T.Broadcast({x}, {lanes})", lanes)
                with writer.loop("v", wide, "T.unroll") as v:
                    sum_ = f"{acc}[({chain} * {rows} + {i}) * {wide} + {v}]"
                    writer.line(f"{sum_} = {sum_} + {weights}[{v}] * {xs}")

        with (
            writer.loop("k", self.k // unroll) as k,
            writer.loop("u", unroll, "T.unroll") as u,
        ):
            step(f"{k} * {unroll} + {u}", u if chains > 1 else "0")
        if self.k % unroll:
            with writer.loop("u", self.k % unroll, "T.unroll") as u:
                step(f"{self.k - self.k % unroll} + {u}", u if chains > 1 else "0")
        with (
            writer.loop("c", chains - 1, "T.unroll") as c,
            writer.loop("i", rows * wide, "T.unroll") as i,
        ):
            other = f"{acc}[({c} + 1) * {rows * wide} + {i}]"
            writer.line(f"{acc}[{i}] = {acc}[{i}] + {other}")
        self._store(acc, rows, wide, first, panel, column)

    def _prefetch(self, index: str) -> None:
        """Fetch the line that lies `_AHEAD` bytes behind an element of w, which may be past its end."""
        ahead = f"T.handle_add_byte_offset(T.address_of({self.w}[{index}]), {_AHEAD})"
        hint = "T.int32(0), T.int32(3), T.int32(1)"
        self.writer.line(
            f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", {ahead}, {hint}))'
        )

    def _store(self, acc: str, rows: int, wide: int, row: str, panel: str, column: str) -> None:
        """Store a tile; in the last panel, only the columns that exist."""
        writer, lanes = self.writer, self.lanes
        start = writer.let("start", f"{panel} * {self.b} + {column}")

        def whole() -> None:
            with writer.loop("i", rows, "T.unroll") as i, writer.loop("v", wide, "T.unroll") as v:
                value = f"{acc}[{i} * {wide} + {v}]"
                writer.store(self.y, f"{row} + {i}, {start} + {v} * {lanes}", value, lanes)

        if self.n % self.b == 0:
            whole()
            return
        with writer.block(f"if {start} + {wide * lanes} <= {self.n}:"):
            whole()
        with writer.block("else:"):
            tile = writer.local("tile", rows * wide * lanes)
            with writer.loop("i", rows * wide, "T.unroll") as i:
                writer.line(f"{tile}[T.Ramp({i} * {lanes}, 1, {lanes})] = {acc}[{i}]")
            with writer.loop("i", rows) as i, writer.loop("j", f"{self.n} - {start}") as j:
                value = f"{tile}[{i} * {wide * lanes} + {j}]"
                writer.store(self.y, f"{row} + {i}, {start} + {j}", value)


def _plain(site: Site, x: View, y: View, target: CpuTarget) -> Plan:
    """Weights [N, K] or [E, N, K] with plain rows: one dot product after another along K.

    For weights that no pass has interleaved; it reads every weight once per row of x.
    """
    w = site.view(site.arg("w"))
    writer = KernelWriter(f"{site.op.mnemonic()}_plain")
    names = (
        writer.buffer("x", site.arg("x"), x),
        writer.buffer("w", site.arg("w"), w),
        writer.buffer("y", Arg("result", 0), y),
    )
    features, k = y.shape[1], x.shape[1]
    assert isinstance(features, int) and isinstance(k, int)
    lanes = target.lanes if x.strides[1] == 1 else 1
    tasks = ceil_div(features, _FEATURE_BLOCK)
    first = writer.let("first", f"task * {_FEATURE_BLOCK}")
    count = writer.let("count", f"T.min({_FEATURE_BLOCK}, {features} - {first})")
    dot = _Dot(writer, *names, k, lanes)
    if isinstance(site.op, Linear):
        dot.write("", "0", size_text(x.shape[0]), first, count)
        return Plan((writer.finish(tasks, strided=True),))
    offsets = writer.buffer("offsets", site.arg("offsets"), site.view(site.arg("offsets")))
    with writer.loop("g", size_text(w.shape[0])) as group:
        start = writer.let("start", writer.load(offsets, group))
        rows = writer.let("rows", f"{writer.load(offsets, f'{group} + 1')} - {start}")
        dot.write(f"{group}, ", start, rows, first, count)
    return Plan((writer.finish(tasks, strided=True),))


@dataclass(frozen=True)
class _Dot:
    """Writes dot products of rows of x and rows of w; fields as in `_Product`."""

    writer: KernelWriter
    x: str
    w: str
    y: str
    k: int
    lanes: int

    def write(self, lead: str, start: str, rows: str, first: str, count: str) -> None:
        """Rows `start` to `start + rows` of x by features `first` to `first + count`."""
        writer, lanes = self.writer, self.lanes
        with writer.loop("r", rows) as r, writer.loop("f", count) as f:
            row, feature = writer.let("row", f"{start} + {r}"), writer.let("n", f"{first} + {f}")
            sums = writer.value("sums", VectorMath(writer, lanes).const(0.0), lanes)
            with writer.loop("k", self.k // lanes) as k:
                a = writer.load(self.x, f"{row}, {k} * {lanes}", lanes)
                b = writer.load(self.w, f"{lead}{feature}, {k} * {lanes}", lanes)
                writer.line(f"{sums} = {sums} + {a} * {b}")
            total = writer.value("total", VectorMath(writer, lanes).total(sums))
            with writer.loop("k", self.k % lanes) as k:
                index = f"{self.k // lanes * lanes} + {k}"
                a = writer.load(self.x, f"{row}, {index}")
                b = writer.load(self.w, f"{lead}{feature}, {index}")
                writer.line(f"{total} = {total} + {a} * {b}")
            writer.store(self.y, f"{row}, {feature}", total)
