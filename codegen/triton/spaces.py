"""What can be tuned of GPU kernels: for each lowering the tunables around its default schedule, and what is legal.

Only what leaves the order of sums alone keeps bits. How often a loop loads ahead, which programs run side by side and
how many heads, or rows without sums, a program takes do. Tiles and warps do not: they decide which matrix
instruction is taken, and which thread adds what where a row is summed up.

A tunable is called like the field of the schedule that it sets, with the form before it where there are several. What
the default needs, others may need too.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from nemoc.codegen.mixer import Mixer
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import power_of_two
from nemoc.codegen.tunables import Choices, Tunable
from nemoc.ir.graph import Graph
from nemoc.ir.ops import GroupLimit, RmsNorm, Sum

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from nemoc.codegen.triton.attention import Schedule as AttentionSchedule
    from nemoc.codegen.triton.conv_scan import Programs, ScanSchedule
    from nemoc.codegen.triton.conv_update import UpdateSchedule
    from nemoc.codegen.triton.flash import Attended
    from nemoc.codegen.triton.product_forms import Product
    from nemoc.codegen.triton.product_forms import Schedule as ProductSchedule

    _S = TypeVar("_S", bound=DataclassInstance)

_SUMS = 192
"""Registers of a thread that tiles of sums can have."""

_INSTRUCTION = 16 * 8
"""Elements of the smallest tile that a warp's matrix instruction makes."""

_OF_STATE = 128
"""Registers of a thread that a tile of a recurrence's state can have."""

TILE = Tunable("row_tile", 2048, (256, 512, 1024, 2048, 4096, 8192))
"""Elements of the tile of a program that works row by row."""


def product_schedule(
    choices: Choices,
    default: "ProductSchedule",
    products: Sequence["Product"],
    target: GpuTarget,
    prefix: str = "",
) -> "ProductSchedule":
    """The schedule of products.

    Args:
        choices: of the site.
        default: the schedule that is taken where nothing was tuned.
        products: of the region.
        target: the GPU.
        prefix: of its tunables' names, where a region has several forms.

    Raises:
        IllegalSchedule: tiles of sums do not fit registers, those of operands do not fit shared memory, or warps and
            matrix instructions have less than a tile each.
    """
    # Sums of several products, or of groups, are not kept for a second launch.
    is_shared = len(products) == 1 and products[0].offsets is None and products[0].is_few
    shared = [_around("parts", default.parts, (1, 2, 4, 8))] if is_shared else []
    chosen = _settled(
        choices,
        default,
        (
            _around("rows", default.rows, (16, 32, 64, 128, 256)),
            _around("columns", default.columns, (16, 32, 64, 128, 256)),
            _around("depth", default.depth, (32, 64, 128, 256)),
            _around("warps", default.warps, (2, 4, 8)),
            _around("stages", default.stages, (2, 3, 4, 5, 6), keeps_bits=True),
            _around("neighbours", default.neighbours, (1, 4, 8, 16), keeps_bits=True),
            Tunable("turned", int(default.turned), (0, 1), keeps_bits=False),
            *shared,
        ),
        prefix,
    )
    if chosen == default:
        return chosen
    can_turn = not chosen.native and not any(p.is_wide for p in products)
    choices.require(can_turn or not chosen.turned, "only products of bf16 can be turned")
    room, least = _SUMS * target.warp / len(products), float(_INSTRUCTION)
    usual, mine = (s.rows * s.columns / s.warps for s in (default, chosen))
    choices.require(mine <= max(room, usual), "sums do not fit registers")
    choices.require(mine >= min(least, usual), "warps have no tile each")
    widest = max(16, power_of_two(products[0].features), default.columns)
    choices.require(chosen.columns <= widest, "tiles are wider than the result")
    lowest = min(default.rows, target.nvfp4_rows) if chosen.native else 0
    choices.require(chosen.rows >= lowest, "tiles are lower than a matrix instruction")
    usual, mine = (_ahead(s, products) for s in (default, chosen))
    choices.require(mine <= max(target.shared, usual), "operands do not fit shared memory")
    return chosen


def few_rows_schedule(
    choices: Choices, default: "ProductSchedule", products: Sequence["Product"], target: GpuTarget
) -> "ProductSchedule":
    """The schedule of a form for very few rows; each form of a region has tunables of its own.

    Args:
        choices, default, products, target: as for `product_schedule`.

    Raises:
        IllegalSchedule: sums, of which there is one for each element of a weight's tile, do not fit registers.
    """
    # What stands for sixteen columns at a time needs so many.
    columns = (16, 32) if default.columns >= 16 else (1, 2, 4, 8)
    tunables = (
        _around("columns", default.columns, columns),
        _around("depth", default.depth, (128, 256, 512, 1024)),
        _around("warps", default.warps, (1, 2, 4, 8)),
        _around("stages", default.stages, (1, 2, 3, 4), keeps_bits=True),
    )
    chosen = _settled(choices, default, tunables, f"few{default.rows}_")
    if chosen == default:
        return chosen
    usual, mine = (s.rows * s.columns * s.depth / s.warps for s in (default, chosen))
    room = _SUMS * target.warp / len(products)
    choices.require(mine <= max(room, usual), "sums do not fit registers")
    return chosen


def fragments_schedule(
    choices: Choices, default: "ProductSchedule", made: "Product"
) -> "ProductSchedule":
    """The schedule of a form whose weights are decoded in fragments; each form of a region has tunables of its own.

    Args:
        choices, default: as for `product_schedule`.
        made: the product.

    Raises:
        IllegalSchedule: the codes of a program do not fit registers.
    """
    tunables = (
        _around("columns", default.columns, (16, 32)),
        _around("warps", default.warps, (1, 2, 4, 8)),
    )
    chosen = _settled(choices, default, tunables, f"fragments{default.rows}_")
    if chosen == default:
        return chosen
    usual, mine = (made.width * s.columns / s.warps for s in (default, chosen))
    choices.require(mine <= max(_CODES, usual), "codes do not fit registers")
    return dataclasses.replace(chosen, depth=default.depth // default.warps * chosen.warps)


_CODES = 160 * 32 * 8
"""Codes of a warp at most that are loaded at once: eight in each of 160 registers of its threads."""


def _ahead(schedule: "ProductSchedule", products: Sequence["Product"]) -> float:
    """Bytes of operands that are in shared memory while the next ones arrive."""
    sides = [schedule.rows * x + schedule.columns * w for x, w in map(element_bytes, products)]
    return (schedule.stages - 1) * schedule.depth * max(sides)


def element_bytes(made: "Product") -> tuple[float, float]:
    """Bytes of an element of each operand of a product, as it is loaded: NVFP4 with its block's scale."""
    x, w = (
        0.5625 if packed else float(value.dtype.bytes)
        for packed, value in zip(made.packed, (made.x, made.w), strict=True)
    )
    return x, w


def attention_schedule(
    choices: Choices, default: "AttentionSchedule", made: "Attended", target: GpuTarget
) -> "AttentionSchedule":
    """The schedule of attention; of one token the number of parts too.

    Args:
        choices, default, target: as for `product_schedule`.
        made: the attention.

    Raises:
        IllegalSchedule: tiles do not fit registers or shared memory, or leave warps without a tile.
    """
    tunables = [
        _around("rows", default.rows, (16, 32, 64, 128)),
        _around("keys", default.keys, (16, 32, 64, 128)),
        _around("warps", default.warps, (2, 4, 8)),
        _around("stages", default.stages, (1, 2, 3, 4), keeps_bits=True),
    ]
    if made.length == 1:
        tunables.append(_around("splits", default.splits, (1, 2, 4, 8, 16, 32, 64)))
    chosen = _settled(choices, default, tunables)
    if chosen == default:
        return chosen
    room, least = float(_SUMS * target.warp), float(_INSTRUCTION)
    usual, mine = (s.rows * (made.columns + s.keys) / s.warps for s in (default, chosen))
    choices.require(mine <= max(room, usual), "tiles do not fit registers")
    usual, mine = (s.rows * min(s.keys, made.columns) / s.warps for s in (default, chosen))
    choices.require(mine >= min(least, usual), "warps have no tile each")
    row = made.columns * (made.k.dtype.bytes + made.v.dtype.bytes)
    usual, mine = (s.stages * s.keys * row for s in (default, chosen))
    choices.require(mine <= max(target.shared, usual), "the cache's rows do not fit")
    return chosen


def scan_schedule(choices: Choices, default: "ScanSchedule", mixer: Mixer) -> "ScanSchedule":
    """The schedule of a recurrence over many tokens, and which of its forms is taken.

    Args:
        choices, default: as for `product_schedule`.
        mixer: the region.
    """
    together = mixer.heads // mixer.groups
    tiles = (16, 32, 64, 128)
    chosen = _settled(
        choices,
        default,
        (
            # Always in chunks, from the default on, or never.
            _around("shortest", default.shortest, (1, 1 << 20)),
            _around("chunk", default.chunk, (16, 32, 64, 128, 256)),
            _around("single_chunk", default.single_chunk, (16, 32, 64, 128)),
            _around("part", default.part, tiles),
            _around("depth", default.depth, tiles),
            _around("passed", default.passed, (128, 256, 512, 1024), keeps_bits=True),
            _around("ahead", default.ahead, (1, 2, 4, 8), keeps_bits=True),
        ),
    )
    return dataclasses.replace(
        chosen,
        adding=_programs(choices, "adding", default.adding, together, keeps_bits=True),
        output=_programs(choices, "output", default.output, together, keeps_bits=True),
        single=_programs(choices, "single", default.single, min(4, together), keeps_bits=False),
    )


def _programs(
    choices: Choices, stem: str, default: "Programs", most: int, keeps_bits: bool
) -> "Programs":
    """How heads are shared out in a launch: numbers that divide those of a group."""
    heads = [n for n in (1, 2, 4, 8, 16) if n <= most and most % n == 0]
    return dataclasses.replace(
        default,
        heads=int(
            choices.pick(_around(f"{stem}_heads", default.heads, heads, keeps_bits=keeps_bits))
        ),
        warps=int(choices.pick(_around(f"{stem}_warps", default.warps, (4, 8)))),
    )


def update_schedule(
    choices: Choices, default: "UpdateSchedule", mixer: Mixer, target: GpuTarget
) -> "UpdateSchedule":
    """The schedule of one token of a recurrence.

    Args:
        choices, default, target: as for `product_schedule`.
        mixer: the region.

    Raises:
        IllegalSchedule: a program has more rows than its group or its registers, or threads without an element.
    """
    chosen = _settled(
        choices,
        default,
        (
            _around("rows", default.rows, (8, 16, 32, 64, 128)),
            _around("warps", default.warps, (1, 2, 4, 8)),
        ),
    )
    if chosen == default:
        return chosen
    group = power_of_two(mixer.heads // mixer.groups * mixer.width)
    choices.require(chosen.rows <= group, "a program has more rows than its group")
    tile = chosen.rows * power_of_two(mixer.columns)
    threads = chosen.warps * target.warp
    choices.require(threads <= tile <= threads * _OF_STATE, "states do not fit the threads")
    return chosen


def row_settings(choices: Choices, graph: Graph) -> tuple[int, int]:
    """Elements of the tile, and warps, of what is computed row by row.

    Args:
        choices: of the site.
        graph: the region's body.
    """
    sums = any(isinstance(node.op, RmsNorm | Sum | GroupLimit) for node in graph.nodes)
    warps = Tunable("row_warps", 4, (1, 2, 4, 8), keeps_bits=not sums)
    tile = dataclasses.replace(TILE, keeps_bits=not sums)
    return int(choices.pick(tile)), int(choices.pick(warps))


def _around(name: str, default: int, values: Iterable[int], keeps_bits: bool = False) -> Tunable:
    """A tunable of those values and the default."""
    return Tunable(name, default, tuple(sorted({default, *values})), keeps_bits)


def _settled(
    choices: Choices, default: "_S", tunables: Iterable[Tunable], prefix: str = ""
) -> "_S":
    """The schedule with the fields set that tunables are called like, behind a prefix where several schedules are."""
    picked = {t.name: choices.pick(dataclasses.replace(t, name=prefix + t.name)) for t in tunables}
    return dataclasses.replace(default, **picked)
