"""Regions around matrix products, dense or grouped: one launch.

A program makes a tile of rows by features. What comes before a product is computed for a tile of rows by a part of the
reduction, as is what comes before a weight; what comes behind, for the tile of sums. Several dense products of one
size may be added to each other.

Where rows may be very few, as in a step of one token, there are further forms for them (`nemoc.codegen.triton.skinny`):
a plan has a launch of each, and how many rows there are says which of them has any programs.

Rows of a grouped product lie in order of their groups. Its tiles do not cross groups: how many tiles each group has
is known when the kernel runs, so each program finds its own from the groups' offsets, and programs beyond the last tile
have nothing to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, Stage, View, dense_strides
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body, narrowest
from nemoc.codegen.triton.operands import Fp8, Operand, Packed, is_packed, operand, unrounded
from nemoc.codegen.triton.rows import (
    Store,
    cache_updates,
    row_place,
    stored_results,
    write_stores,
)
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.skinny import left_out, skinny_sums
from nemoc.codegen.triton.spaces import element_bytes, few_rows_schedule, product_schedule
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.work import Work
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, evaluate_dim, product, symbols_of
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK
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
        native: whether NVFP4 or FP8 is multiplied as it is, which needs both operands in it.
        skinny: whether rows are multiplied one by one, without matrix units.
        turned: whether weights are the left operand of matrix units, so that sums are made columns by rows.
        parts: how many programs share the reduction of a tile; another launch adds their sums.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    neighbours: int = 8
    native: bool = False
    skinny: bool = False
    turned: bool = False
    parts: int = 1

    @property
    def least_depth(self) -> int:
        """How much of the reduction has to be taken at a time: what one matrix instruction does."""
        return 64 if self.native else 16


def emit_products(
    site: Site, target: GpuTarget, few: Sequence[tuple[int, int]] | None = None
) -> Plan:
    """The plan of a region whose anchors are dense products of one size, or one grouped product.

    Args:
        site: the region.
        target: the GPU.
        few: which forms without matrix units there are; None for `skinny_forms`.

    Raises:
        RegionError: the region has more in it than such a kernel can do.
    """
    site = as_region(site)
    graph = body_of(site)
    products = _products(graph)
    stores = stored_results(graph, products[0].count)
    for store in stores:
        if store.seen.width != products[0].features and not _is_blockwise(graph, store.seen.value):
            raise RegionError(f"rows of %{store.seen.value.name} are not those of the product")
    few = skinny_forms(graph, products, target) if few is None else few
    stages, above, parts = list[Stage](), 0, 0
    for rows, most in (*few, *tile_forms(graph, products, target)):
        taken = _between(products[0].count, above, most)
        above = most
        if taken == 0:
            continue
        if (rows, most) in few:
            default = skinny_schedule(graph, products, target, rows)
            schedule = few_rows_schedule(site.choices, default, products, target)
        else:
            default = tile_schedule(graph, products, target, rows)
            prefix = f"tile{rows}_" if most else ""
            schedule = product_schedule(site.choices, default, products, target, prefix)
        if schedule.parts > 1:
            stages += _stages_of_parts(site, products[0], stores, schedule, taken, target.fp8)
            parts = max(parts, schedule.parts)
        else:
            stages.append(_stage(site, products, stores, schedule, taken, target.fp8))
    scratch = (_sums_of_parts(products[0], parts),) if parts else ()
    return Plan(tuple(stages), scratch, updates=cache_updates(site, stores))


def _between(count: Dim, above: int, most: int) -> Dim:
    """1 if a number of rows is larger than one bound and not than another, else 0; no bound is 0."""
    return dim(_reaches(count, above + 1) - (_reaches(count, most + 1) if most else 0))


def _reaches(size: Dim, bound: int) -> Dim:
    """1 if a size of at least 1 is at least a bound, else 0."""
    if isinstance(size, int):
        return int(size >= bound)
    return sympy.Min(1, sympy.floor(size / sympy.Integer(bound))) if bound > 1 else 1


def _stage(
    site: Site,
    products: list["Product"],
    stores: list[Store],
    schedule: Schedule,
    taken: Dim,
    fp8: bool,
) -> Stage:
    """The launch that follows a schedule; `taken` is 1 if it has programs, else 0; `fp8` as in `operand`."""
    first = products[0]
    writer = KernelWriter("product" if first.offsets is None else "grouped")
    body = Body(writer, site)
    tile: _Tile
    tasks: Dim
    if first.offsets is not None:
        tile, tasks = _grouped_tile(body, first, schedule), _most_tiles(first, schedule.rows)
    elif schedule.skinny:  # of as many rows as there are, or more
        tile, tasks = _dense_rows(body, first, schedule), 1
    else:
        pid = writer.let("pid", "tl.program_id(0)")
        tile = _dense_tile(body, first, schedule, pid)
        tasks = ceil_div(first.count, schedule.rows)
    for made in products:
        sums = _write_product(body, made, schedule, tile, fp8)
        body.bind(Seen(made.result, made.features), tile.place, sums)
    _write_results(body, first, stores, tile.place)
    blocks = -(-first.features // schedule.columns)
    work = _work(products, schedule)
    return writer.finish(dim(tasks * blocks * taken), schedule.warps, schedule.stages, work)


def _write_results(body: Body, made: "Product", stores: list[Store], place: Place) -> None:
    """Store what follows from the tile of a product's sums at a place."""
    for store in stores:
        width = store.seen.width
        columns = place.columns * width // made.features
        write_stores(body, [store], body.resized(place, columns, width))


@dataclass(frozen=True)
class _Tile:
    """Which part of the result a program makes.

    Attributes:
        place: of the result.
        start, last: numbers of the tile's first row, and of the last one that there is.
        group: which group's rows they are; empty in a dense product.
    """

    place: Place
    start: str
    last: str
    group: str = ""

    def single_rows(self, writer: KernelWriter) -> list[Place]:
        """The place of each row by itself; those past the last are the last once more."""
        rows = [self.start]
        for number in range(1, self.place.rows):
            text = f"tl.minimum({self.start} + {number}, {self.last})"
            rows.append(writer.let("row", text))
        return [Place(row, "0", 1, 1) for row in rows]


@dataclass(frozen=True)
class Product:
    """One product of a region.

    Attributes:
        op, result: the op and what it makes.
        x, w: its operands, seen through casts that only widen, and `unrounded`.
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


_SUMS = Arg("scratch", 0)
"""Where programs that share a reduction leave their sums: f32 [parts, rows, N]."""

_ADDED = (4, 256)
"""Rows and columns of a program that adds them."""


def _sums_of_parts(made: Product, parts: int) -> View:
    shape = (parts, made.count, made.features)
    return View(DType.F32, shape, dense_strides(shape))


def _stages_of_parts(
    site: Site,
    made: Product,
    stores: list[Store],
    schedule: Schedule,
    taken: Dim,
    fp8: bool,
) -> list[Stage]:
    """As `_stage`, for a dense product whose reduction several programs share: their launch, and that which adds."""
    writer = KernelWriter("product_part")
    body = Body(writer, site)
    pid = writer.let("pid", "tl.program_id(0)")
    part = writer.let("part", f"{pid} % {schedule.parts}")
    tile = _dense_tile(body, made, schedule, f"{pid} // {schedule.parts}")
    sums = _write_product(body, made, schedule, tile, fp8, part)
    at, masks = _place_of_part(writer, made, part, tile.place)
    writer.line(f"tl.store({at}, {sums}{masks})")
    blocks = -(-made.features // schedule.columns)
    tasks = dim(ceil_div(made.count, schedule.rows) * (blocks * schedule.parts) * taken)
    first = writer.finish(tasks, schedule.warps, schedule.stages, _work([made], schedule))

    writer = KernelWriter("product_added")
    body = Body(writer, site)
    rows, columns = _ADDED
    columns = min(columns, max(16, power_of_two(made.features)))
    whole = Schedule(rows, columns, 0, 4, 1, neighbours=1)
    place = _dense_tile(body, made, whole, writer.let("pid", "tl.program_id(0)")).place
    total = ""
    for number in range(schedule.parts):
        at, masks = _place_of_part(writer, made, str(number), place)
        loaded = writer.let("sums", f"tl.load({at}{masks}{', other=0.0' if masks else ''})")
        total = writer.let("total", f"{total} + {loaded}") if total else loaded
    body.bind(Seen(made.result, made.features), place, total)
    _write_results(body, made, stores, place)
    blocks = -(-made.features // columns)
    tasks = dim(ceil_div(made.count, rows) * blocks * taken)
    return [first, writer.finish(tasks, whole.warps, whole.stages)]


def _place_of_part(writer: KernelWriter, made: Product, part: str, place: Place) -> tuple[str, str]:
    """Where the sums of a part are, and the mask of an access to them."""
    row = writer.let("row", f"tl.cast({part} * {size_text(made.count)} + {place.row}, tl.int64)")
    pointer = writer.pointer(_SUMS, DType.F32)
    at = writer.let("at", f"{pointer} + {row} * {made.features} + {place.column}")
    masks = " & ".join(mask for mask in (place.exists, place.mask) if mask)
    return at, f", mask={masks}" if masks else ""


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
    x, w = narrowest(graph, op.x), unrounded(graph, narrowest(graph, op.w))
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


_BITS_OF_NVFP4 = 4.5
"""Of an element, its block's scale included."""

_SKINNY_SUMS = 4 * 32 * 64
"""Sums of a program without matrix units at most: 64 registers of each thread of four warps."""

_SKINNY_ROWS = (1, 2, 4)
"""Rows of programs without matrix units: more have no room for their sums in registers."""


def skinny_forms(
    graph: Graph, products: list[Product], target: GpuTarget
) -> tuple[tuple[int, int], ...]:
    """The forms without matrix units that are worth having: rows of a program, and of a launch at most.

    Reading a weight takes as long as `target.instructions_per_byte` times its bytes instructions, with all
    multiprocessors at work. Until then it can be decoded, which takes about 5 instructions of NVFP4, 2 of FP8 (8 where
    there are none for it), 1 of bf16 and none of f32, and be multiplied with each row, which takes 1. The tiles of
    matrix units take about 7, 3 (9), 0.5 and, as f32 is cut into narrower numbers, 4; but they have at least 16
    columns, for which a program goes through the whole reduction, so that there are fewer of them with fewer bytes
    under way. So a form is worth having as long as reading or the tile takes longer. Of those there are the one of a
    single row, and that of the most rows; but only the former of bf16 and FP8, of which an H100 took up to 1.6 times as
    long for four rows as for a tile of sixteen.

    Rows of a grouped product are a few for each token, in different groups. Those of one token are single; those of
    more are mostly, until as many rows as a quarter of a form's for each group have been chosen.
    """
    first = products[0]
    if not first.is_few or any(all(p.packed) and target.nvfp4_rows == 16 for p in products):
        return ()
    rows = [n for n in _SKINNY_ROWS if all(_is_worth(p, n, target) for p in products)]
    if not rows:
        return ()
    single, most = rows[0], rows[-1]
    if first.offsets is None:
        return tuple((n, n) for n in dict.fromkeys((single, most)))
    of_one = evaluate_dim(first.count, {"B": 1})
    several = max(of_one, first.groups * most // 4)
    if most == single:
        return ((single, several),)
    return ((single, of_one), *(((most, several),) if several > of_one else ()))


def _is_worth(made: Product, rows: int, target: GpuTarget) -> bool:
    """Whether so many rows take no longer without matrix units than reading the weights or the tile of matrix units."""
    if made.packed[1]:
        decode, tile, size = 5.0, 7.0, _BITS_OF_NVFP4 / 8
    elif made.w.dtype == DType.F8E4M3:
        decode, tile, size = (2.0, 3.0, 1.0) if target.fp8 else (8.0, 9.0, 1.0)
    elif made.w.dtype == DType.F32:
        decode, tile, size = 0.0, 4.0, 4.0
    else:
        decode, tile, size = 1.0, 4.0 if made.is_wide else 0.5, 2.0
    if rows > 1 and not made.is_wide and not made.packed[1]:
        return False
    return decode + rows <= max(tile, size * target.instructions_per_byte)


def tile_forms(
    graph: Graph, products: list[Product], target: GpuTarget
) -> tuple[tuple[int, int], ...]:
    """The forms of matrix units: rows of a tile that the weights are read for, and of a launch at most; no bound is 0.

    Rows of a step of one token are as many as there are sequences. Weights are to be read and decoded once, so there is
    a form of few rows, and one of more. Of a prompt, groups have as many rows as a lower tile, or more.
    """
    first = products[0]
    if first.offsets is None:
        return ((_FLAT, _FLAT), (_MANY, 0)) if first.is_few else ((0, 0),)
    plain = not first.is_wide and not _is_crowded(graph, products)
    if first.is_few or not _is_roomy(target) or not plain:
        return ((0, 0),)
    return ((_MANY, _MANY * first.groups), (0, 0))


_FLAT, _MANY = 16, 64
"""Rows of lower tiles: the fewest that matrix units have, and of the widest instructions."""


def _is_roomy(target: GpuTarget) -> bool:
    """Whether a program can have shared memory for several stages of large tiles."""
    return not target.is_interpreter and target.shared > 200 << 10


def _is_crowded(graph: Graph, products: list[Product]) -> bool:
    """Whether something needs a second tile of registers beside the product's: gathered rows, unpacked weights."""
    ops = [node.op for node in graph.nodes]
    return len(products) > 1 or any(isinstance(op, Sum) or op.is_unpacking for op in ops)


def tile_schedule(graph: Graph, products: list[Product], target: GpuTarget, rows: int) -> Schedule:
    """The schedule of one of `tile_forms` that is taken where nothing was tuned.

    Few rows: the weights are read once, so tiles are as flat as matrix units allow, and narrow, for many programs. Many
    rows: tiles as large as registers allow. AMD's GPUs have shared memory for two stages.

    Args:
        graph: the region's body.
        products: its products.
        target: the GPU.
        rows: of a tile in a step of one token; 0 for others, and for grouped products.
    """
    return _within_shared(_schedule(graph, products, target, rows), target)


def skinny_schedule(
    graph: Graph, products: list[Product], target: GpuTarget, rows: int
) -> Schedule:
    """The schedule of one of `skinny_forms` that is taken where nothing was tuned.

    Args:
        graph: the region's body.
        products: its products.
        target: the GPU.
        rows: of a program.
    """
    return _within_shared(_skinny_schedule(graph, products, target, rows), target)


def _within_shared(schedule: Schedule, target: GpuTarget) -> Schedule:
    """A schedule with as many stages as there is shared memory for."""
    most = 2 if target.backend == "hip" else schedule.stages
    return replace(schedule, stages=min(schedule.stages, most))


def _skinny_schedule(
    graph: Graph, products: list[Product], target: GpuTarget, rows: int
) -> Schedule:
    """Programs of a few columns, for one or more rows.

    A warp takes a thread's 16 bytes from each of 32 places of a row of NVFP4, or twice of bf16 or f32, and loads three
    such parts ahead; four warps make one to four columns each. How many it is decides on how many programs there are:
    all multiprocessors end together if the most that one of them has is little above the mean, and what every program
    does besides costs as much as about two columns. Sums, which there are for each row and element of a weight's part,
    or each block of NVFP4, take half of a thread's registers at most: rows may have to be computed beside them.
    """
    first = products[0]
    most_bytes = 2048 if rows == 1 else 1024
    elements = min(
        1024 if p.packed[1] else min(most_bytes // 2, most_bytes // p.w.dtype.bytes)
        for p in products
    )
    depth = max(32, min(elements, power_of_two(min(p.width for p in products))))
    blockwise = any(isinstance(node.op, Nvfp4BlockScales | QuantizeNvfp4) for node in graph.nodes)
    least = 16 if blockwise else 1
    if target.is_interpreter:
        columns = max(least, min(256, power_of_two(first.features)))
        return Schedule(rows, columns, depth, 4, 1, 1, skinny=True)
    held = depth // BLOCK if all(p.packed[1] for p in products) else depth
    room = _SKINNY_SUMS * (2 if rows == 1 else 1) // (rows * held * len(products))
    most = max(least, min(16 if rows == 1 else 8, power_of_two(first.features), room))
    together = (
        first.features * evaluate_dim(first.count, {"B": 1}) if first.offsets else first.features
    )

    def cost(columns: int) -> int:
        programs = -(-together // columns)
        return -(-programs // target.multiprocessors) * (columns + 2)

    choices = [n for n in (1, 2, 4, 8, 16) if least <= n <= most]
    columns = min(choices, key=lambda n: (cost(n), -n))
    return Schedule(rows, columns, depth, min(4, columns), 3, 1, skinny=True)


def _schedule(graph: Graph, products: list[Product], target: GpuTarget, rows: int) -> Schedule:
    first = products[0]
    wide = any(p.is_wide for p in products)
    narrow = min(128, power_of_two(first.features))
    depth = min(64 if wide else 128, max(32, power_of_two(min(p.width for p in products))))
    fp8 = target.fp8 and all(p.x.dtype == p.w.dtype == DType.F8E4M3 for p in products)
    flat = rows or _FLAT
    if target.is_interpreter:
        tile = flat if first.is_few else 64
        return Schedule(tile, max(16, min(256, narrow * 2)), 256, 4, 1, native=fp8)
    if fp8:
        return _fp8_schedule(first, target, narrow, flat)
    native = all(all(p.packed) for p in products) and target.nvfp4_rows > 0
    if native and (target.nvfp4_rows <= flat or not first.is_few):
        return _native_schedule(first, target, narrow, flat)
    unpacked = any(node.op.is_unpacking for node in graph.nodes)
    roomy = _is_roomy(target)
    # Scales are a 32nd of the bytes of bf16: of a shorter part each thread's are too few to be loaded ahead.
    longer = unpacked and roomy
    if first.is_few and roomy and not wide and (unpacked or rows == _MANY):
        few = _roomy_few(first, unpacked, flat, narrow, target)
        return few if len(products) == 1 else replace(few, parts=1)
    if first.is_few:
        columns = 32 if first.features * first.groups >= 32 * target.multiprocessors else 16
        depth = 256 if unpacked and not wide else depth
        stages = 3 if wide or (unpacked and not longer) else 4
        return Schedule(flat, max(16, min(columns, narrow)), depth, 4, stages, 1)
    crowded = _is_crowded(graph, products)
    if roomy and not unpacked:
        return _roomy_many(first, wide, crowded, narrow, rows)
    if first.offsets is not None or wide:
        deep = 128 if longer else 64
        return Schedule(64, max(16, narrow), 32 if wide else deep, 8 if crowded else 4, 3)
    return Schedule(128, max(16, narrow), 128 if longer else 64, 8, 3)


_BROAD = 8192
"""Features from which on there are enough of the largest tiles."""


def _roomy_few(
    made: Product, unpacked: bool, flat: int, narrow: int, target: GpuTarget
) -> Schedule:
    """Tiles of a step of one token with shared memory for four or more stages: what was fastest on an H100.

    Weights that are decoded are the left operand, so that the matrix units' wide instructions take few rows too. Where
    tiles are fewer than multiprocessors, several programs share the reduction of each.
    """
    broad = made.features >= _BROAD or made.groups > 1
    columns = max(16, min(128 if made.features >= _BROAD and flat == _MANY else 64, narrow))
    warps = 8 if columns == 128 else 4
    stages = 3 if unpacked else 4 if broad else 6
    turned = unpacked and columns >= 64
    schedule = Schedule(flat, columns, 128, warps, stages, 1, turned=turned)
    if made.offsets is not None:
        return schedule
    tiles, most = -(-made.features // columns), 2 * target.multiprocessors
    parts = max(n for n in (1, 2, 4) if n == 1 or tiles * n <= most)
    return replace(schedule, parts=parts)


def _roomy_many(made: Product, wide: bool, crowded: bool, narrow: int, rows: int) -> Schedule:
    """Tiles of many rows with shared memory for three or more stages: what was fastest on an H100."""
    narrow = max(16, narrow)
    if wide:
        return Schedule(64, narrow, 64, 8 if crowded else 4, 3)
    if made.offsets is not None:
        if crowded or rows:
            return Schedule(_MANY, narrow, 64, 8 if crowded else 4, 3)
        return Schedule(128, narrow, 64, 8, 3)
    if crowded:
        return Schedule(128, narrow, 64, 8, 4)
    if made.features >= _BROAD:
        return Schedule(256, narrow, 64, 8, 4)
    if made.features <= 512:  # few tiles
        return Schedule(64, narrow, 128, 4, 4)
    return Schedule(128, narrow, 64, 8, 3)


def _fp8_schedule(made: Product, target: GpuTarget, narrow: int, flat: int) -> Schedule:
    """Tiles of FP8 as it is: half the bytes of bf16, so the reduction is taken in parts twice as long."""
    narrow = max(16, narrow)
    if made.is_few:
        return Schedule(flat, min(32, narrow), 256, 4, 4, 1, native=True)
    stages = 4 if target.shared > 150 << 10 else 2
    if made.offsets is not None:
        return Schedule(64, narrow, 128, 4, stages, native=True)
    return Schedule(128, narrow, 128, 8, stages, native=True)


def _native_schedule(made: Product, target: GpuTarget, narrow: int, flat: int) -> Schedule:
    """Tiles of NVFP4 as it is: a quarter of the bytes of bf16, so the reduction is taken in longer parts."""
    narrow = max(16, narrow)
    if made.is_few:
        return Schedule(flat, min(32, narrow), 256, 4, 4, 1, native=True)
    depth = 256 if target.shared > 128 << 10 else 128
    return Schedule(128, narrow, depth, 8, 3, native=True)


def _work(products: list[Product], schedule: Schedule) -> Work:
    """What a program does: both operands' tiles along the whole reductions."""
    depths = [-(-p.width // schedule.depth) * schedule.depth for p in products]
    sides = [schedule.rows * x + schedule.columns * w for x, w in map(element_bytes, products)]
    depths = [-(-depth // schedule.parts) for depth in depths]
    steps = max(1, sum(depths) // schedule.depth)
    return Work(
        flops=2 * schedule.rows * schedule.columns * sum(depths),
        loaded=int(sum(depth * side for depth, side in zip(depths, sides, strict=True))),
        steps=-(-steps // schedule.stages) if schedule.skinny else steps,
        tile=(0, 0) if schedule.skinny else (schedule.rows, schedule.columns),
        run=int(schedule.depth * min(min(element_bytes(p)) for p in products)),
    )


def _dense_tile(body: Body, made: Product, schedule: Schedule, pid: str) -> _Tile:
    """Which tile of the result the program of a number makes."""
    writer = body.writer
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
    place = body.part(column_block, schedule.columns, made.features, place)
    return _Tile(place, f"{row_block} * {schedule.rows}", f"{size_text(made.count)} - 1")


def _dense_rows(body: Body, made: Product, schedule: Schedule) -> _Tile:
    """The columns that a program makes of all rows."""
    writer = body.writer
    pid = writer.let("pid", "tl.program_id(0)")
    one = Place("0", "0", 1, 1)
    place = one if schedule.rows == 1 else row_place(writer, "0", schedule.rows, made.count)
    place = body.part(pid, schedule.columns, made.features, place)
    return _Tile(place, "0", f"{size_text(made.count)} - 1")


def _grouped_tile(body: Body, made: Product, schedule: Schedule) -> _Tile:
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
    following = writer.let("next", f"{groups.column} + 1")
    if schedule.rows == 1:  # then the tile is a row
        stop = body.tile(one, replace(groups, column=following))
        ended = f"({stop} <= {tile})" + (f" & {groups.mask}" if groups.mask else "")
        group = writer.let("group", f"tl.sum(({ended}).to(tl.int32))")
        _stop_behind(writer, group, made.groups)
        place = Place(tile, "0", 1, 1)
        block = writer.let("block", f"{pid} % {blocks}")
        return _Tile(body.part(block, schedule.columns, made.features, place), tile, tile, group)
    start = body.tile(one, groups)
    stop = body.tile(one, replace(groups, column=following))
    tiles = writer.let("tiles", f"({stop} - {start} + {schedule.rows - 1}) // {schedule.rows}")
    if groups.mask:
        tiles = writer.let("tiles", f"tl.where({groups.mask}, {tiles}, 0)")
    ends = writer.let("ends", f"tl.cumsum({tiles}, axis=1)")
    group = writer.let("group", f"tl.sum(({ends} <= {tile}).to(tl.int32))")
    _stop_behind(writer, group, made.groups)
    mine = writer.let("mine", f"{groups.column} == {group}")

    def of_mine(values: str) -> str:
        return writer.let("own", f"tl.sum(tl.where({mine}, {values}, 0))")

    first = of_mine(start)
    within = writer.let("within", f"{tile} - {of_mine(f'{ends} - {tiles}')}")
    begin = writer.let("begin", f"{first} + {within} * {schedule.rows}")
    number = writer.let("number", f"{begin} + tl.arange(0, {schedule.rows})[:, None]")
    end = of_mine(stop)
    last = writer.let("last", f"{end} - 1")
    row = writer.let("row", f"tl.minimum({number}, {last})")
    exists = writer.let("exists", f"{number} < {end}")
    place = Place(row, "0", schedule.rows, 1, exists=exists)
    block = writer.let("block", f"{pid} % {blocks}")
    return _Tile(body.part(block, schedule.columns, made.features, place), begin, last, group)


def _stop_behind(writer: KernelWriter, group: str, groups: int) -> None:
    """End a program beyond the last tile."""
    with writer.block(f"if {group} >= {groups}:"):
        writer.line("return")


def _most_tiles(made: Product, rows: int) -> Dim:
    """Tiles that groups can have together: each row starts at most one, and each group leaves at most one unfilled."""
    filled = dim(ceil_div(made.count, rows) + made.groups)
    if isinstance(filled, int) and isinstance(made.count, int):
        return min(filled, made.count)
    return sympy.Min(made.count, filled)


def _write_product(
    body: Body, made: Product, schedule: Schedule, tile: _Tile, fp8: bool, part: str = ""
) -> str:
    """The loop over the reduction, or over a part of it; returns the tile of sums."""
    writer, place, group = body.writer, tile.place, tile.group
    x, w = (operand(body, Seen(value, made.width), fp8) for value in (made.x, made.w))
    rows = replace(place, column="0", columns=1, mask="")
    lines = tile.single_rows(writer) if schedule.skinny else [rows]
    for line in lines:
        x.prepare(line)
    feature = writer.let("weight", f"tl.trans({place.column})")
    if place.mask:  # rows beyond the last would be another group's, or nobody's
        feature = writer.let("weight", f"tl.minimum({feature}, {made.features - 1})")
    if group:
        feature = writer.let("weight", f"{group} * {made.features} + {feature}")
    weights = Place(feature, "0", schedule.columns, 1)
    w.prepare(weights)
    depth = min(schedule.depth, max(schedule.least_depth, power_of_two(made.width)))
    first = f"{group} * {made.features}" if group else "0"
    matrix = Place(writer.let("first", first), "0", 1, 1)
    if schedule.skinny:
        sums = skinny_sums(body, x, w, lines, weights, depth, schedule.stages)
        return w.scaled(x.scaled(sums, rows, x.left_out), matrix, left_out(w))
    shape = [schedule.rows, schedule.columns]
    shape = shape[::-1] if schedule.turned else shape
    sums = writer.fresh("sums", f"tl.zeros({shape}, tl.float32)")
    start, stop = "0", str(made.width)
    if part:
        steps = -(-made.width // depth)
        each = -(-steps // schedule.parts) * depth
        start = writer.let("start", f"{part} * {each}")
        stop = writer.let("stop", f"tl.minimum({start} + {each}, {made.width})")
    with writer.loop("k", stop, start, step=depth) as k:
        at, across = (body.span(k, depth, made.width, p) for p in (rows, weights))
        writer.line(f"{sums} = {_added(body, made, schedule, (x, at), (w, across), sums)}")
    if schedule.turned:
        sums = writer.let("sums", f"tl.trans({sums})")
    if schedule.native:
        return w.scaled(x.scaled(sums, rows), matrix)
    return w.scaled(x.scaled(sums, rows, x.left_out), matrix, w.left_out)


def _added(
    body: Body,
    made: Product,
    schedule: Schedule,
    rows: tuple[Operand, Place],
    weights: tuple[Operand, Place],
    sums: str,
) -> str:
    """The call that adds a part of the product, of operands at places."""
    (x, at), (w, across) = rows, weights
    if schedule.native and isinstance(x, Fp8) and isinstance(w, Fp8):
        return f"dot_fp8({x.bits(at)}, tl.trans({w.bits(across)}), {sums})"
    if schedule.native:
        assert isinstance(x, Packed) and isinstance(w, Packed)
        return f"dot_nvfp4({', '.join((*x.parts(at), *w.parts(across)))}, {sums})"
    left = x.tile(at)
    if at.mask and not body.is_operand(made.x):  # whatever became of zeros beyond the end
        left = body.writer.let("left", f"tl.where({at.mask}, {left}, 0.0)")
    if schedule.turned:
        return f"dot({w.tile(across)}.to({left}.dtype), tl.trans({left}), {sums})"
    return _dot(x.dtype, w.dtype, left, w.tile(across), sums)


def _dot(x: DType, w: DType, left: str, right: str, sums: str) -> str:
    """The call that adds a part of the product of tiles of such types."""
    turned = f"tl.trans({right})"
    if x == w:
        return f"dot({left}, {turned}, {sums})"
    if x == DType.F32 and w == DType.BF16:
        return f"dot_wide({left}, {turned}, {sums})"
    return f"dot({left}, tl.trans({right}.to({left}.dtype)), {sums})"
