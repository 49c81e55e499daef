"""Regions without a matrix product or a recurrence: what is computed row by row, in registers and local arrays.

Element-wise regions are cut into tasks like element-wise ops, of a part of a row or of several rows. Where something
needs a whole row, a task takes whole rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemoc.codegen.plan import Arg, Plan, RegionError, Site, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body, Rows, rows_view
from nemoc.codegen.tvm.loops import Tiles, each_vector
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import Dim, product
from nemoc.ir.types import Value

_BLOCK = Tunable("block", 1024, (256, 512, 1024, 2048, 4096))
"""Elements of one task, where whole rows are not longer and have to stay together."""


def emit_rows(site: Site, target: CpuTarget) -> Plan:
    """The plan of a region whose results are all computed row by row: one launch, in place where that is safe.

    Raises:
        RegionError: a result is not computed row by row.
    """
    reason = RegionError("its results have no rows in common")
    for results in common_rows(body_of(site).outputs):
        try:
            return _emit(site, target, results)
        except RegionError as error:
            reason = error
    raise reason


def common_rows(values: Sequence[Value]) -> Iterator[list[Rows]]:
    """The ways to see values as rows of one number, from the shortest rows on."""
    longest = max(values, key=lambda v: v.type.rank)
    rank = longest.type.rank
    cuts = [*reversed(range(rank))]
    if rank == 0 or not isinstance(longest.shape[-1], int):
        cuts.append(rank)  # elements as rows: slow, but all that can be done
    for cut in cuts:
        found = [rows_of(v, product(longest.shape[:cut])) for v in values]
        rows = [r for r in found if r is not None]
        if len(rows) == len(values):
            yield rows


def rows_of(value: Value, count: Dim) -> Rows | None:
    """A value as so many rows of fixed width, of one axis if possible; none if it has no such rows."""
    rank = value.type.rank
    for trail in (*range(1, rank + 1), 0):
        rows = Rows.of(value, trail)
        if product(rows.lead) == count and isinstance(product(rows.row), int):
            return rows
    return None


@dataclass(frozen=True)
class RowStore:
    """Where a kernel stores a value row by row.

    Attributes:
        rows: the value.
        buffer: the name of the buffer, rows by their elements.
    """

    rows: Rows
    buffer: str

    @classmethod
    def declare(cls, body: Body, rows: Rows, arg: Arg, view: View) -> "RowStore":
        """Declare the buffer of a tensor in which a value is stored.

        Raises:
            LayoutError: rows of the tensor have no common stride.
        """
        return cls(rows, body.writer.buffer("y", arg, rows_view(view, rows)))


def declare_stores(body: Body, site: Site, results: Sequence[Rows]) -> list[RowStore]:
    """Declare the buffers of results of a region and of all operands that they need.

    Raises:
        RegionError: a result is not computed row by row.
        LayoutError: rows of an operand or result have no common stride.
    """
    body.declare(*results)
    numbers = [body.graph.outputs.index(rows.value) for rows in results]
    return [
        RowStore.declare(body, rows, Arg("result", i), site.results[i])
        for i, rows in zip(numbers, results, strict=True)
    ]


def write_row(
    body: Body,
    stores: Sequence[RowStore],
    row: str,
    start: str = "0",
    count: int | str | None = None,
) -> None:
    """Store a prepared row of results: those of one width in one loop, all read before the first is stored.

    Args:
        body: the region's.
        stores: what to store.
        row: the row's number.
        start: the first element to store.
        count: how many elements, where not all are stored; all results then have one width.
    """
    for (width, lanes), group in _loops(body, stores).items():

        def store(at: str, n: int, group: Sequence[RowStore] = group) -> None:
            column = at if start == "0" else f"{start} + {at}"
            elements = body.all_at([s.rows for s in group], row, column, n)
            for s, element in zip(group, elements, strict=True):
                body.writer.store(s.buffer, f"{row}, {column}", element, n)

        each_vector(body.writer, width if count is None else count, lanes, store)


def _loops(body: Body, stores: Sequence[RowStore]) -> dict[tuple[int, int], list[RowStore]]:
    """Results by width and by how many elements come at once."""
    loops: dict[tuple[int, int], list[RowStore]] = {}
    for store in stores:
        loops.setdefault((store.rows.width, body.lanes(store.rows)), []).append(store)
    return loops


def _emit(site: Site, target: CpuTarget, results: Sequence[Rows]) -> Plan:
    writer = KernelWriter("rows", site.choices)
    body = Body(writer, site, target)
    stores = declare_stores(body, site, results)
    width = max(rows.width for rows in results)
    one_loop = len(_loops(body, stores)) == 1
    whole = body.needs_whole_rows(*results) or not one_loop
    block = writer.pick(_BLOCK)
    tiles = Tiles(product(results[0].lead), width, max(block, width) if whole else block)
    with tiles.loop(writer) as (row, start, count):
        body.prepare(row, *results)
        if whole:
            write_row(body, stores, row)
        else:
            write_row(body, stores, row, start, count)
    pairs = in_place_pairs(site, body.read_elsewhere(*results)) if one_loop else ()
    return Plan((writer.finish(tiles.tasks),), in_place=pairs)


def in_place_pairs(site: Site, elsewhere: set[int]) -> tuple[tuple[int, int], ...]:
    """Results that may be stored over operands of the same view, each of which serves one result.

    Operands of equal views may be one piece of memory: none of them may then be read at another place.
    """
    unsafe = {site.operands[i] for i in elsewhere}
    taken: set[int] = set()
    pairs = []
    for result, view in enumerate(site.results):
        for operand, other in enumerate(site.operands):
            if other == view and view not in unsafe and operand not in taken:
                pairs.append((result, operand))
                taken.add(operand)
                break
    return tuple(pairs)
