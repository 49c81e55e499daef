"""Regions without a matrix product or a recurrence: what is computed row by row, in registers.

A program takes some rows, or part of one; where something needs a whole row, whole rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemoc.codegen.plan import Plan, RegionError, Site
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import LARGEST, Body
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.spaces import row_settings
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, product
from nemoc.ir.graph import Graph
from nemoc.ir.ops import CacheWrite, Fp8Scale, GroupLimit, Nvfp4GlobalScale, RmsNorm, Sum, TopK
from nemoc.ir.types import Value

_MOST_ROWS = 256
"""Rows of a program at most, where they are short: their number may be that of a batch."""

_LONGEST_PART = 4096
"""Columns of a long row that a program of whole rows stores at a time."""


def emit_rows(site: Site, target: GpuTarget) -> Plan:
    """The plan of ops whose results are all computed row by row: one launch.

    Raises:
        RegionError: a result is not computed row by row.
    """
    site = as_region(site)
    reasons = []
    for count in _counts(body_of(site)):
        try:
            return _emit(site, count)
        except RegionError as error:
            reasons.append(error)
    raise reasons[0]


def _counts(graph: Graph) -> Iterator[Dim]:
    """The numbers of rows that results may have in common, from the shortest rows on."""
    longest = max((_stored(graph, v) for v in graph.outputs), key=lambda v: v.type.rank)
    counts = [product(longest.shape[:cut]) for cut in reversed(range(longest.type.rank + 1))]
    norms = [node.op for node in graph.nodes if isinstance(node.op, RmsNorm)]
    groups = [dim(product(n.x.shape[:-1]) * n.groups) for n in norms if n.groups > 1]
    yield from dict.fromkeys([*groups, *counts[1:], *counts[:1]])


def _stored(graph: Graph, value: Value) -> Value:
    """What is written to memory for a result: of a cache the new rows."""
    op = graph.producers[value].op if value in graph.producers else None
    return op.rows if isinstance(op, CacheWrite) else value


@dataclass(frozen=True)
class Store:
    """A result of a region, and what is written for it.

    Attributes:
        number: which result.
        seen: what is written, row by row.
        cache: the cache that rows are written into; none where the result is written itself.
    """

    number: int
    seen: Seen
    cache: CacheWrite | None


def stored_results(graph: Graph, count: Dim) -> list[Store]:
    """The results of a body as so many rows.

    Raises:
        RegionError: one has no such rows.
    """
    stores = []
    for number, value in enumerate(graph.outputs):
        op = graph.producers[value].op if value in graph.producers else None
        seen = Seen.by_count(_stored(graph, value), count)
        if seen is None:
            raise RegionError(f"%{value.name} has no rows in common with the others")
        stores.append(Store(number, seen, op if isinstance(op, CacheWrite) else None))
    return stores


def _emit(site: Site, count: Dim) -> Plan:
    graph = body_of(site)
    stores = stored_results(graph, count)
    widths = {s.seen.width for s in stores}
    whole = len(widths) > 1 or any(
        isinstance(n.op, RmsNorm | TopK | GroupLimit | Nvfp4GlobalScale | Fp8Scale)
        for n in graph.nodes
    )
    tile, warps = row_settings(site.choices, graph)
    writer = KernelWriter("rows")
    body = Body(writer, site)
    width = max(widths)
    columns = min(power_of_two(width), _LONGEST_PART if whole else 1024)
    rows = min(_MOST_ROWS, max(1, tile // power_of_two(max(width, _widest(graph)))))
    if isinstance(count, int):
        rows = min(rows, power_of_two(count))
    parts = 1 if whole else -(-width // columns)
    pid = writer.let("pid", "tl.program_id(0)")
    block = pid if parts == 1 else writer.let("block", f"{pid} // {parts}")
    place = row_place(writer, block, rows, count)
    if whole:
        _store_whole(body, stores, place)
    else:
        start = "0" if parts == 1 else writer.let("start", f"{pid} % {parts} * {columns}")
        write_stores(body, stores, body.span(start, columns, width, place))
    tasks = dim(ceil_div(count, rows) * parts)
    return Plan((writer.finish(tasks, warps),), updates=cache_updates(site, stores))


def _widest(graph: Graph) -> int:
    """Elements of the longest row that has to be looked at as a whole, besides results."""
    rows = [node.op.x for node in graph.nodes if isinstance(node.op, TopK | GroupLimit)]
    sums = [node.op.x for node in graph.nodes if isinstance(node.op, Sum)]
    widths = [value.shape[-1] for value in (*rows, *sums)]
    return max((width for width in widths if isinstance(width, int)), default=1)


def row_place(writer: KernelWriter, block: str, rows: int, count: Dim) -> Place:
    """The rows of a block, those past the last clamped to it; no columns yet."""
    base = f"tl.arange(0, {rows})[:, None]"
    number = writer.let("number", base if block == "0" else f"{block} * {rows} + {base}")
    total = size_text(count)
    exists = "" if isinstance(count, int) and count % rows == 0 else f"{number} < {total}"
    if not exists:
        return Place(number, "0", rows, 1)
    row = writer.let("row", f"tl.minimum({number}, {total} - 1)")
    return Place(row, "0", rows, 1, exists=writer.let("exists", exists))


def cache_updates(site: Site, stores: Sequence[Store]) -> tuple[tuple[int, int], ...]:
    """The caches among a region's results, each with the operand that it updates."""
    inputs = body_of(site).inputs
    return tuple((s.number, inputs.index(s.cache.cache)) for s in stores if s.cache is not None)


def _store_whole(body: Body, stores: Sequence[Store], place: Place) -> None:
    for store in stores:
        width = store.seen.width
        if place.rows * power_of_two(width) <= LARGEST // 2:
            write_stores(body, [store], body.whole(width, place))
            continue
        body.prepare(store.seen, place)
        with body.writer.loop("start", str(width), step=_LONGEST_PART) as start:
            write_stores(body, [store], body.span(start, _LONGEST_PART, width, place))


def write_stores(body: Body, stores: Sequence[Store], place: Place) -> None:
    """Store the tiles of results at a place."""
    for store in stores:
        if store.cache is not None:
            body.store_rows(store.number, store.cache, place, store.seen.width)
        else:
            body.store(store.number, store.seen, place)
