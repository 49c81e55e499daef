"""Choosing experts and ordering tokens by them.

Scores of one row are compared as int32 keys that order like the floats: equal floats have equal keys, and the smallest
int32 is no float's key but NaN's, so that it can mark what is taken.
"""

from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.tvm.loops import constant, each_vector, vector_lanes
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, lanes_of, size_text
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.routing import GroupBy, GroupLimit, TopK

_TAKEN = "T.int32(-2147483648)"


def emit_top_k(site: Site, target: CpuTarget) -> Plan:
    """A task selects k times the largest key of a row: lane by lane first, then among the lanes."""
    op = site.op
    assert isinstance(op, TopK)
    x, result = site.operands[0], site.results[0]
    rows, width = x.shape
    assert isinstance(width, int)
    lanes = target.lanes
    padded = -(-width // lanes) * lanes

    writer = KernelWriter("top_k")
    source = writer.buffer("x", site.arg("x"), x)
    y = writer.buffer("y", Arg("result", 0), result)
    keys = writer.local("keys", padded, dtype="int32")

    def order(at: str, n: int) -> None:
        v = writer.value("v", writer.load(source, f"task, {at}", n), n)
        writer.line(f"{_at(keys, at, n)} = {_ordered(writer, v, n)}")

    each_vector(writer, width, vector_lanes([x], target), order)
    for i in range(width, padded):
        writer.line(f"{keys}[{i}] = {_TAKEN}")
    with writer.loop("j", op.k) as j:
        best = writer.value("best", _at(keys, "0", lanes), lanes, "int32")
        block = writer.value("block", f"T.Broadcast(0, {lanes})", lanes, "int32")
        with writer.loop("b", f"{padded // lanes - 1}") as b:
            start = writer.let("start", f"({b} + 1) * {lanes}")
            key = writer.value("key", _at(keys, start, lanes), lanes, "int32")
            here = f"T.Broadcast({start}, {lanes})"
            writer.line(f"{block} = T.Select({key} > {best}, {here}, {block})")
            writer.line(f"{best} = T.max({best}, {key})")
        chosen = _first_of_largest(writer, best, f"({block} + T.Ramp(0, 1, {lanes}))", lanes)
        writer.store(y, f"task, {j}", chosen)
        writer.line(f"{keys}[{chosen}] = {_TAKEN}")
    return Plan((writer.finish(rows),))


def emit_group_limit(site: Site, target: CpuTarget) -> Plan:
    """A task ranks the groups of a row by the sums of their two highest scores; may run in place."""
    op = site.op
    assert isinstance(op, GroupLimit)
    x, result = site.operands[0], site.results[0]
    rows, width = x.shape
    assert isinstance(width, int)
    size = width // op.groups

    writer = KernelWriter("group_limit")
    source = writer.buffer("x", site.arg("x"), x)
    y = writer.buffer("y", Arg("result", 0), result)
    merit = writer.local("merit", op.groups)
    with writer.loop("g", op.groups) as g:
        low = constant(float("-inf"), DType.F32)
        first, second = writer.value("first", low), writer.value("second", low)
        with writer.loop("i", size) as i:
            v = writer.value("v", writer.load(source, f"task, {g} * {size} + {i}"))
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

        def limit(at: str, n: int) -> None:
            index = f"task, {g} * {size} + {at}"
            kept = writer.load(source, index, n)
            fill = constant(op.fill, DType.F32, n)
            writer.store(y, index, f"T.Select({rank} < {op.keep}, {kept}, {fill})", n)

        each_vector(writer, size, vector_lanes([x, result], target), limit)
    return Plan((writer.finish(rows),), in_place=((0, 0),) if x == result else ())


def emit_group_by(site: Site, target: CpuTarget) -> Plan:
    """One task: count the slots of each group, sum the counts, then give out positions in slot order."""
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
    cursor = writer.local("cursor", op.groups, dtype="int32")
    with writer.loop("g", op.groups) as g:
        writer.line(f"{cursor}[{g}] = 0")
    with writer.loop("r", size_text(rows)) as r, writer.loop("j", size_text(width)) as j:
        chosen = writer.value("chosen", f"{group}[{r}, {j}]", 1, "int32")
        writer.line(f"{cursor}[{chosen}] = {cursor}[{chosen}] + 1")
    start = writer.value("start", "0", 1, "int32")
    with writer.loop("g", op.groups) as g:
        count = writer.value("count", f"{cursor}[{g}]", 1, "int32")
        writer.store(offsets, g, start)
        writer.line(f"{cursor}[{g}] = {start}")
        writer.line(f"{start} = {start} + {count}")
    writer.store(offsets, str(op.groups), start)
    with writer.loop("r", size_text(rows)) as r, writer.loop("j", size_text(width)) as j:
        chosen = writer.value("chosen", f"{group}[{r}, {j}]", 1, "int32")
        at = writer.value("at", f"{cursor}[{chosen}]", 1, "int32")
        slot = writer.let("slot", f"{r} * {size_text(width)} + {j}")
        writer.store(order, at, slot)
        writer.store(position, slot, at)
        writer.line(f"{cursor}[{chosen}] = {at} + 1")
    return Plan((writer.finish(1),))


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
