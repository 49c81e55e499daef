"""Regions around matrix products, dense or grouped: one launch.

A program makes a tile of rows by features. What comes before a product is computed for a tile of rows by a part of the
reduction, as is what comes before a weight; what comes behind, for the tile of sums. Several dense products of one
size may be added to each other.

Rows of a grouped product lie in order of their groups. Its tiles do not cross groups: how many tiles each group has
is known when the kernel runs, so each program finds its own from the groups' offsets, and programs beyond the last tile
have nothing to do.
"""

from dataclasses import dataclass, replace

import sympy

from nemoc.codegen.plan import Plan, RegionError, Site
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body, narrowest
from nemoc.codegen.triton.operands import Packed, is_packed, operand
from nemoc.codegen.triton.rows import cache_updates, row_place, stored_results, write_stores
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, product, symbols_of
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.ops import (
    GroupedLinear,
    Linear,
    Nvfp4BlockScales,
    QuantizeNvfp4,
    Reshape,
    Sum,
)
from nemoc.ir.types import Value


@dataclass(frozen=True)
class Schedule:
    """How a product is cut into programs.

    Attributes:
        rows, columns, depth: the tile of a program, and how much of the reduction it takes at a time.
        warps, stages: as in `nemoc.codegen.triton.writer.GpuKernel`.
        neighbours: row blocks whose programs run side by side, so that they share weights in the cache.
        native: whether NVFP4 is multiplied as it is, which needs both operands in it.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    neighbours: int = 8
    native: bool = False

    @property
    def least_depth(self) -> int:
        """How much of the reduction has to be taken at a time: what one matrix instruction does."""
        return 64 if self.native else 16


def emit_products(site: Site, target: GpuTarget) -> Plan:
    """The plan of a region whose anchors are dense products of one size, or one grouped product.

    Raises:
        RegionError: the region has more in it than such a kernel can do.
    """
    site = as_region(site)
    graph = body_of(site)
    products = _products(graph)
    schedule = default_schedule(graph, products, target)
    writer = KernelWriter("product" if products[0].offsets is None else "grouped")
    body = Body(writer, site)
    stores = stored_results(graph, products[0].count)
    for store in stores:
        if store.seen.width != products[0].features and not _is_blockwise(graph, store.seen.value):
            raise RegionError(f"rows of %{store.seen.value.name} are not those of the product")
    group = ""
    if products[0].offsets is None:
        place = _dense_tile(body, products[0], schedule)
        tasks = ceil_div(products[0].count, schedule.rows)
    else:
        place, group = _grouped_tile(body, products[0], schedule)
        tasks = _most_tiles(products[0], schedule.rows)
    for made in products:
        sums = _write_product(body, made, schedule, place, group)
        body.bind(Seen(made.result, made.features), place, sums)
    for store in stores:
        width = store.seen.width
        columns = schedule.columns * width // products[0].features
        write_stores(body, [store], body.resized(place, columns, width))
    blocks = -(-products[0].features // schedule.columns)
    stage = writer.finish(dim(tasks * blocks), schedule.warps, schedule.stages)
    return Plan((stage,), updates=cache_updates(site, stores))


@dataclass(frozen=True)
class Product:
    """One product of a region.

    Attributes:
        op, result: the op and what it makes.
        x, w: its operands, seen through casts that only widen.
        count: rows of x.
        width: K.
        features: N.
        groups: weights; 1 for a dense product.
        offsets: where each group's rows start; none for a dense product.
        packed: whether each operand is NVFP4 and decoded here.
    """

    op: Linear | GroupedLinear
    result: Value
    x: Value
    w: Value
    count: Dim
    width: int
    features: int
    groups: int
    offsets: Value | None
    packed: tuple[bool, bool]

    @property
    def is_wide(self) -> bool:
        """Whether rows are multiplied as f32."""
        return self.x.dtype == DType.F32 and not self.packed[0]

    @property
    def is_few(self) -> bool:
        """Whether rows are the sequences of a batch in a step of one token, or a few."""
        if isinstance(self.count, int):
            return self.count <= 64
        return symbols_of(self.count) <= {"B"}


def _is_blockwise(graph: Graph, value: Value) -> bool:
    """Whether a value's elements each stand for neighbouring ones of a row, as codes and scales do."""
    while value in graph.producers and isinstance(op := graph.producers[value].op, Reshape):
        value = op.x
    return isinstance(graph.producers[value].op, Nvfp4BlockScales | QuantizeNvfp4)


def _products(graph: Graph) -> list[Product]:
    found = [
        _product(graph, node.op, node.results[0])
        for node in graph.nodes
        if isinstance(node.op, Linear | GroupedLinear)
    ]
    if not found:
        raise RegionError("there is no product")
    sizes = {(p.count, p.features) for p in found}
    grouped = any(p.offsets is not None for p in found)
    if len(sizes) > 1 or (grouped and len(found) > 1):
        raise RegionError("its products differ in size")
    return found


def _product(graph: Graph, op: Linear | GroupedLinear, result: Value) -> Product:
    width, features = op.x.shape[-1], op.width
    groups = op.w.shape[0] if isinstance(op, GroupedLinear) else 1
    if not (isinstance(width, int) and isinstance(features, int) and isinstance(groups, int)):
        raise RegionError(f"%{result.name} has no fixed width")
    if op.interleave > 1 or op.acc != DType.F32:
        raise RegionError(f"%{result.name}: weights in another layout, or sums in {op.acc}")
    x, w = narrowest(graph, op.x), narrowest(graph, op.w)
    return Product(
        op,
        result,
        x,
        w,
        product(op.x.shape[:-1]),
        width,
        features,
        groups,
        op.offsets if isinstance(op, GroupedLinear) else None,
        (is_packed(graph, x), is_packed(graph, w)),
    )


def default_schedule(graph: Graph, products: list[Product], target: GpuTarget) -> Schedule:
    """The schedule that is taken where nothing was tuned.

    Few rows: the weights are read once, so tiles are as flat as matrix units allow, and narrow, for many programs. Many
    rows: tiles as large as registers allow. AMD's GPUs have shared memory for two stages.
    """
    schedule = _schedule(graph, products, target)
    return (
        replace(schedule, stages=min(schedule.stages, 2)) if target.backend == "hip" else schedule
    )


def _schedule(graph: Graph, products: list[Product], target: GpuTarget) -> Schedule:
    first = products[0]
    wide = any(p.is_wide for p in products)
    narrow = min(128, power_of_two(first.features))
    depth = min(64 if wide else 128, max(32, power_of_two(min(p.width for p in products))))
    if target.is_interpreter:
        return Schedule(16 if first.is_few else 64, max(16, min(256, narrow * 2)), 256, 4, 1)
    native = all(all(p.packed) for p in products) and target.nvfp4_rows > 0
    if native and (target.nvfp4_rows <= 16 or not first.is_few):
        return _native_schedule(first, target, narrow)
    unpacked = any(node.op.is_unpacking for node in graph.nodes)
    # Scales are a 32nd of the bytes of bf16: of a shorter part each thread's are too few to be loaded ahead.
    longer = unpacked and target.shared > 200 << 10
    if first.is_few:
        columns = 32 if first.features * first.groups >= 32 * target.multiprocessors else 16
        depth = 256 if unpacked and not wide else depth
        stages = 3 if wide or (unpacked and not longer) else 4
        return Schedule(16, max(16, min(columns, narrow)), depth, 4, stages, 1)
    if first.offsets is not None or wide:
        # Sums of gathered rows need a second tile of registers beside the product's, as unpacked weights do.
        sums = any(isinstance(node.op, Sum) for node in graph.nodes)
        crowded = len(products) > 1 or sums or unpacked
        deep = 128 if longer else 64
        return Schedule(64, max(16, narrow), 32 if wide else deep, 8 if crowded else 4, 3)
    return Schedule(128, max(16, narrow), 128 if longer else 64, 8, 3)


def _native_schedule(made: Product, target: GpuTarget, narrow: int) -> Schedule:
    """Tiles of NVFP4 as it is: a quarter of the bytes of bf16, so the reduction is taken in longer parts."""
    narrow = max(16, narrow)
    if made.is_few:
        return Schedule(16, min(32, narrow), 256, 4, 4, 1, native=True)
    depth = 256 if target.shared > 128 << 10 else 128
    return Schedule(128, narrow, depth, 8, 3, native=True)


def _dense_tile(body: Body, made: Product, schedule: Schedule) -> Place:
    """Which tile of the result a program makes."""
    writer = body.writer
    pid = writer.let("pid", "tl.program_id(0)")
    blocks = -(-made.features // schedule.columns)
    if schedule.neighbours == 1:
        row_block = writer.let("row_block", f"{pid} // {blocks}")
        column_block = writer.let("column_block", f"{pid} % {blocks}")
    else:
        count = size_text(made.count)
        total = writer.let("row_blocks", f"({count} + {schedule.rows - 1}) // {schedule.rows}")
        batch = schedule.neighbours * blocks
        first = writer.let("first", f"{pid} // {batch} * {schedule.neighbours}")
        size = writer.let("size", f"tl.minimum({total} - {first}, {schedule.neighbours})")
        row_block = writer.let("row_block", f"{first} + {pid} % {batch} % {size}")
        column_block = writer.let("column_block", f"{pid} % {batch} // {size}")
    place = row_place(writer, row_block, schedule.rows, made.count)
    return body.part(column_block, schedule.columns, made.features, place)


def _grouped_tile(body: Body, made: Product, schedule: Schedule) -> tuple[Place, str]:
    """Which tile a program makes, and of which group."""
    writer = body.writer
    assert made.offsets is not None
    pid = writer.let("pid", "tl.program_id(0)")
    blocks = -(-made.features // schedule.columns)
    tile = writer.let("tile", f"{pid} // {blocks}")
    columns = power_of_two(made.groups)
    every = Place("0", "0", 1, 1)
    groups = body.span("0", columns, made.groups, every)
    one = Seen(made.offsets, made.groups + 1)
    start = body.tile(one, groups)
    following = writer.let("next", f"{groups.column} + 1")
    stop = body.tile(one, replace(groups, column=following))
    tiles = writer.let("tiles", f"({stop} - {start} + {schedule.rows - 1}) // {schedule.rows}")
    if groups.mask:
        tiles = writer.let("tiles", f"tl.where({groups.mask}, {tiles}, 0)")
    ends = writer.let("ends", f"tl.cumsum({tiles}, axis=1)")
    group = writer.let("group", f"tl.sum(({ends} <= {tile}).to(tl.int32))")
    with writer.block(f"if {group} >= {made.groups}:"):
        writer.line("return")
    mine = writer.let("mine", f"{groups.column} == {group}")

    def of_mine(values: str) -> str:
        return writer.let("own", f"tl.sum(tl.where({mine}, {values}, 0))")

    first = of_mine(start)
    within = writer.let("within", f"{tile} - {of_mine(f'{ends} - {tiles}')}")
    number = writer.let(
        "number",
        f"{first} + {within} * {schedule.rows} + tl.arange(0, {schedule.rows})[:, None]",
    )
    end = of_mine(stop)
    row = writer.let("row", f"tl.minimum({number}, {end} - 1)")
    exists = writer.let("exists", f"{number} < {end}")
    place = Place(row, "0", schedule.rows, 1, exists=exists)
    block = writer.let("block", f"{pid} % {blocks}")
    return body.part(block, schedule.columns, made.features, place), group


def _most_tiles(made: Product, rows: int) -> Dim:
    """Tiles that groups can have together: each row starts at most one, and each group leaves at most one unfilled."""
    filled = dim(ceil_div(made.count, rows) + made.groups)
    if isinstance(filled, int) and isinstance(made.count, int):
        return min(filled, made.count)
    return sympy.Min(made.count, filled)


def _write_product(body: Body, made: Product, schedule: Schedule, place: Place, group: str) -> str:
    """The loop over the reduction; returns the tile of sums."""
    writer = body.writer
    x, w = (operand(body, Seen(value, made.width)) for value in (made.x, made.w))
    rows = replace(place, column="0", columns=1, mask="")
    x.prepare(rows)
    feature = writer.let("weight", f"tl.trans({place.column})")
    if place.mask:  # rows beyond the last would be another group's, or nobody's
        feature = writer.let("weight", f"tl.minimum({feature}, {made.features - 1})")
    if group:
        feature = writer.let("weight", f"{group} * {made.features} + {feature}")
    weights = Place(feature, "0", schedule.columns, 1)
    w.prepare(weights)
    sums = writer.fresh("sums", f"tl.zeros([{schedule.rows}, {schedule.columns}], tl.float32)")
    depth = min(schedule.depth, max(schedule.least_depth, power_of_two(made.width)))
    with writer.loop("k", str(made.width), step=depth) as k:
        at, across = (body.span(k, depth, made.width, p) for p in (rows, weights))
        if schedule.native:
            assert isinstance(x, Packed) and isinstance(w, Packed)
            parts = ", ".join((*x.parts(at), *w.parts(across)))
            writer.line(f"{sums} = dot_nvfp4({parts}, {sums})")
        else:
            left = x.tile(at)
            if at.mask and not body.is_operand(made.x):  # whatever became of zeros beyond the end
                left = writer.let("left", f"tl.where({at.mask}, {left}, 0.0)")
            writer.line(f"{sums} = {_dot(x.dtype, w.dtype, left, w.tile(across), sums)}")
    first = f"{group} * {made.features}" if group else "0"
    matrix = Place(first if first == "0" else writer.let("first", first), "0", 1, 1)
    return w.scaled(x.scaled(sums, rows), matrix)


def _dot(x: DType, w: DType, left: str, right: str, sums: str) -> str:
    """The call that adds a part of the product of tiles of such types."""
    turned = f"tl.trans({right})"
    if x == w:
        return f"dot({left}, {turned}, {sums})"
    if x == DType.F32 and w == DType.BF16:
        return f"dot_wide({left}, {turned}, {sums})"
    return f"dot({left}, tl.trans({right}.to({left}.dtype)), {sums})"
