"""Sorting slots by group: a launch with a program for each group.

A program counts the slots of the groups before its own, which is where its group starts, and then hands out places from
there in the slots' order. So the sort is stable, and programs need nothing of each other.
"""

from dataclasses import replace

from nemoc.codegen.plan import Arg, Plan, RegionError, Site
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.seen import Place, Seen
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import KernelWriter, size_text
from nemoc.ir.graph import Graph
from nemoc.ir.ops import GroupBy
from nemoc.ir.types import Value

_SLOTS = 1024
"""Slots that a program looks at together."""


def emit_sorting(site: Site, target: GpuTarget) -> Plan:
    """The plan of a region with one sorting of slots, and what is computed slot by slot from its results.

    Raises:
        RegionError: the region is something else.
    """
    site = as_region(site)
    graph = body_of(site)
    op, (order, position, offsets) = _sort(graph)
    writer = KernelWriter("sort")
    body = Body(writer, site)
    total = size_text(order.type.elements)
    group = writer.let("group", "tl.program_id(0)")
    lane = writer.let("lane", f"tl.arange(0, {_SLOTS})[:, None]")

    def groups_of(start: str) -> tuple[str, Place]:
        """The groups of slots from `start` on, none beyond the last slot, and the slots' place."""
        slot = writer.let("slot", f"{start} + {lane}")
        place = Place(slot, "0", _SLOTS, 1, mask=writer.let("exists", f"{slot} < {total}"))
        return body.tile(Seen(op.index, 1), place), place

    place_of = writer.fresh("first", f"{group} * 0")
    with writer.loop("start", total, step=_SLOTS) as start:
        found, at = groups_of(start)
        before = writer.let("before", f"({found} < {group}) & {at.mask}")
        writer.line(f"{place_of} += tl.sum({before}.to(tl.int32))")
    _store_offsets(body, op, offsets, group, place_of, total)
    with writer.loop("start", total, step=_SLOTS) as start:
        found, at = groups_of(start)
        mine = writer.let("mine", f"({found} == {group}) & {at.mask}")
        rank = writer.let("rank", f"tl.cumsum({mine}.to(tl.int32), axis=0)")
        # Slots of other groups are stored nowhere, but what is loaded for them has to be somewhere.
        to = writer.let("to", f"tl.maximum({place_of} + {rank} - 1, 0)")
        row = writer.let("row", f"tl.minimum({at.row}, {total} - 1)")
        slots = replace(at, row=row, mask="", exists=mine)
        places = replace(slots, row=to)
        body.bind(Seen(order, 1), places, row)
        body.bind(Seen(position, 1), slots, to)
        for number, value in enumerate(graph.outputs):
            if value is not offsets:
                by_place = _depends(graph, value, order)
                if by_place == _depends(graph, value, position):
                    raise RegionError(f"%{value.name} is not computed slot by slot")
                body.store(number, Seen(value, 1), places if by_place else slots)
        writer.line(f"{place_of} += tl.sum({mine}.to(tl.int32))")
    return Plan((writer.finish(op.groups),))


def _sort(graph: Graph) -> tuple[GroupBy, tuple[Value, ...]]:
    found = [node for node in graph.nodes if isinstance(node.op, GroupBy)]
    if len(found) != 1:
        raise RegionError(f"the region sorts {len(found)} times, expected once")
    op = found[0].op
    assert isinstance(op, GroupBy)
    return op, found[0].results


def _depends(graph: Graph, value: Value, origin: Value) -> bool:
    """Whether a value is computed from another one, or is it."""
    if value is origin:
        return True
    if value not in graph.producers or isinstance(graph.producers[value].op, GroupBy):
        return False
    return any(_depends(graph, v, origin) for v in graph.producers[value].op.operands())


def _store_offsets(
    body: Body, op: GroupBy, offsets: Value, group: str, first: str, total: str
) -> None:
    """Write where a program's group starts, and from the last program where that ends."""
    writer = body.writer
    for number, value in enumerate(body.graph.outputs):
        if value is offsets:
            pointer = writer.pointer(Arg("result", number), offsets.dtype)
            stride = body.site.results[number].strides[0]
            writer.line(f"tl.store({pointer} + {group} * {size_text(stride)}, {first})")
            end = f"{pointer} + {op.groups} * {size_text(stride)}"
            writer.line(f"tl.store({end}, {total}, mask={group} == 0)")
