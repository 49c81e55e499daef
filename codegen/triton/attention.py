"""Regions around attention: flash attention over a cache of keys and values.

The query heads that share a kv head share what is read of the cache, so they are rows of one tile. What comes before
the queries is computed for a tile of rows; what comes behind attention, for the tile of its result.

Several tokens: one launch. A program takes a tile of rows, row r being token r // group and the query head r % group of
a kv head, over all cached rows that any of them sees.

One token: the cached rows of a sequence are split between programs, and a second launch puts their softmaxes together.
How many programs have a part depends on how many rows there are, which both launches work out alike.
"""

from dataclasses import dataclass

import sympy

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, Stage, View, dense_strides
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body, widened_last
from nemoc.codegen.triton.flash import Attended, Flash
from nemoc.codegen.triton.rows import (
    Store,
    cache_updates,
    row_place,
    stored_results,
    write_stores,
)
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.spaces import attention_schedule
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.work import Work
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, product
from nemoc.ir.dtypes import DType

_SUMS, _TOPS, _TOTALS = (Arg("scratch", i) for i in range(3))


@dataclass(frozen=True)
class Schedule:
    """How attention is cut into programs.

    Attributes:
        rows: query rows of a tile.
        keys: cached rows of a block.
        warps, stages: as in `nemoc.codegen.triton.writer.GpuKernel`.
        splits: parts of a sequence's cached rows, at most; a power of two. Of one token only.
        fill: how many parts of all sequences together keep the device busy; beyond, a part has up to `_LONGER` blocks.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    splits: int = 1
    fill: int = 1


_LONGER = 4
"""Blocks that a part has where there are many, since what each leaves behind is as much as up to half a block."""

_FEW = 1 << 13
"""Elements of a tile of f32 that 4 warps can hold."""


def emit_attention(site: Site, target: GpuTarget) -> Plan:
    """The plan of a region whose anchor is an attention.

    Raises:
        RegionError: the region has more in it than such a kernel can do.
    """
    site = as_region(site)
    if Attended.of(body_of(site)).length != 1:  # few rows wait for memory, and need the registers
        site = widened_last(site)
    graph = body_of(site)
    made = Attended.of(graph)
    stores = stored_results(graph, product((made.batch, made.length, made.heads)))
    for store in stores:
        if store.seen.width != made.width:
            raise RegionError(f"rows of %{store.seen.value.name} are not those of attention")
    schedule = attention_schedule(site.choices, default_schedule(made, target), made, target)
    updates = cache_updates(site, stores)
    if made.length != 1:
        return Plan((_prefill(site, made, schedule, stores),), updates=updates)
    lead = (made.batch, made.heads, schedule.splits)
    shapes = ((*lead, made.width), lead, lead)
    scratch = tuple(View(DType.F32, shape, dense_strides(shape)) for shape in shapes)
    stages = (_split(site, made, schedule), _combine(site, made, schedule, stores))
    return Plan(stages, scratch, updates=updates)


def default_schedule(made: Attended, target: GpuTarget) -> Schedule:
    """The schedule that is taken where nothing was tuned.

    Tiles are as large as registers allow. Products of f32 need room for parts of their operands. Heads wider than 128
    leave room for fewer rows; so blocks take the same shared memory.
    """
    narrower = max(1, made.columns // 128)
    is_f32 = (made.k.dtype, made.v.dtype) != (DType.BF16, DType.BF16)  # or widened to it
    if made.length == 1:
        rows = max(16, min(power_of_two(made.group), (16 if is_f32 else 64) // narrower))
        if target.is_interpreter:
            return Schedule(rows, 128, 4, 1, splits=2, fill=1 << 30)
        keys = max(16, (32 if is_f32 else 64) // narrower)
        stages = 3 if target.backend == "cuda" else 2
        splits, fill = _splits(made, target, keys), 2 * target.multiprocessors
        return Schedule(rows, keys, 4, stages, splits, fill)
    if target.is_interpreter:
        return Schedule(128, 128, 4, 1)
    rows, keys, warps = _largest_tile(made, target, is_f32)
    return Schedule(max(16, rows // narrower), max(16, keys // narrower), warps, 2)


def _largest_tile(made: Attended, target: GpuTarget, is_f32: bool) -> tuple[int, int, int]:
    """Rows, keys and warps for heads up to 128 wide."""
    cuda = target.backend == "cuda"
    if is_f32:
        return 32, 32, 8 if cuda else 4
    if made.q.dtype == DType.F32 or made.op.scale <= 0:
        return 64, 32, 4
    if target.arch == 90:
        # Masks, and results of wider heads, want registers too.
        return 128, 128 if made.width in (64, 128) else 64, 8
    if target.arch == 100:
        return 128, 64, 8
    return (64, 64, 4) if cuda else (128, 64, 4)


def _splits(made: Attended, target: GpuTarget, keys: int) -> int:
    """As many parts as make a program for each multiprocessor when there is one sequence, but each with a block."""
    sequences = made.batch if isinstance(made.batch, int) else 1
    wanted = max(1, target.multiprocessors // (sequences * made.kv_heads))
    if isinstance(made.capacity, int):
        wanted = min(wanted, -(-made.capacity // keys))
    return 1 << wanted.bit_length() - 1


def _prefill(site: Site, made: Attended, schedule: Schedule, stores: list[Store]) -> Stage:
    """All of it for several tokens."""
    writer = KernelWriter("attention")
    body = Body(writer, site)
    length, capacity = size_text(made.length), size_text(made.capacity)
    count = dim(made.length * made.group)
    blocks = ceil_div(count, schedule.rows)
    pairs = dim(made.batch * made.kv_heads)
    pid = writer.let("pid", "tl.program_id(0)")
    pair = writer.let("pair", f"{pid} % {size_text(pairs)}")
    batch = writer.let("batch", f"{pair} // {made.kv_heads}")
    head = writer.let("head", f"{pair} % {made.kv_heads}")
    # Later tokens see more: their blocks come first, so that no long one is left for the end.
    last_block = f"({size_text(count)} + {schedule.rows - 1}) // {schedule.rows} - 1"
    block = writer.let("block", f"{last_block} - {pid} // {size_text(pairs)}")
    rows = row_place(writer, block, schedule.rows, count)
    token = writer.let("token", f"{rows.row} // {made.group}")
    row = f"(tl.cast({batch}, tl.int64) * {length} + {token}) * {made.heads}"
    row = f"{row} + {head} * {made.group} + {rows.row} % {made.group}"
    place = Place(writer.let("row", row), "0", schedule.rows, 1, exists=rows.exists)
    cached = body.tile(Seen(made.op.lengths, 1), Place(batch, "0", 1, 1))
    first = f"{block} * {schedule.rows} // {made.group}"
    last = f"({block} * {schedule.rows} + {schedule.rows - 1}) // {made.group}"
    last = f"tl.minimum({last}, {length} - 1)"
    seen = f"tl.minimum({cached} + {first} + 1, {capacity})"
    full = writer.let("full", f"{seen} // {schedule.keys} * {schedule.keys}")
    stop = writer.let("stop", f"tl.minimum({cached} + {last} + 1, {capacity})")
    flash = Flash(body, made, place, schedule.keys, batch, head)
    limit = writer.let("limit", f"tl.minimum({cached} + {token}, {stop} - 1)")
    flash.attend("0", full, stop, limit)
    y = writer.let("y", f"{flash.sums} / {flash.total}[:, None]")
    body.bind(Seen(made.result, made.width), flash.place, y)
    write_stores(body, stores, flash.place)
    work = _work(made, schedule, made.mean_seen)
    return writer.finish(dim(pairs * blocks), schedule.warps, schedule.stages, work)


def _split(site: Site, made: Attended, schedule: Schedule) -> Stage:
    """For each part of a sequence's cached rows, its softmax's state: sums [B, Hq, splits, D], top and total."""
    writer = KernelWriter("attention_split")
    body = Body(writer, site)
    pid = writer.let("pid", "tl.program_id(0)")
    split = writer.let("split", f"{pid} % {schedule.splits}")
    tiles = -(-made.group // schedule.rows)
    batch = writer.let("batch", f"{pid} // {schedule.splits * tiles * made.kv_heads}")
    head = writer.let("head", f"{pid} // {schedule.splits * tiles} % {made.kv_heads}")
    seen, blocks, parts = _parts(body, made, schedule, batch)
    with writer.block(f"if {split} >= {parts}:"):
        writer.line("return")
    tile = writer.let("tile", f"{pid} // {schedule.splits} % {tiles}") if tiles > 1 else "0"
    place = _heads(writer, made, schedule, f"{batch} * {made.heads} + {head} * {made.group}", tile)
    start = writer.let("start", f"{blocks} * {split} // {parts} * {schedule.keys}")
    end = f"{blocks} * ({split} + 1) // {parts} * {schedule.keys}"
    stop = writer.let("stop", f"tl.minimum({end}, {seen})")
    full = writer.let("full", f"{stop} // {schedule.keys} * {schedule.keys}")
    flash = Flash(body, made, place, schedule.keys, batch, head)
    flash.attend(start, full, stop, f"{stop} - 1")
    _keep(flash, made, schedule, split)
    pairs = dim(made.batch * (made.kv_heads * tiles))
    parts = sympy.Min(schedule.splits, ceil_div(made.mean_seen, schedule.keys))
    each = dim(sympy.ceiling(made.mean_seen / parts))
    work = _work(made, schedule, each, dim(pairs * parts))
    return writer.finish(dim(pairs * schedule.splits), schedule.warps, schedule.stages, work)


def _work(made: Attended, schedule: Schedule, seen: Dim, programs: Dim | None = None) -> Work:
    """What a program does that goes over so many cached rows."""
    both = made.k.dtype.bytes + made.v.dtype.bytes
    return Work(
        flops=dim(seen * (4 * schedule.rows * made.columns)),
        loaded=dim(seen * (made.columns * both)),
        steps=ceil_div(seen, schedule.keys),
        tile=(schedule.rows, schedule.keys),
        run=made.width * min(made.k.dtype.bytes, made.v.dtype.bytes),
        programs=programs,
    )


def _heads(
    writer: KernelWriter, made: Attended, schedule: Schedule, first: str, tile: str
) -> Place:
    """A tile of the query heads that share a kv head, of which the first is row `first` of q."""
    among = f"tl.arange(0, {schedule.rows})[:, None]"
    if tile != "0":
        among = f"{tile} * {schedule.rows} + {among}"
    if made.group % schedule.rows == 0:
        row = writer.let("row", f"{first} + {among}")
        return Place(row, "0", schedule.rows, 1)
    number = writer.let("number", among)
    exists = writer.let("exists", f"{number} < {made.group}")
    row = writer.let("row", f"{first} + tl.minimum({number}, {made.group - 1})")
    return Place(row, "0", schedule.rows, 1, exists=exists)


def _parts(body: Body, made: Attended, schedule: Schedule, batch: str) -> tuple[str, str, str]:
    """How many cached rows a sequence's new token sees, the blocks that they make, and the parts of these."""
    writer = body.writer
    cached = body.tile(Seen(made.op.lengths, 1), Place(batch, "0", 1, 1))
    seen = writer.let("seen", f"tl.minimum({cached} + 1, {size_text(made.capacity)})")
    blocks = writer.let("blocks", f"({seen} + {schedule.keys - 1}) // {schedule.keys}")
    # As if all sequences were as long as this one.
    together = size_text(dim(made.batch * made.kv_heads))
    least = f"tl.minimum(tl.maximum({blocks} * {together} // {schedule.fill}, 1), {_LONGER})"
    least = writer.let("least", least)
    parts = f"tl.minimum(({blocks} + {least} - 1) // {least}, {schedule.splits})"
    return seen, blocks, writer.let("parts", parts)


def _keep(flash: Flash, made: Attended, schedule: Schedule, split: str) -> None:
    """Store the state of a part's softmax."""
    writer, place = flash.writer, flash.place
    at = writer.let("part", f"tl.cast({place.row}, tl.int64) * {schedule.splits} + {split}")
    masks = " & ".join(m for m in (place.exists, place.mask) if m)
    to_sums = f"{writer.pointer(_SUMS, DType.F32)} + {at} * {made.width} + {place.column}"
    writer.line(f"tl.store({to_sums}, {flash.sums}{f', mask={masks}' if masks else ''})")
    exists = f", mask={place.exists}" if place.exists else ""
    for arg, value in ((_TOPS, flash.top), (_TOTALS, flash.total)):
        pointer = writer.pointer(arg, DType.F32)
        writer.line(f"tl.store({pointer} + {at}, {value}[:, None]{exists})")


def _combine(site: Site, made: Attended, schedule: Schedule, stores: list[Store]) -> Stage:
    """The result, from what the parts left behind; a program for each query head."""
    writer = KernelWriter("attention_combine")
    body = Body(writer, site)
    pid = writer.let("pid", "tl.program_id(0)")
    batch = writer.let("batch", f"{pid} // {made.heads}")
    _, _, parts = _parts(body, made, schedule, batch)
    place = body.span("0", made.columns, made.width, Place(pid, "0", 1, 1))
    number = writer.let("number", f"tl.arange(0, {schedule.splits})[:, None]")
    there = writer.let("there", f"{number} < {parts}")
    part = writer.let("part", f"tl.cast({pid}, tl.int64) * {schedule.splits} + {number}")

    def loaded(arg: Arg, at: str, mask: str, other: str) -> str:
        pointer = f"{writer.pointer(arg, DType.F32)} + {at}"
        return writer.let("x", f"tl.load({pointer}, mask={mask}, other={other})")

    tops = loaded(_TOPS, part, there, 'float("-inf")')
    totals = loaded(_TOTALS, part, there, "0.0")
    mask = f"{there} & {place.mask}" if place.mask else there
    sums = loaded(_SUMS, f"{part} * {made.width} + {place.column}", mask, "0.0")
    weights = writer.let("weights", f"tl.exp2({tops} - tl.max({tops}))")
    total = writer.let("total", f"tl.sum({totals} * {weights})")
    y = writer.let("y", f"tl.sum({sums} * {weights}, axis=0, keep_dims=True) / {total}")
    body.bind(Seen(made.result, made.width), place, y)
    write_stores(body, stores, place)
    warps = 4 if schedule.splits * made.columns <= _FEW else 8
    return writer.finish(dim(made.batch * made.heads), warps, 1)
