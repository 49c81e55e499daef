"""Which forms the products of a region have, by how many rows there are, and how each is cut into programs.

Whatever is not explained by the GPU's figures is what an H100 measured (`docs/measurements.md`).
"""

from dataclasses import dataclass, replace

from nemoc.codegen.plan import RegionError
from nemoc.codegen.triton.body import LARGEST, narrowest
from nemoc.codegen.triton.operands import is_packed
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import power_of_two
from nemoc.ir.dims import Dim, evaluate_dim, product, symbols_of
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import (
    DequantizeNvfp4,
    GroupedLinear,
    Linear,
    Nvfp4BlockScales,
    QuantizeNvfp4,
    Sum,
    TakeRows,
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
        fragments: whether weights are decoded where matrix units have their operands; warps share the reduction.
        turned: whether weights are the left operand of matrix units, so that sums are made columns by rows.
        parts: how many programs share the reduction of a tile; another launch adds their sums.
        exact: whether sums of FP8 are as exact as f32's, see `dot_fp8` of `nemoc.codegen.triton.device`.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    neighbours: int = 8
    native: bool = False
    skinny: bool = False
    fragments: bool = False
    turned: bool = False
    parts: int = 1
    exact: bool = True

    @property
    def least_depth(self) -> int:
        """How much of the reduction has to be taken at a time: what one matrix instruction does."""
        return 64 if self.native else 16


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
        """Whether numbers are multiplied as f32: some are, or neither of bf16 and f16 holds the other's."""
        operands = zip((self.x, self.w), self.packed, strict=True)
        kinds = {value.dtype for value, packed in operands if not packed}
        return DType.F32 in kinds or kinds == {DType.BF16, DType.F16}

    @property
    def is_few(self) -> bool:
        """Whether rows are the sequences of a batch in a step of one token, or a few."""
        if isinstance(self.count, int):
            return self.count <= 64
        return symbols_of(self.count) <= {"B"}


def products_of(graph: Graph) -> list[Product]:
    """The products of a region's body.

    Raises:
        RegionError: there is none, or they differ in size, or one has no fixed width.
    """
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


_BITS_OF_NVFP4 = 4.5
"""Of an element, its block's scale included."""

_SKINNY_SUMS = 4 * 32 * 64
"""Sums of a program without matrix units at most: 64 registers of each thread of four warps; twice that for one row."""

_SKINNY_ROWS = (1, 2, 4)
"""Rows of programs without matrix units: more have no room for their sums in registers."""


def skinny_forms(
    graph: Graph, products: list[Product], target: GpuTarget
) -> tuple[tuple[int, int], ...]:
    """The forms without matrix units that are worth having: rows of a program, and of a launch at most.

    Reading a weight takes as long as `target.instructions_per_byte` times its bytes instructions, with all
    multiprocessors at work. Until then it can be decoded, which takes about 4 instructions of NVFP4, 2 of FP8 (8 where
    there are none for it), 1 of bf16 and none of f32, and be multiplied with each row, which takes 1. The tiles of
    matrix units take about 6, 3 (9), 0.5 and, as f32 is cut into narrower numbers, 4; but they have at least 16
    columns, for which a program goes through the whole reduction, so that there are fewer of them with fewer bytes
    under way. So a form is worth having as long as reading or the tile takes longer. Of those there are the one of a
    single row, and that of the most rows; but only the former of bf16 and FP8, of which an H100 took up to 1.6 times as
    long for four rows as for a tile of sixteen.

    Rows of a grouped product are a few for each token, in different groups. Those of one token are single; those of
    more are mostly, until as many rows as a quarter of a form's for each group have been chosen.

    Fragments (`fragment_forms`) decode spread codes in half of the instructions that a single row takes here. They are
    for one row too then, unless the result is so narrow that most multiprocessors would have none of their programs, or
    x is computed here, which fragments have in a launch of its own.
    """
    first = products[0]
    if not first.is_few or any(all(p.packed) and target.nvfp4_rows == 16 for p in products):
        return ()
    fragments = fragment_forms(graph, products, target)
    if fragments and _serve_single_rows(graph, first, target):
        return ()
    most = 1 if fragments else max(_SKINNY_ROWS)
    rows = [n for n in _SKINNY_ROWS if n <= most and all(_is_worth(p, n, target) for p in products)]
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
        decode, tile, size = 4.0, 6.0, _BITS_OF_NVFP4 / 8
    elif made.w.dtype == DType.F8E4M3:
        decode, tile, size = (2.0, 3.0, 1.0) if target.fp8 else (8.0, 9.0, 1.0)
    elif made.w.dtype == DType.F32:
        decode, tile, size = 0.0, 4.0, 4.0
    else:
        decode, tile, size = 1.0, 4.0 if made.is_wide else 0.5, 2.0
    if rows > 1 and not made.is_wide and not made.packed[1]:
        return False
    return decode + rows <= max(tile, size * target.instructions_per_byte)


def fragment_forms(
    graph: Graph, products: list[Product], target: GpuTarget
) -> tuple[tuple[int, int], ...]:
    """The forms whose weights are decoded in fragments of matrix units: rows of a program, and of a launch at most.

    For weights in NVFP4, on NVIDIA's GPUs from Ampere on, whose instructions for a warp's own matrix units take eight
    rows at a time. Such a program has no shared memory and no barrier in its loop, and asks for weights before former
    kernels have ended: on an H200 it took two thirds of the time of a tile of sixteen rows, which is decoded into
    shared memory, for four rows, and 0.86 to 0.97 of it for sixteen. With more rows each warp reads too much of x.

    Of grouped products with spread codes, whose rows are in memory: there is one form, of tiles of eight rows, until as
    many have been chosen as a quarter of a tile's for each group. Which group a program has is known only once former
    kernels have ended, so that nothing is loaded before.
    """
    first = products[0]
    if target.backend != "cuda" or len(products) > 1 or not first.is_few:
        return ()
    if first.packed != (False, True) or first.x.dtype != DType.BF16:
        return ()
    op = graph.producers[first.w].op
    own = isinstance(op, DequantizeNvfp4) and {op.packed, op.scales} <= set(graph.inputs)
    if not own or first.width % _LANE or first.features < 16:
        return ()
    if first.offsets is not None:
        of_one = evaluate_dim(first.count, {"B": 1})
        fits = _is_spread(graph, first) and _is_in_memory(graph, first.x)
        return ((8, max(of_one, 2 * first.groups)),) if fits else ()
    if first.x not in graph.inputs and first.width > LARGEST:
        return ()
    return ((8, 8), (16, 16))


def _serve_single_rows(graph: Graph, made: Product, target: GpuTarget) -> bool:
    """Whether programs of fragments, which there are, take single rows as well."""
    if made.offsets is not None:
        return True
    busy = 2 * made.features >= 16 * target.multiprocessors
    return busy and _is_spread(graph, made) and made.x in graph.inputs


def _is_spread(graph: Graph, made: Product) -> bool:
    op = graph.producers[made.w].op
    return isinstance(op, DequantizeNvfp4) and op.spread


def _is_in_memory(graph: Graph, value: Value) -> bool:
    """Whether rows are operands' as they are, if in another order."""
    while value in graph.producers and isinstance(op := graph.producers[value].op, TakeRows):
        value = op.table
    return value in graph.inputs


_LANE = 32
"""Elements of a row of weights that a lane loads at a time: sixteen bytes of codes, two scales."""


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
    fp8 = first.x.dtype == first.w.dtype == DType.F8E4M3
    plain = not first.is_wide and not fp8 and not _is_crowded(graph, products)
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
        rows: of a tile, as the form says; 0 for the one that has no other beside or below it.
    """
    return _with_stages_for(_schedule(graph, products, target, rows), target)


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
    return _with_stages_for(_skinny_schedule(graph, products, target, rows), target)


def _with_stages_for(schedule: Schedule, target: GpuTarget) -> Schedule:
    """A schedule with no more stages than AMD's GPUs have shared memory for."""
    most = 2 if target.backend == "hip" else schedule.stages
    return replace(schedule, stages=min(schedule.stages, most))


_MOST_STEPS = 12
"""Steps of a program of fragments, of sixteen columns, whose weights have room in registers all at once."""


def fragment_schedule(products: list[Product], rows: int) -> Schedule:
    """The schedule of one of `fragment_forms` that is taken where nothing was tuned.

    Four warps share the reduction of sixteen columns; of wide results, which have programs enough, two, so that what a
    program does besides is less of its work. Sixteen rows read twice as much of x, which then serves 32 columns.

    Args:
        products: the region's.
        rows: of a program.
    """
    first = products[0]
    broad = first.features >= _BROAD
    columns = 32 if broad and rows > 8 else 16
    warps = 2 if broad else 4
    while warps < 8 and first.width > _MOST_STEPS * 4 * _LANE * warps:
        warps *= 2
    return Schedule(rows, columns, 4 * _LANE * warps, warps, 1, 1, fragments=True)


def _skinny_schedule(
    graph: Graph, products: list[Product], target: GpuTarget, rows: int
) -> Schedule:
    """Programs of a few columns, for one or more rows.

    A warp takes a thread's 16 bytes from each of 32 places of a row of NVFP4, or twice of bf16 or f32 (four times for
    one row), and loads three such parts ahead; four warps make one to four columns each. How many it is decides on how
    many programs there are: all multiprocessors end together if the most that one of them has is little above the mean,
    and what every program does besides costs as much as about two columns. Sums, which there are for each row and
    element of a weight's part, or each block of NVFP4, take half of a thread's registers (all but a few, for one row)
    at most: rows may have to be computed beside them.
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
    tiles are few for so many multiprocessors, several programs share the reduction of each.
    """
    grouped = made.offsets is not None
    if unpacked:
        columns = max(16, min(64, narrow))
        depth = 256 if flat == _FLAT and not grouped else 128
        schedule = Schedule(flat, columns, depth, 4, 3, 1, turned=columns == 64)
        programs = 5 * target.multiprocessors // 2
    else:
        broad = made.features >= _BROAD
        columns = max(16, min(128 if broad and flat == _MANY else 64, narrow))
        stages = 4 if broad or made.groups > 1 else 6
        schedule = Schedule(flat, columns, 128, 8 if columns == 128 else 4, stages, 1)
        programs = 2 * target.multiprocessors
    if grouped:
        return schedule
    most = programs // -(-made.features // columns)
    most = min(most, -(-made.width // schedule.depth))
    return replace(schedule, parts=max(n for n in (1, 2, 4) if n == 1 or n <= most))


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
    """Tiles of FP8 as it is: half the bytes of bf16, so the reduction is taken in parts twice as long.

    Of many rows sums stay in the matrix units: on an H100 that takes 0.7 to 0.75 of the time, and adds an error of 1e-3
    (of K = 2688 and 4096) to the 3e-2 or so of rounding to FP8.
    """
    narrow = max(16, narrow)
    if made.is_few:
        return Schedule(flat, min(32, narrow), 256, 4, 4, 1, native=True)
    stages = 3 if target.shared > 150 << 10 else 2
    if made.offsets is not None:
        return Schedule(64, narrow, 128, 4, stages, native=True, exact=False)
    return Schedule(128, narrow, 128, 8, stages, native=True, exact=False)


def _native_schedule(made: Product, target: GpuTarget, narrow: int, flat: int) -> Schedule:
    """Tiles of NVFP4 as it is: a quarter of the bytes of bf16, so the reduction is taken in longer parts."""
    narrow = max(16, narrow)
    if made.is_few:
        return Schedule(flat, min(32, narrow), 256, 4, 4, 1, native=True)
    depth = 256 if target.shared > 128 << 10 else 128
    return Schedule(128, narrow, depth, 8, 3, native=True)
