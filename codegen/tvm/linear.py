"""Matrix products with weights: `linear` and `grouped_linear`.

An interleaved weight [⌈N/b⌉, K, b] is a row of panels, each b output features wide and contiguous in memory. A tile is
some rows of x times one panel: its sums stay in registers over the whole of K, a step of which loads one row of the
panel, widens it, and multiplies it by one element of each row of x. Many rows make the tile bound by arithmetic, one
row by the bandwidth of reading the panel, which a prefetch some KiB ahead brings near that of plain reading.

Rows are taken in tiles of three heights, so any number of them works. Sums run in the order of k (in a few
interleaved chains in low tiles), in f32 with fused multiply-add.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from nemoc.codegen.plan import Arg, Plan, Site, View
from nemoc.codegen.rows import Rows
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.place import ramp, rows_view
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, symbols_of
from nemoc.ir.dims import product as count_rows
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.ops.linear import GroupedLinear, Linear
from nemoc.ir.types import Value

_AHEAD = Tunable("ahead", 4096, (0, 1024, 2048, 4096, 8192, 16384))
"""Bytes between a load of a panel and the prefetch issued with it; 0: none is issued."""

_BLOCK_KIB = Tunable("block_kib", 1024, (256, 512, 1024, 2048))
"""KiB of x that one task may go through for each panel: they should stay in the L2 cache."""

_BLOCK_ROWS = Tunable("block_rows", 240, (48, 96, 240, 480))
"""Rows of x in one task at most."""

PANELS = Tunable("panels", 1, (1, 2, 4, 8))
"""Panels that a task takes of a weight without groups, rows of x being in memory."""

_SUMS = Tunable("sums", 8, (4, 8, 16), keeps_bits=False)
"""Vectors of sums under way at least in low tiles, whose sums go in several chains if they have fewer columns."""

_WIDENED = Tunable("widened", 12, (4, 6, 12, 24, 48))
"""Rows of x from which on widening a panel of FP8 beforehand pays."""

PANEL_BYTES = 1 << 20
"""Bytes of a panel that is decoded beforehand at most: it lies on the stack."""

_LEAST_TASKS = 32
"""Tasks at least into which whole panels are divided, where there are so many."""

_FEATURE_BLOCK = 16
"""Output features of one task of a product with plain rows."""


def emit_linear(site: Site, target: CpuTarget) -> Plan:
    """The plan of `linear` or `grouped_linear`: one launch."""
    op = site.op
    assert isinstance(op, Linear | GroupedLinear)
    reason = obstacle(op, target)
    if reason is not None:
        raise NemocError(f"the cpu target has no {reason}")
    x = rows_view(site.view(site.arg("x")), Rows.of(op.x))
    y = rows_view(site.results[0], Rows.of(Value("y", *op.result_types())))
    if op.interleave == 1:
        return _plain(site, x, y, target)
    writer = KernelWriter(op.mnemonic(), site.choices)
    source = StoredRows(writer, writer.buffer("x", site.arg("x"), x))
    w = writer.buffer("w", site.arg("w"), site.view(site.arg("w")))
    lanes = panel_lanes(op, target)
    sink = stored(writer, writer.buffer("y", Arg("result", 0), y), lanes)
    product = Product.of(writer, target, op, w, sink)
    if isinstance(op, Linear):
        panels = Panels(product.panels, writer.pick(PANELS))
        tasks = write_row_blocks(product, source, y.shape[0], panels)
    else:
        offsets = writer.buffer("offsets", site.arg("offsets"), site.view(site.arg("offsets")))
        panels = Panels(product.panels, most_panels(product))
        write_groups(product, source, offsets, op.w.shape[0], panels)
        tasks = panels.tasks
    return Plan((writer.finish(tasks),))


def obstacle(op: Linear | GroupedLinear, target: CpuTarget) -> str | None:
    """What the product is that no kernel carries out, and what would be; none when there is one."""
    allowed = (DType.F32, DType.BF16, DType.F16)
    weights = (*allowed, DType.F8E4M3)
    if op.acc != DType.F32 or op.x.dtype not in allowed or op.w.dtype not in weights:
        return (
            f"{op.mnemonic()} of {op.x.dtype} by {op.w.dtype} in {op.acc}, "
            f"expected f32, bf16 or f16 operands, weights in f8e4m3 too, and acc f32"
        )
    if op.interleave % panel_lanes(op, target):
        return (
            f"{op.mnemonic()} of weights interleaved by {op.interleave}, "
            f"expected a multiple of {target.lanes}"
        )
    return None


def _tile(low: int, wide: int) -> tuple[Tunable, Tunable, Tunable]:
    """Rows and vectors of the highest tile, and steps that are written out in it.

    Which rows are left for low tiles depends on its rows, so these keep bits if low tiles have one chain of sums, too.

    Args:
        low: rows of a low tile.
        wide: vectors of a panel.
    """
    one_chain = low * wide >= int(_SUMS.default)
    return (
        Tunable("tile_rows", 3 * low, (2 * low, 3 * low, 4 * low), keeps_bits=one_chain),
        Tunable("tile_vectors", 2, (1, 2, 4)),
        Tunable("unroll", 2, (1, 2, 4)),
    )


def panel_lanes(op: Linear | GroupedLinear, target: CpuTarget) -> int:
    """Output features of a vector: no more than a panel has."""
    return min(target.lanes, op.interleave)


@dataclass(frozen=True)
class Panels:
    """The panels of a weight, cut into parts for tasks.

    Attributes:
        count: how many there are.
        each: how many make up a part; the last part may have fewer.
    """

    count: int
    each: int = 1

    @property
    def tasks(self) -> int:
        """How many parts there are."""
        return -(-self.count // self.each)

    @contextmanager
    def loop(self, writer: KernelWriter, part: str) -> Iterator[str]:
        """A block of statements for each panel of a part, given the part's number."""
        if self.each == 1:
            yield writer.let("panel", part)
            return
        start = writer.let("start", f"{part} * {self.each}")
        with writer.loop("p", f"T.min({self.each}, {self.count} - {start})") as p:
            yield writer.let("panel", f"{start} + {p}")


def most_panels(product: "Product", tasks: int = _LEAST_TASKS) -> int:
    """As many panels in a part as leave so many tasks, or what was tuned."""
    least = product.writer.pick(Tunable("least_tasks", tasks, (4, 8, 16, 32, 64)))
    return -(-product.panels // least)


def write_row_blocks(product: "Product", source: "RowSource", rows: Dim, panels: Panels) -> Dim:
    """A task goes through a block of rows with its panels; returns how many tasks there are.

    Args:
        product: of a weight without groups.
        source: where rows of x come from.
        rows: how many there are.
        panels: how they are divided.
    """
    writer = product.writer
    block = _row_block(product)
    blocks = ceil_div(rows, block)
    # Panels before rows: a thread's consecutive tasks then read one stretch of the weight, which the
    # memory delivers a quarter faster than every other panel, and each thread has all rows to do.
    part = writer.let("part", f"task // {size_text(blocks)}")
    first = writer.let("first", f"task % {size_text(blocks)} * {block}")
    count = writer.let("count", f"T.min({block}, {size_text(rows)} - {first})")
    write_panels(product, source, first, count, panels, part)
    return dim(panels.tasks * blocks)


def write_groups(
    product: "Product", source: "RowSource", offsets: str, groups: Dim, panels: Panels
) -> None:
    """A task takes its panels of every group that has rows.

    Args:
        product: of a weight with groups.
        source: where rows of x come from.
        offsets: the buffer that says where groups begin.
        groups: how many there are.
        panels: how they are divided; as many tasks.
    """
    writer = product.writer
    with writer.loop("g", size_text(groups)) as group:
        first = writer.let("first", writer.load(offsets, group))
        count = writer.let("count", f"{writer.load(offsets, f'{group} + 1')} - {first}")
        with writer.block(f"if {count} > 0:"):
            write_panels(product, source, first, count, panels, "task", group)


def write_panels(
    product: "Product",
    source: "RowSource",
    first: str,
    count: str,
    panels: Panels,
    part: str,
    group: str = "",
) -> None:
    """Rows `first` to `first + count` times a part of the panels, of one group when w has groups."""
    writer = product.writer
    with source.at_hand(first, count) as block, panels.loop(writer, part) as panel:
        product.write(block, panel, group)


def _row_block(product: "Product") -> int:
    """Rows of x that a task goes through, a multiple of the highest tile."""
    writer, high = product.writer, product.high
    rows, kib = (
        tunable.default if product.few else writer.pick(tunable)
        for tunable in (_BLOCK_ROWS, _BLOCK_KIB)
    )
    fitting = min(int(rows), (int(kib) << 10) // (4 * product.k))
    return max(high, fitting // high * high)


Element = Callable[[str, str], str]
"""An element of x within a tile: `(row of the tile, k) -> expression`, f32."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of x that are at hand.

    Attributes:
        first: the number of the first one, int32.
        count: how many.
        tile: begins a tile of so many of them, from one on: `(row, rows) -> elements`.
    """

    first: str
    count: str
    tile: Callable[[str, int], Element]


class RowSource(Protocol):
    """Where rows of x come from."""

    def at_hand(self, first: str, count: str) -> AbstractContextManager[RowBlock]:
        """A block of statements for each block of the rows `first` to `first + count`."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of a buffer.

    Attributes:
        writer: the kernel.
        buffer: the name of a buffer of rank 2.
    """

    writer: KernelWriter
    buffer: str

    @contextmanager
    def at_hand(self, first: str, count: str) -> Iterator[RowBlock]:
        """All rows are."""
        yield RowBlock(first, count, self.tile)

    def tile(self, row: str, rows: int) -> Element:
        """Begins a tile, as `RowBlock.tile`."""
        return lambda i, k: self.writer.load(self.buffer, f"{row} + {i}, {k}")


@dataclass(frozen=True)
class GatheredRows(StoredRows):
    """Rows of a buffer that an index chooses, their numbers looked up once for a tile.

    Attributes:
        number: writes which row of the buffer a row of x is, int32.
    """

    number: Callable[[str], str]

    def tile(self, row: str, rows: int) -> Element:
        picks = self.writer.local("picks", rows, dtype="int32")
        with self.writer.loop("i", rows, "T.unroll") as i:
            self.writer.line(f"{picks}[{i}] = {self.number(f'{row} + {i}')}")
        return lambda i, k: self.writer.load(self.buffer, f"{picks}[{i}], {k}")


@contextmanager
def row_blocks(
    writer: KernelWriter, first: str, count: str, most: int
) -> Iterator[tuple[str, str]]:
    """A loop over the rows `first` to `first + count`, at most `most` at once: the first of them, and how many."""
    with writer.loop("t", f"({count} + {most - 1}) // {most}") as t:
        start = writer.let("start", f"{first} + {t} * {most}")
        yield start, writer.let("some", f"T.min({most}, {first} + {count} - {start})")


def rows_in_matrix(matrix: str, first: str, count: str) -> RowBlock:
    """Rows in local memory.

    Args:
        matrix: what `KernelWriter.matrix` returned.
        first: the number of its first row, int32.
        count: how many rows it has.
    """

    def tile(row: str, rows: int) -> Element:
        return lambda i, k: f"{matrix}[{row} + {i} - {first}, {k}]"

    return RowBlock(first, count, tile)


@dataclass(frozen=True)
class Sink:
    """Where a product's sums go.

    Attributes:
        put: writes what becomes of sums: `(row, column, sums, lanes)`, the first's row and column being int32.
        lanes: sums that are put at once: those of a vector of the product, or 1.
        repeats: whether `put` writes so little that it is written out for every vector of a tile; otherwise the tile
            goes to memory and is put from there in a loop.
    """

    put: Callable[[str, str, str, int], None]
    lanes: int
    repeats: bool = False


def stored(writer: KernelWriter, buffer: str, lanes: int) -> Sink:
    """Sums stored to a buffer of rank 2, as many at once as a vector of the product has."""

    def put(row: str, column: str, sums: str, n: int) -> None:
        writer.store(buffer, f"{row}, {column}", sums, n)

    return Sink(put, lanes, repeats=True)


@dataclass(frozen=True)
class Product:
    """Writes the product of rows of x and a panel of w.

    Attributes:
        writer: the kernel.
        w: the name of w's buffer.
        sink: where sums go.
        n, k, b: output features, reduction width, features per panel.
        lanes: f32 elements per vector.
        low: rows of a low tile; fewer go one by one.
        high: rows of the highest tile, a multiple of that: so what is summed in which order does not depend on it.
        vectors: of columns that the highest tile has at once.
        unroll: steps of the reduction that are written out in the highest tile.
        few: whether rows are the sequences of a batch in a step of one token.
    """

    writer: KernelWriter
    w: str
    sink: Sink
    n: int
    k: int
    b: int
    lanes: int
    low: int
    high: int
    vectors: int
    unroll: int
    few: bool

    @classmethod
    def of(
        cls,
        writer: KernelWriter,
        target: CpuTarget,
        op: Linear | GroupedLinear,
        w: str,
        sink: Sink,
    ) -> Self:
        """The product of an op with an interleaved weight, in which there is no `obstacle`."""
        *_, k, b = op.w.shape
        n = op.width
        assert isinstance(k, int) and isinstance(b, int) and isinstance(n, int)
        low = 4 if target.registers >= 32 else 2
        few = symbols_of(count_rows(op.x.shape[:-1])) == {"B"}
        high, vectors, unroll = (
            int(tunable.default) if few else writer.pick(tunable)
            for tunable in _tile(low, b // panel_lanes(op, target))
        )
        writer.require(
            few or vectors * (high + 1) < target.registers,
            f"a tile of {high} rows by {vectors} vectors takes more than {target.registers} registers",
        )
        lanes = panel_lanes(op, target)
        return cls(writer, w, sink, n, k, b, lanes, low, high, vectors, unroll, few)

    @property
    def panels(self) -> int:
        """How many panels a weight has."""
        return -(-self.n // self.b)

    def write(self, block: RowBlock, panel: str, group: str = "") -> None:
        """A block of rows times one panel, of one group when w has groups."""
        at = f"{group}, {panel}, " if group else f"{panel}, "
        strip = Strip(panel, at, "0", self.b // self.lanes)
        if self.writer.dtype(self.w) != DType.F8E4M3 or 2 * self.k * self.b > PANEL_BYTES:
            self.write_strip(block, strip)
            return
        few = int(_WIDENED.default) if self.few else self.writer.pick(_WIDENED)
        with self.writer.block(f"if {block.count} < {few}:"):
            self.write_strip(block, strip)
        with self.writer.block("else:"):
            wide = dataclasses.replace(self, w=self._widened(strip))
            wide.write_strip(block, dataclasses.replace(strip, at=""))

    def _widened(self, strip: "Strip") -> str:
        """A panel as a local array of bf16 [K, b], which holds E4M3 numbers exactly; returns its name."""
        writer, lanes = self.writer, self.lanes
        local = writer.matrix("panel", self.k, self.b, DType.BF16)
        with writer.loop("k", self.k) as k, writer.loop("v", strip.wide, "T.unroll") as v:
            number = writer.load(self.w, f"{strip.at}{k}, {v} * {lanes}", lanes, weight=True)
            writer.store_exact(local, f"{k}, {v} * {lanes}", number, lanes)
        return local

    def write_strip(self, block: RowBlock, strip: "Strip") -> None:
        """A block of rows times some columns of a panel."""
        writer, low = self.writer, self.low
        first, count = block.first, block.count
        with writer.loop("t", f"{count} // {self.high}") as t:
            self._high_tile(block, f"{first} + {t} * {self.high}", strip)
        done = writer.let("done", f"{first} + {count} // {self.high} * {self.high}")
        with writer.loop("t", f"{count} % {self.high} // {low}") as t:
            self._tile(block, low, f"{done} + {t} * {low}", strip)
        rest = writer.let("rest", f"{count} % {low}")
        with writer.loop("t", rest) as t:
            self._tile(block, 1, f"{first} + {count} - {rest} + {t}", strip)

    def _high_tile(self, block: RowBlock, row: str, strip: "Strip") -> None:
        """A tile of the full height, in strips of some vectors, as many sums as there are registers for."""
        wide = math.gcd(self.vectors, strip.wide)
        strips = strip.wide // wide
        if strips == 1:
            self._tile(block, self.high, row, strip)
            return
        with self.writer.loop("s", strips) as s:
            column = self.writer.let("column", f"{s} * {wide * self.lanes}")
            narrow = dataclasses.replace(strip, column=column, wide=wide)
            self._tile(block, self.high, row, narrow)

    def _tile(self, block: RowBlock, rows: int, row: str, strip: "Strip") -> None:
        """`rows` rows by a strip, all sums in registers."""
        writer, lanes, wide = self.writer, self.lanes, strip.wide
        chains = max(1, writer.pick(_SUMS) // (rows * wide)) if rows < self.high else 1
        unroll = self.unroll if rows == self.high else chains
        first = writer.let("row", row)
        element = block.tile(first, rows)
        acc = writer.local("acc", chains * rows * wide, lanes)
        weights = writer.local("wv", wide, lanes)
        with writer.loop("i", chains * rows * wide, "T.unroll") as i:
            writer.line(f"{acc}[{i}] = T.Broadcast(T.float32(0), {lanes})")

        def step(k: str, chain: str) -> None:
            if strip.at and rows < self.high:
                prefetch(writer, self.w, f"{strip.at}{k}, 0")
            with writer.loop("v", wide, "T.unroll") as v:
                column = f"{strip.column} + {v} * {lanes}"
                value = writer.load(self.w, f"{strip.at}{k}, {column}", lanes, weight=True)
                writer.line(f"{weights}[{v}] = {value}")
            with writer.loop("i", rows, "T.unroll") as i:
                xs = writer.value("xs", f"T.Broadcast({element(i, k)}, {lanes})", lanes)
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
        self.store(acc, rows, first, strip)

    def store(self, acc: str, rows: int, row: str, strip: "Strip") -> None:
        """Hand a tile to the sink; in the last panel, only the columns that exist."""
        writer, wide, width = self.writer, strip.wide, strip.wide * self.lanes
        start = writer.let("start", f"{strip.panel} * {self.b} + {strip.column}")
        from_registers = self.sink.repeats and self.sink.lanes == self.lanes
        tile = "" if from_registers else self._spill(acc, rows * wide)

        def whole() -> None:
            if from_registers:
                self._put_registers(acc, rows, wide, row, start)
            else:
                self._put_tile(tile, rows, width, row, start, str(width), self.sink.lanes)

        if self.n % self.b == 0:
            whole()
            return
        with writer.block(f"if {start} + {width} <= {self.n}:"):
            whole()
        with writer.block("else:"):
            some = tile or self._spill(acc, rows * wide)
            self._put_tile(some, rows, width, row, start, f"{self.n} - {start}", 1)

    def _put_registers(self, acc: str, rows: int, wide: int, row: str, start: str) -> None:
        """Hand over the sums of all columns of a tile, each vector by statements of its own."""
        writer, lanes = self.writer, self.lanes
        with writer.loop("i", rows, "T.unroll") as i, writer.loop("v", wide, "T.unroll") as v:
            value = f"{acc}[{i} * {wide} + {v}]"
            self.sink.put(f"{row} + {i}", f"{start} + {v} * {lanes}", value, lanes)

    def _put_tile(
        self, tile: str, rows: int, width: int, row: str, start: str, count: str, lanes: int
    ) -> None:
        """Hand over the sums of `count` columns of a tile in memory, in a loop."""
        columns = count if lanes == 1 else f"{count} // {lanes}"
        with self.writer.loop("i", rows) as i, self.writer.loop("j", columns) as j:
            at = j if lanes == 1 else f"{j} * {lanes}"
            value = f"{tile}[{ramp(f'{i} * {width} + {at}', lanes)}]"
            self.sink.put(f"{row} + {i}", f"{start} + {at}", value, lanes)

    def _spill(self, acc: str, vectors: int) -> str:
        """Copy sums from registers to memory; returns the array."""
        writer, lanes = self.writer, self.lanes
        tile = writer.local("tile", vectors * lanes)
        with writer.loop("i", vectors, "T.unroll") as i:
            writer.line(f"{tile}[T.Ramp({i} * {lanes}, 1, {lanes})] = {acc}[{i}]")
        return tile


def prefetch(writer: KernelWriter, buffer: str, index: str) -> None:
    """Fetch the line that lies some bytes behind an element, which may be past the buffer's end."""
    distance = writer.pick(_AHEAD)
    if distance == 0:
        return
    ahead = f"T.handle_add_byte_offset(T.address_of({buffer}[{index}]), {distance})"
    hint = "T.int32(0), T.int32(3), T.int32(1)"
    writer.line(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", {ahead}, {hint}))')


@dataclass(frozen=True)
class Strip:
    """Columns of one panel.

    Attributes:
        panel: the panel's number in its weight.
        at: its indices in w, each with a comma behind it; empty for a panel by itself, in local memory.
        column: the strip's first column in the panel.
        wide: how many vectors of columns.
    """

    panel: str
    at: str
    column: str
    wide: int


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
        return Plan((writer.finish(tasks),))
    offsets = writer.buffer("offsets", site.arg("offsets"), site.view(site.arg("offsets")))
    with writer.loop("g", size_text(w.shape[0])) as group:
        start = writer.let("start", writer.load(offsets, group))
        rows = writer.let("rows", f"{writer.load(offsets, f'{group} + 1')} - {start}")
        dot.write(f"{group}, ", start, rows, first, count)
    return Plan((writer.finish(tasks),))


@dataclass(frozen=True)
class _Dot:
    """Writes dot products of rows of x and rows of w.

    Attributes:
        writer: the kernel.
        x, w, y: names of the buffers.
        k: reduction width.
        lanes: elements per vector.
    """

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
                b = writer.load(self.w, f"{lead}{feature}, {k} * {lanes}", lanes, weight=True)
                writer.line(f"{sums} = {sums} + {a} * {b}")
            total = writer.value("total", VectorMath(writer, lanes).total(sums))
            with writer.loop("k", self.k % lanes) as k:
                index = f"{self.k // lanes * lanes} + {k}"
                a = writer.load(self.x, f"{row}, {index}")
                b = writer.load(self.w, f"{lead}{feature}, {index}", weight=True)
                writer.line(f"{total} = {total} + {a} * {b}")
            writer.store(self.y, f"{row}, {feature}", total)
