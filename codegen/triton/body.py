"""A region's body, evaluated a tile at a time wherever a kernel needs it.

`Body.tile` writes the elements of a value at a place, walking back from the value to what is at hand: operands of the
region in memory, or tiles that the kernel has bound (the sums of a product). So an op that is element-wise needs no
code here or in any kernel to be fused, only a formula, or an expansion into ops that have one;
`nemoc.codegen.triton.row_ops` lists what else can be walked through.
"""

from collections.abc import Callable
from dataclasses import replace

from nemoc.codegen.plan import Arg, RegionError, Site, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.triton.row_ops import row_op
from nemoc.codegen.triton.seen import (
    Place,
    Seen,
    Shape,
    map_index,
    offset,
    pointer_to,
    split_view,
    store_tile,
    wide,
)
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.codegen.views import quotient
from nemoc.ir.dims import Dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import CacheWrite, Cast, Reshape
from nemoc.ir.region import Region
from nemoc.ir.types import TensorType, Value

_LINE = 128
"""Bytes of a line of GPUs' caches."""

LARGEST = 1 << 14
"""Elements of a tile of whole rows at most; longer rows are read in parts."""


class Body:
    """Writes values of a region's body into a kernel.

    Args:
        writer: the kernel.
        site: the region and the views of its operands and results.

    Attributes:
        graph: the body.
        writer, site: as given.
    """

    def __init__(self, writer: KernelWriter, site: Site) -> None:
        self.graph = body_of(site)
        self.writer = writer
        self.site = site
        self._args = {value: Arg("operand", i) for i, value in enumerate(self.graph.inputs)}
        self._bound: dict[Value, Callable[[Seen, Place], str]] = {}
        self._starts: dict[str, str] = {}
        self._blocks: dict[str, str] = {}
        self._present: dict[str, str] = {}

    def is_operand(self, value: Value) -> bool:
        """Whether a value comes from outside the region."""
        return value in self._args

    def arg(self, value: Value) -> Arg:
        """Which operand of the region a value is."""
        return self._args[value]

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a weight, which no kernel writes."""
        return value in self._args and self._args[value].index in self.site.weights

    def view(self, value: Value) -> View:
        """How an operand of the region lies in memory."""
        return self.site.operands[self._args[value].index]

    def bind(self, seen: Seen, place: Place, tile: str) -> None:
        """Say that a value's elements at a place are in a variable; nobody can ask for others."""

        def find(asked: Seen, at: Place) -> str:
            if asked.width != seen.width or (at.row, at.column) != (place.row, place.column):
                raise RegionError(f"%{seen.value.name} is needed elsewhere than where it is made")
            return tile

        self._bound[seen.value] = find

    def leave_out_absent(self, place: Place) -> None:
        """Load 0 for rows of a place that do not exist, not the row that stands for them.

        Where they are many, all programs would read that one over and over at a time: on an H100 a product of 32 rows
        in tiles of 64 took 1.2 to 1.6 times as long as one of 64, and of 4 in tiles of 16 up to 1.7 times as of 16.
        """
        if place.exists:
            self._present[place.row] = place.exists

    def hold(self, value: Value, source: Callable[[Seen, Place], str]) -> None:
        """Say how a value's elements at any place are written."""
        self._bound[value] = source

    def tile(self, seen: Seen, place: Place) -> str:
        """The name of a tile of a value: of the value's own type, at most as large as the place.

        Raises:
            RegionError: the value is not computed row by row, or needs what is not at hand.
        """
        if seen.value in self._bound:
            return self._bound[seen.value](seen, place)
        if seen.value in self._args:
            return self._loaded(seen, place)
        op = self.graph.producers[seen.value].op

        def make() -> str:
            return self.writer.let(op.mnemonic(), row_op(op).tile(self, op, seen, place))

        return self.writer.once(f"%{seen.value.name}/{seen.width}@{place.row},{place.column}", make)

    def prepare(self, seen: Seen, place: Place) -> None:
        """Write what a value needs of whole rows, of the rows of a place: before a loop over columns."""
        if seen.value in self._bound or seen.value in self._args:
            return
        op = self.graph.producers[seen.value].op
        probe = replace(place, column="0", columns=1, mask="")
        for source, at in row_op(op).sources(self, op, seen, probe):
            self.prepare(source, at)
        row_op(op).prepare(self, op, seen, probe)

    def whole(self, width: int, place: Place) -> Place:
        """The tile of whole rows of that width, for the rows of a place.

        Raises:
            RegionError: rows are too long for a tile.
        """
        columns = power_of_two(width)
        if place.rows * columns > LARGEST:
            raise RegionError(f"{place.rows} rows of {width} elements are too many for one tile")
        return self.span("0", columns, width, place)

    def span(self, start: str, columns: int, width: int, place: Place) -> Place:
        """The tile of some columns from `start` on, in rows of a width, for the rows of a place.

        A start other than 0 is a multiple of `columns`.
        """
        base = f"tl.arange(0, {columns})[None, :]"
        column = self.writer.let("column", base if start == "0" else f"{start} + {base}")
        self._starts[column] = start
        whole = width == columns if start == "0" else width % columns == 0
        mask = "" if whole else self.writer.let("inside", f"{column} < {width}")
        return replace(place, column=column, columns=columns, mask=mask)

    def part(self, block: str, columns: int, width: int, place: Place) -> Place:
        """The tile number `block` of so many columns, in rows of a width, for the rows of a place."""
        if block == "0":
            return self.span("0", columns, width, place)
        text = f"{block} * {columns} + tl.arange(0, {columns})[None, :]"
        column = self.writer.let("column", text)
        self._blocks[column] = block
        mask = "" if width % columns == 0 else self.writer.let("inside", f"{column} < {width}")
        return replace(place, column=column, columns=columns, mask=mask)

    def is_run(self, place: Place) -> bool:
        """Whether a tile's columns follow one another from a multiple of their number on."""
        return place.column in self._blocks or place.column in self._starts

    def resized(self, place: Place, columns: int, width: int) -> Place:
        """The tile of so many columns of rows of a width that covers the part of them that a tile covers of its own.

        A place that stands for whole rows stands for those of the other width.

        Raises:
            RegionError: the tile's columns do not follow one another as those of `span`.
        """
        if place.column == "0":
            return place
        block = self._blocks.get(place.column)
        if block is None:
            start = self._starts.get(place.column)
            if start is None:
                raise RegionError(f"columns {place.column} do not follow one another")
            whole = start == "0"
            block = "0" if whole else self.writer.let("block", f"{start} // {place.columns}")
        if not columns:
            raise RegionError(f"{place.columns} columns are too few to be looked at in blocks")
        return self.part(block, columns, width, place)

    def operand_place(self, seen: Seen, operand: Value, place: Place) -> tuple[Seen, Place]:
        """Where elements of a value that is broadcast to another one are.

        Args:
            seen: the value that an element-wise op makes.
            operand: the op's operand.
            place: of the op's result.
        """
        full_lead, full_row = seen.axes
        own = (1,) * (len(seen.value.shape) - operand.type.rank) + operand.shape
        if own == seen.value.shape:
            return Seen(operand, seen.width), place
        lead, row = _cut_alike(own, seen)
        to_row = map_index(self.writer, place.row, full_lead, lead)
        column = map_index(self.writer, place.column, full_row, row)
        width = product(row)
        assert isinstance(width, int)  # of the axes of a row of fixed width
        there = Place(
            to_row,
            column,
            1 if to_row == "0" else place.rows,
            1 if column == "0" else place.columns,
            "" if column == "0" else place.mask,
            place.exists,
        )
        return Seen(operand, width), there

    def store(self, result: int, seen: Seen, place: Place) -> None:
        """Write the tile of a result of the region to memory, where its place exists."""
        tile = self.tile(seen, place)
        view = self.site.results[result]
        pointer = pointer_to(self.writer, Arg("result", result), view, seen.width, place)
        store_tile(self.writer, pointer, tile, place)

    def store_rows(self, result: int, op: CacheWrite, place: Place, width: int) -> None:
        """Write rows of a cache: the tile of `op.rows` at a place, behind what each sequence has cached."""
        cache = self.site.operands[self.arg(op.cache).index]
        length = op.rows.shape[1]
        seen = Seen(op.rows, width)
        tile = self.tile(seen, place)
        writer = self.writer
        across_all = product(op.rows.shape[2:])
        assert isinstance(across_all, int)  # heads and their width
        parts = across_all // width
        token = place.row if parts == 1 else writer.let("token", f"{place.row} // {parts}")
        sequence = writer.let("sequence", f"{token} // {size_text(length)}")
        lengths = self.tile(Seen(op.lengths, 1), replace(place, row=sequence, column="0", mask=""))
        to = writer.let("to", f"{lengths} + {token} % {size_text(length)}")
        column = place.column
        if parts != 1:
            column = writer.let("column", f"{place.row} % {parts} * {width} + {place.column}")
        _, across = split_view(cache, across_all)
        terms = [
            f"{wide(sequence, cache.strides[0], cache.shape[0])} * {size_text(cache.strides[0])}",
            f"{wide(to, cache.strides[1], cache.shape[1])} * {size_text(cache.strides[1])}",
            offset(writer, column, across),
        ]
        base = writer.pointer(self.arg(op.cache), cache.dtype)
        pointer = writer.let("to_cache", f"{base} + ({' + '.join(terms)})")
        room = writer.let("room", f"{to} < {size_text(op.cache.shape[1])}")
        exists = f"{place.exists} & {room}" if place.exists else room
        store_tile(writer, pointer, tile, replace(place, exists=exists))

    def prefetch(self, seen: Seen, rows: Place) -> None:
        """Ask for whole rows of an operand, before it is known whether former kernels have ended; of others nothing."""
        if not self.is_operand(seen.value):
            return
        view = self.view(seen.value)
        each = _LINE // view.dtype.bytes
        lines = power_of_two(-(-seen.width // each) + 1)  # rows may begin within a line
        column = f"tl.arange(0, {lines})[None, :] * {each}"
        column = self.writer.let("line", f"tl.minimum({column}, {seen.width - 1})")
        place = replace(rows, column=column, columns=lines, mask="")
        at = pointer_to(self.writer, self.arg(seen.value), view, seen.width, place)
        self.writer.line(f"prefetch({at})")

    def has_words(self, value: Value) -> bool:
        """Whether `words` can read a value: an operand of elements of one or two bytes, rows of whole words."""
        if value not in self._args or value.dtype.bytes > 2 or value.type.rank < 2:
            return False
        view, each = self.view(value), 4 // value.dtype.bytes
        sizes = (view.shape[-1], *view.strides[:-1])
        behind = view.strides[-2:] == (view.shape[-1], 1)
        return behind and all(quotient(size, each) is not None for size in sizes)

    def words(self, seen: Seen, place: Place) -> str:
        """Words of four bytes (i32) of a value that `has_words`; rows and columns are counted in words."""
        view, each = self.view(seen.value), 4 // seen.value.dtype.bytes
        shape = (*view.shape[:-1], _part(view.shape[-1], each))
        strides = (*(_part(stride, each) for stride in view.strides[:-1]), 1)
        return self._load(seen.value, View(DType.I32, shape, strides), seen.width, place)

    def fp8(self, seen: Seen, place: Place) -> str:
        """The name of a tile of an operand in E4M3, as the compiler's own type: for GPUs that know it.

        Matrix units take such a tile from shared memory as it arrives there, and not one of bits that are looked at as
        numbers afterwards.
        """
        pointer = pointer_to(
            self.writer, self.arg(seen.value), self.view(seen.value), seen.width, place
        )
        cast = f"{pointer}.to(tl.pointer_type(tl.float8e4nv))"
        return self.writer.let("x", f"tl.load({cast}{self._masked(place, DType.F8E4M3)})")

    def _loaded(self, seen: Seen, place: Place) -> str:
        return self._load(seen.value, self.view(seen.value), seen.width, place)

    def _load(self, value: Value, view: View, width: int, place: Place) -> str:
        pointer = pointer_to(self.writer, self.arg(value), view, width, place)
        return self.writer.let("x", f"tl.load({pointer}{self._masked(place, view.dtype)})")

    def _masked(self, place: Place, dtype: DType) -> str:
        """How a load leaves out what does not exist."""
        masks = " & ".join(m for m in (self._present.get(place.row), place.mask) if m)
        return f", mask={masks}, other={_zero(dtype)}" if masks else ""


def _cut_alike(own: Shape, seen: Seen) -> tuple[Shape, Shape]:
    """A broadcast shape cut where that of the result is cut into rows."""
    lead, row = seen.axes
    if len(lead) + len(row) == len(own):
        return own[: len(lead)], own[len(lead) :]
    at = len(lead) - 1  # the axis that is cut in two
    if own[at] == 1:
        return own[: at + 1], (1, *own[at + 1 :])
    return (*own[:at], lead[-1]), (row[0], *own[at + 1 :])


def narrowest(graph: Graph, value: Value) -> Value:
    """A value before a cast that keeps every bit: products of narrower types are as exact, and cheaper."""
    while value in graph.producers:
        op = graph.producers[value].op
        if not isinstance(op, Cast) or not _widens(op.x.dtype, value.dtype):
            break
        value = op.x
    return value


def widened_last(site: Site) -> Site:
    """A region whose views come before casts that keep every bit, where they came behind: for `narrowest`."""
    graph = body_of(site)
    makers: dict[Value, Node] = {}
    for node in graph.nodes:
        maker = makers.get(node.op.x) if isinstance(node.op, Reshape) else None
        if maker is None or not _is_widening(maker):
            makers.update(dict.fromkeys(node.results, node))
            continue
        assert isinstance(node.op, Reshape) and isinstance(maker.op, Cast)
        (result,) = node.results
        narrow = Value(f"{result.name}.narrow", TensorType(maker.op.x.dtype, result.shape))
        makers[narrow] = Node(replace(node.op, x=maker.op.x), (narrow,))
        makers[result] = Node(replace(maker.op, x=narrow), node.results)
    nodes = tuple(dict.fromkeys(makers.values()))
    if nodes == graph.nodes:
        return site
    assert isinstance(site.op, Region)
    return replace(site, op=replace(site.op, body=replace(graph, nodes=nodes)))


def _is_widening(node: Node) -> bool:
    return isinstance(node.op, Cast) and _widens(node.op.x.dtype, node.op.dtype)


def _widens(narrow: DType, wide: DType) -> bool:
    return narrow in (DType.BF16, DType.F16) and wide == DType.F32


def _part(size: Dim, parts: int) -> Dim:
    part = quotient(size, parts)
    assert part is not None  # of what `has_words`
    return part


def _zero(dtype: DType) -> str:
    return "0.0" if dtype.is_float else "0"
