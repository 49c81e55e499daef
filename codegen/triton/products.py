"""Regions around matrix products, dense or grouped: one launch, or two where programs share a reduction.

A program makes a tile of rows by features. What comes before a product is computed for a tile of rows by a part of the
reduction, as is what comes before a weight; what comes behind, for the tile of sums. Several dense products of one
size may be added to each other.

Where rows may be very few, as in a step of one token, there are further forms for them (`nemoc.codegen.triton.skinny`):
a plan has a launch of each, and how many rows there are says which of them has any programs.

Rows of a grouped product lie in order of their groups. Its tiles do not cross groups: how many tiles each group has
is known when the kernel runs, so each program finds its own from the groups' offsets, and programs beyond the last tile
have nothing to do.
"""

from dataclasses import dataclass, replace

import sympy

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, Stage, View, dense_strides
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.fragments import Fragments
from nemoc.codegen.triton.operands import WHOLE, Fp8, Operand, Packed, operand
from nemoc.codegen.triton.product_forms import (
    Product,
    Schedule,
    fragment_forms,
    fragment_schedule,
    products_of,
    skinny_forms,
    skinny_schedule,
    tile_forms,
    tile_schedule,
)
from nemoc.codegen.triton.rows import (
    Store,
    cache_updates,
    row_place,
    stored_results,
    write_stores,
)
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.skinny import can_hold, held_sums, left_out, skinny_sums
from nemoc.codegen.triton.spaces import (
    element_bytes,
    few_rows_schedule,
    fragments_schedule,
    product_schedule,
)
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.work import Work
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.ops import (
    Nvfp4BlockScales,
    QuantizeNvfp4,
    Reshape,
)
from nemoc.ir.types import Value


def emit_products(site: Site, target: GpuTarget) -> Plan:
    """The plan of a region whose anchors are dense products of one size, or one grouped product.

    Args:
        site: the region.
        target: the GPU.

    Raises:
        RegionError: the region has more in it than such a kernel can do.
    """
    site = as_region(site)
    graph = body_of(site)
    products = products_of(graph)
    stores = stored_results(graph, products[0].count)
    for store in stores:
        if store.seen.width != products[0].features and not _is_blockwise(graph, store.seen.value):
            raise RegionError(f"rows of %{store.seen.value.name} are not those of the product")
    first, few = products[0], skinny_forms(graph, products, target)
    fragments = fragment_forms(graph, products, target)
    scratch = _rows_apart(graph, first) if fragments and first.offsets is None else []
    apart, added = Arg("scratch", 0) if scratch else None, Arg("scratch", len(scratch))
    stages, above, parts = list[Stage](), 0, 0
    for rows, most in (*few, *fragments, *tile_forms(graph, products, target)):
        taken = _between(first.count, above, most)
        if apart and (rows, most) == fragments[0]:
            of_both = _between(first.count, above, fragments[-1][1])
            stages += [_stage_of_rows(site, first, apart, of_both)] if of_both != 0 else []
        above = most
        if taken == 0:
            continue
        if (rows, most) in few:
            default = skinny_schedule(graph, products, target, rows)
            schedule = few_rows_schedule(site.choices, default, products, target)
        elif (rows, most) in fragments:
            default = fragment_schedule(products, rows)
            schedule = fragments_schedule(site.choices, default, first)
        else:
            default = tile_schedule(graph, products, target, rows)
            prefix = f"tile{rows}_" if most else ""
            schedule = product_schedule(site.choices, default, products, target, prefix)
        stages += _stages(site, products, stores, schedule, taken, (apart, added))
        parts = max(parts, schedule.parts)
    if parts > 1:
        scratch.append(_sums_of_parts(first, parts))
    return Plan(tuple(stages), tuple(scratch), updates=cache_updates(site, stores))


def _between(count: Dim, above: int, most: int) -> Dim:
    """1 if a number of rows is larger than one bound and not than another, else 0; no bound is 0."""
    return dim(_reaches(count, above + 1) - (_reaches(count, most + 1) if most else 0))


def _reaches(size: Dim, bound: int) -> Dim:
    """1 if a size of at least 1 is at least a bound, else 0."""
    if isinstance(size, int):
        return int(size >= bound)
    return sympy.Min(1, sympy.floor(size / sympy.Integer(bound))) if bound > 1 else 1


def _stages(
    site: Site,
    products: list["Product"],
    stores: list[Store],
    schedule: Schedule,
    taken: Dim,
    scratch: tuple[Arg | None, Arg],
) -> list[Stage]:
    """The launches that follow a schedule; `taken` is 1 if they have programs, else 0.

    `scratch` is where rows of x are that programs of fragments read, if they do not compute them, and where sums are to
    be that programs share.
    """
    apart, added = scratch
    if schedule.parts > 1:
        return _stages_of_parts(site, products[0], stores, schedule, taken, added)
    try:
        return [_stage(site, products, stores, schedule, taken, apart, early=True)]
    except RegionError:
        if schedule.fragments:
            raise
        # Of rows that are computed block by block, as quantized ones are, there are no parts but whole blocks.
        return [_stage(site, products, stores, schedule, taken, apart, early=False)]


def _stage(
    site: Site,
    products: list["Product"],
    stores: list[Store],
    schedule: Schedule,
    taken: Dim,
    apart: Arg | None,
    early: bool,
) -> Stage:
    """The one launch that follows a schedule; `early` is whether one row's weights may be loaded before it waits."""
    first = products[0]
    writer = KernelWriter("product" if first.offsets is None else "grouped")
    body = Body(writer, site)
    tile: _Tile
    tasks: Dim
    if first.offsets is not None:
        tile, tasks = _grouped_tile(body, first, schedule), _most_tiles(first, schedule.rows)
    elif schedule.skinny or schedule.fragments:  # of as many rows as there are, or more
        tile, tasks = _dense_rows(body, first, schedule), 1
    else:
        pid = writer.let("pid", "tl.program_id(0)")
        tile = _dense_tile(body, first, schedule, pid)
        tasks = ceil_div(first.count, schedule.rows)
    if schedule.fragments and apart:
        _read_apart(body, first, apart)
    for made in products:
        sums = _write_product(body, made, schedule, tile, early=early)
        body.bind(Seen(made.result, made.features), tile.place, sums)
    _write_results(body, first, stores, tile.place)
    blocks = -(-first.features // schedule.columns)
    work = _work(products, schedule)
    return writer.finish(dim(tasks * blocks * taken), schedule.warps, schedule.stages, work)


def _write_results(body: Body, made: Product, stores: list[Store], place: Place) -> None:
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


_ADDED = (4, 256)
"""Rows and columns of a program that adds them."""


def _rows_apart(graph: Graph, made: Product) -> list[View]:
    """Where rows of x are computed once for all programs; nowhere if they are in memory as they are."""
    shape = (made.count, made.width)
    return [] if made.x in graph.inputs else [View(made.x.dtype, shape, dense_strides(shape))]


def _stage_of_rows(site: Site, made: Product, to: Arg, taken: Dim) -> Stage:
    """The launch that computes rows of x for all programs of fragments, which would each have to do it themselves."""
    writer = KernelWriter("product_rows")
    body = Body(writer, site)
    row = writer.let("row", "tl.program_id(0)")
    place = body.whole(made.width, Place(row, "0", 1, 1))
    seen = Seen(made.x, made.width)
    body.prepare(seen, place)
    at = _place_of_row(writer, made, to, place)
    writer.line(
        f"tl.store({at}, {body.tile(seen, place)}{f', mask={place.mask}' if place.mask else ''})"
    )
    return writer.finish(dim(made.count * taken), 4, 1)


def _read_apart(body: Body, made: Product, apart: Arg) -> None:
    """Have rows of x read from where `_stage_of_rows` has left them."""

    def read(seen: Seen, place: Place) -> str:
        at = _place_of_row(body.writer, made, apart, place)
        masks = f", mask={place.mask}, other=0.0" if place.mask else ""
        return body.writer.let("x", f"tl.load({at}{masks})")

    body.hold(made.x, read)


def _place_of_row(writer: KernelWriter, made: Product, arg: Arg, place: Place) -> str:
    pointer = writer.pointer(arg, made.x.dtype)
    return writer.let("at", f"{pointer} + {place.row} * {made.width} + {place.column}")


def _sums_of_parts(made: Product, parts: int) -> View:
    """Where programs that share a reduction leave their sums: f32 [parts, rows, N]."""
    shape = (parts, made.count, made.features)
    return View(DType.F32, shape, dense_strides(shape))


def _stages_of_parts(
    site: Site,
    made: Product,
    stores: list[Store],
    schedule: Schedule,
    taken: Dim,
    added: Arg,
) -> list[Stage]:
    """For a dense product whose reduction several programs share: their launch, and that which adds."""
    writer = KernelWriter("product_part")
    body = Body(writer, site)
    pid = writer.let("pid", "tl.program_id(0)")
    part = writer.let("part", f"{pid} % {schedule.parts}")
    tile = _dense_tile(body, made, schedule, f"{pid} // {schedule.parts}")
    sums = _write_product(body, made, schedule, tile, part)
    at, masks = _place_of_part(writer, made, added, part, tile.place)
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
        at, masks = _place_of_part(writer, made, added, str(number), place)
        loaded = writer.let("sums", f"tl.load({at}{masks}{', other=0.0' if masks else ''})")
        total = writer.let("total", f"{total} + {loaded}") if total else loaded
    body.bind(Seen(made.result, made.features), place, total)
    _write_results(body, made, stores, place)
    blocks = -(-made.features // columns)
    tasks = dim(ceil_div(made.count, rows) * blocks * taken)
    return [first, writer.finish(tasks, whole.warps, whole.stages)]


def _place_of_part(
    writer: KernelWriter, made: Product, arg: Arg, part: str, place: Place
) -> tuple[str, str]:
    """Where the sums of a part are, and the mask of an access to them."""
    row = writer.let("row", f"tl.cast({part} * {size_text(made.count)} + {place.row}, tl.int64)")
    pointer = writer.pointer(arg, DType.F32)
    at = writer.let("at", f"{pointer} + {row} * {made.features} + {place.column}")
    masks = " & ".join(mask for mask in (place.exists, place.mask) if mask)
    return at, f", mask={masks}" if masks else ""


def _is_blockwise(graph: Graph, value: Value) -> bool:
    """Whether a value's elements each stand for neighbouring ones of a row, as codes and scales do."""
    while value in graph.producers and isinstance(op := graph.producers[value].op, Reshape):
        value = op.x
    return isinstance(graph.producers[value].op, Nvfp4BlockScales | QuantizeNvfp4)


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
    # How many groups have all their tiles before this one, and how many tiles that is, in one number, since all that
    # goes over the groups makes warps wait for each other. Where the group begins and ends is loaded again.
    base = 2 * columns
    passed = f"{ends}.to(tl.int64) * {base} + {following}"
    found = writer.let("found", f"tl.max(tl.where({ends} <= {tile}, {passed}, 0))")
    group = writer.let("group", f"({found} % {base}).to(tl.int32)")
    before = writer.let("before", f"({found} // {base}).to(tl.int32)")
    _stop_behind(writer, group, made.groups)
    first, end = (body.tile(one, Place("0", at, 1, 1)) for at in (group, f"({group} + 1)"))
    begin = writer.let("begin", f"{first} + ({tile} - {before}) * {schedule.rows}")
    number = writer.let("number", f"{begin} + tl.arange(0, {schedule.rows})[:, None]")
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
    body: Body,
    made: Product,
    schedule: Schedule,
    tile: _Tile,
    part: str = "",
    early: bool = False,
) -> str:
    """The loop over the reduction, or over a part of it; returns the tile of sums."""
    writer, place, group = body.writer, tile.place, tile.group
    x, w = (operand(body, Seen(value, made.width)) for value in (made.x, made.w))
    if early and isinstance(w, Packed) and _is_early(schedule, w, group):
        return _early_sums(body, made, schedule, tile, x, w)
    rows = replace(place, column="0", columns=1, mask="")
    feature = writer.let("weight", f"tl.trans({place.column})")
    if place.mask:  # rows beyond the last would be another group's, or nobody's
        feature = writer.let("weight", f"tl.minimum({feature}, {made.features - 1})")
    if group:
        feature = writer.let("weight", f"{group} * {made.features} + {feature}")
    weights = Place(feature, "0", schedule.columns, 1)
    depth = min(schedule.depth, max(schedule.least_depth, power_of_two(made.width)))
    if schedule.skinny and not group and isinstance(w, Packed):
        w.prefetch(weights)
        writer.wait_turn()
    if made.is_few and not schedule.skinny and not group:
        body.leave_out_absent(rows)
    lines = tile.single_rows(writer) if schedule.skinny else [rows]
    for line in lines:
        x.prepare(line)
    w.prepare(weights)
    first = f"{group} * {made.features}" if group else "0"
    matrix = Place(writer.let("first", first), "0", 1, 1)
    w.prepare_scale(matrix)
    if schedule.skinny:
        sums = skinny_sums(body, x, w, lines, weights, depth, schedule.stages)
        return w.scaled(x.scaled(sums, rows, x.left_out), matrix, left_out(w))
    shape = [schedule.rows, schedule.columns]
    shape = shape[::-1] if schedule.turned else shape
    sums = writer.fresh("sums", f"tl.zeros({shape}, tl.float32)")
    start, stop = _span_of_part(writer, made, schedule, depth, part)
    with writer.loop("k", stop, start, step=depth) as k:
        at, across = (body.span(k, depth, made.width, p) for p in (rows, weights))
        writer.line(f"{sums} = {_added(body, made, schedule, (x, at), (w, across), sums)}")
    if schedule.turned:
        sums = writer.let("sums", f"tl.trans({sums})")
    if schedule.native:
        return w.scaled(x.scaled(sums, rows), matrix)
    return w.scaled(x.scaled(sums, rows, x.left_out), matrix, w.left_out)


def _span_of_part(
    writer: KernelWriter, made: Product, schedule: Schedule, depth: int, part: str
) -> tuple[str, str]:
    """From where to where the reduction goes: all of it if there are no parts."""
    if not part:
        return "0", str(made.width)
    steps = -(-made.width // depth)
    each = -(-steps // schedule.parts) * depth
    start = writer.let("start", f"{part} * {each}")
    return start, writer.let("stop", f"tl.minimum({start} + {each}, {made.width})")


def _is_early(schedule: Schedule, w: Packed, group: str) -> bool:
    """Whether a program has its weights before it has anything else, if it can before former kernels have ended."""
    if schedule.skinny and schedule.rows == 1 and not group:
        return can_hold(w, schedule.warps, schedule.columns)
    return schedule.fragments


def _early_sums(
    body: Body, made: Product, schedule: Schedule, tile: _Tile, x: Operand, w: Packed
) -> str:
    """As `_write_product`, for one of `_is_early`."""
    blocks = -(-made.features // schedule.columns)
    block = f"tl.program_id(0) % {blocks}" if tile.group else "tl.program_id(0)"
    first = f"{block} * {schedule.columns}"
    if schedule.fragments:
        rows = (tile.start, tile.last)
        return Fragments(body, schedule, x, w, first, made.features, rows, tile.group).scaled_sums()
    sums = held_sums(body, x, w, first, made.features, schedule)
    return w.scaled(x.scaled(sums, WHOLE, x.left_out), WHOLE, left_out(w))


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
        operands = f"{x.native(at)}, tl.trans({w.native(across)})"
        return f"dot_fp8({operands}, {sums}, {schedule.exact})"
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
    if w == DType.F32:
        return f"dot({left}.to(tl.float32), {turned}, {sums})"
    if {x, w} == {DType.BF16, DType.F16}:
        return f"dot({left}.to(tl.float32), {turned}.to(tl.float32), {sums})"
    return f"dot({left}, tl.trans({right}.to({left}.dtype)), {sums})"
