"""Choosing experts and ordering tokens by them.

Scores of one row are compared as int32 keys that order like the floats: equal floats have equal keys, and the smallest
int32 is no float's key but NaN's, so that it can mark what is taken.
"""

from collections.abc import Callable

from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.tvm.loops import constant, each_vector, vector_lanes
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, lanes_of, size_text
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.routing import GroupBy, GroupLimit, TopK

_TAKEN = "T.int32(-2147483648)"


def emit_top_k(site: Site, target: CpuTarget) -> Plan:
    """A task selects from one row."""
    op = site.op
    assert isinstance(op, TopK)
    x, result = site.operands[0], site.results[0]
    rows, width = x.shape
    assert isinstance(width, int)
    writer = KernelWriter("top_k")
    source = writer.buffer("x", site.arg("x"), x)
    y = writer.buffer("y", Arg("result", 0), result)

    def load(at: str, n: int) -> str:
        return writer.load(source, f"task, {at}", n)

    chosen = write_top_k(writer, target, width, op.k, vector_lanes([x], target), load)
    with writer.loop("j", op.k) as j:
        writer.store(y, f"task, {j}", f"{chosen}[{j}]")
    return Plan((writer.finish(rows),))


def write_top_k(
    writer: KernelWriter,
    target: CpuTarget,
    width: int,
    k: int,
    lanes: int,
    load: Callable[[str, int], str],
) -> str:
    """Select k times the largest key of a row: lane by lane first, then among the lanes.

    Args:
        width: elements of the row.
        lanes: elements that `load` can give at once.
        load: f32 elements from an index on, given how many.

    Returns:
        The local array that holds the k indices, int32.
    """
    full = target.lanes
    padded = -(-width // full) * full
    keys = writer.local("keys", padded, dtype="int32")
    result = writer.local("chosen", k, dtype="int32")

    def order(at: str, n: int) -> None:
        v = writer.value("v", load(at, n), n)
        writer.line(f"{_at(keys, at, n)} = {_ordered(writer, v, n)}")

    each_vector(writer, width, lanes, order)
    for i in range(width, padded):
        writer.line(f"{keys}[{i}] = {_TAKEN}")
    with writer.loop("j", k) as j:
        best = writer.value("best", _at(keys, "0", full), full, "int32")
        block = writer.value("block", f"T.Broadcast(0, {full})", full, "int32")
        with writer.loop("b", f"{padded // full - 1}") as b:
            start = writer.let("start", f"({b} + 1) * {full}")
            key = writer.value("key", _at(keys, start, full), full, "int32")
            here = f"T.Broadcast({start}, {full})"
            writer.line(f"{block} = T.Select({key} > {best}, {here}, {block})")
            writer.line(f"{best} = T.max({best}, {key})")
        chosen = _first_of_largest(writer, best, f"({block} + T.Ramp(0, 1, {full}))", full)
        writer.line(f"{result}[{j}] = {chosen}")
        writer.line(f"{keys}[{chosen}] = {_TAKEN}")
    return result


def emit_group_limit(site: Site, target: CpuTarget) -> Plan:
    """A task limits one row; may run in place."""
    op = site.op
    assert isinstance(op, GroupLimit)
    x, result = site.operands[0], site.results[0]
    rows, width = x.shape
    assert isinstance(width, int)
    size = width // op.groups
    writer = KernelWriter("group_limit")
    source = writer.buffer("x", site.arg("x"), x)
    y = writer.buffer("y", Arg("result", 0), result)
    kept = write_group_limit(writer, op, size, lambda at: writer.load(source, f"task, {at}"))
    with writer.loop("g", op.groups) as g:

        def limit(at: str, n: int) -> None:
            index = f"task, {g} * {size} + {at}"
            fill = constant(op.fill, DType.F32, n)
            value = f"T.Select({kept}[{g}] > 0, {writer.load(source, index, n)}, {fill})"
            writer.store(y, index, value, n)

        each_vector(writer, size, vector_lanes([x, result], target), limit)
    return Plan((writer.finish(rows),), in_place=((0, 0),) if x == result else ())


def write_group_limit(
    writer: KernelWriter, op: GroupLimit, size: int, load: Callable[[str], str]
) -> str:
    """Rank the groups of a row by the sums of their two highest scores.

    Args:
        size: elements of a group.
        load: the element at an index, f32.

    Returns:
        The local array that says of each group whether it stays: int32, 1 or 0.
    """
    merit = writer.local("merit", op.groups)
    kept = writer.local("kept", op.groups, dtype="int32")
    with writer.loop("g", op.groups) as g:
        low = constant(float("-inf"), DType.F32)
        first, second = writer.value("first", low), writer.value("second", low)
        with writer.loop("i", size) as i:
            v = writer.value("v", load(f"{g} * {size} + {i}"))
            writer.line(f"{second} = T.max({second}, T.min({first}, {v}))")
            writer.line(f"{first} = T.max({first}, {v})")
        writer.line(f"{merit}[{g}] = {first} + {second}")
    with writer.loop("g", op.groups) as g:
        mine = writer.value("mine", f"{merit}[{g}]")
        rank = writer.value("rank", "T.int32(0)", 1, "int32")
        with writer.loop("h", op.groups) as h:
            other = writer.value("other", f"{merit}[{h}]")
            ahead = f"T.Or({other} > {mine}, T.And({other} == {mine}, {h} < {g}))"
            writer.line(f"{rank} = {rank} + T.Select({ahead}, 1, 0)")
        writer.line(f"{kept}[{g}] = T.Select({rank} < {op.keep}, 1, 0)")
    return kept


def emit_group_by(site: Site, target: CpuTarget) -> Plan:
    """One task does it all."""
    op = site.op
    assert isinstance(op, GroupBy)
    index = site.operands[0]
    rows, width = index.shape

    writer = KernelWriter("group_by")
    group = writer.buffer("index", site.arg("index"), index)
    order, position, offsets = (
        writer.buffer(name, Arg("result", i), site.results[i])
        for i, name in enumerate(("order", "position", "offsets"))
    )

    def place(slot: str, at: str) -> None:
        writer.store(order, at, slot)
        writer.store(position, slot, at)

    write_group_by(
        writer,
        op.groups,
        (size_text(rows), size_text(width)),
        lambda r, j: f"{group}[{r}, {j}]",
        lambda at, start: writer.store(offsets, at, start),
        place,
    )
    return Plan((writer.finish(1),))


def write_group_by(
    writer: KernelWriter,
    groups: int,
    shape: tuple[str, str],
    load: Callable[[str, str], str],
    start_group: Callable[[str, str], None],
    place: Callable[[str, str], None],
) -> None:
    """Sort slots by their groups: count those of each group, sum the counts, then give out positions in slot order.

    Args:
        writer: the kernel.
        groups: how many groups there are.
        shape: rows, and slots of each row, int32.
        load: the group of a slot, given its row and its number there.
        start_group: told each group's number and its first position, and at last how many groups and slots there are.
        place: told each slot and its position.
    """
    rows, width = shape
    cursor = writer.local("cursor", groups, dtype="int32")
    with writer.loop("g", groups) as g:
        writer.line(f"{cursor}[{g}] = 0")
    with writer.loop("r", rows) as r, writer.loop("j", width) as j:
        chosen = writer.value("chosen", load(r, j), 1, "int32")
        writer.line(f"{cursor}[{chosen}] = {cursor}[{chosen}] + 1")
    start = writer.value("start", "0", 1, "int32")
    with writer.loop("g", groups) as g:
        count = writer.value("count", f"{cursor}[{g}]", 1, "int32")
        start_group(g, start)
        writer.line(f"{cursor}[{g}] = {start}")
        writer.line(f"{start} = {start} + {count}")
    start_group(str(groups), start)
    with writer.loop("r", rows) as r, writer.loop("j", width) as j:
        chosen = writer.value("chosen", load(r, j), 1, "int32")
        at = writer.value("at", f"{cursor}[{chosen}]", 1, "int32")
        slot = writer.let("slot", f"{r} * {width} + {j}")
        place(slot, at)
        writer.line(f"{cursor}[{chosen}] = {at} + 1")


def _at(buffer: str, index: str, lanes: int) -> str:
    """Elements of a local array."""
    return f"{buffer}[{index}]" if lanes == 1 else f"{buffer}[T.Ramp({index}, 1, {lanes})]"


def _ordered(writer: KernelWriter, x: str, lanes: int) -> str:
    """int32 keys in the order of f32 values: the bits, of negative values all but the sign inverted; −0 as 0."""
    math = VectorMath(writer, lanes)
    kind = lanes_of("int32", lanes)
    bits = math.whole("bits", f'T.reinterpret("{kind}", {x})')
    flipped = f"T.bitwise_xor({bits}, T.bitwise_and(T.shift_right({bits}, T.int32(31)), T.int32(2147483647)))"
    zero = constant(0, DType.I32, lanes)
    return f"T.Select({x} == {constant(0.0, DType.F32, lanes)}, {zero}, {flipped})"


def _first_of_largest(writer: KernelWriter, best: str, index: str, lanes: int) -> str:
    """Of the lanes with the largest key the lowest index: the largest int64 of (key, 2³¹ − 1 − index), by halves."""
    wide = lanes_of("int64", lanes)
    key = f'T.shift_left(T.Cast("{wide}", {best}), T.int64(32))'
    name = writer.value(
        "pair", f'{key} + T.Cast("{wide}", T.int32(2147483647) - {index})', lanes, "int64"
    )
    while lanes > 2:
        lanes //= 2
        kind = lanes_of("int64", lanes)
        half = writer.local("half", 1, lanes, "int64")
        low, high = f'T.vectorlow("{kind}", {name})', f'T.vectorhigh("{kind}", {name})'
        writer.line(f"{half}[0] = T.max({low}, {high})")
        name = f"{half}[0]"
    largest = f"T.max(T.Shuffle([{name}], [0]), T.Shuffle([{name}], [1]))"
    chosen = f'T.int32(2147483647) - T.Cast("int32", T.bitwise_and({largest}, T.int64(2147483647)))'
    return writer.value("chosen", chosen, 1, "int32")
