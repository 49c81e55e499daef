"""Walking through a region's body: what is read where, what is at hand, and what comes as vectors."""

import pytest

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.tvm.body import Body, Column, Rows
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import B, L
from nemoc.ir.types import Value
from support.regions import region

TARGET = cpu_target("cpu:x86-64-v3")
LANES = TARGET.lanes

PARTS = """
    input %x: f32[B, 64]
    input %w: f32[16]
    %a = reshape(%x) {shape=[B, 4, 16]} : f32[B, 4, 16]
    %b = mul(%a, %w) : f32[B, 4, 16]
    %c = reshape(%b) {shape=[B, 64]} : f32[B, 64]
    return %c"""

NORM = """
    input %x: f32[B, L, 64]
    input %w: f32[64]
    %a = silu(%x) : f32[B, L, 64]
    %b = rms_norm(%a, %w) {eps=1e-05, groups=4} : f32[B, L, 64]
    return %b"""


def walk(text: str) -> tuple[Body, dict[str, Value]]:
    """A body in a fresh kernel, and its values by the names of their ops, its inputs by their fields."""
    op = region(text)
    body = Body(KernelWriter("test"), Site.dense(op), TARGET)
    return body, {v.name: v for v in op.body.values()}


def source(body: Body) -> list[str]:
    """The statements written so far."""
    text = body.writer.finish(1).kernel.source
    return [line.strip() for line in text.splitlines()[2:-1]]


def test_buffers_are_called_as_the_operands_that_they_hold() -> None:
    body, values = walk("""
        input %x: f32[B, 8]
        input %y: f32[8]
        input %i: i64[B] < 9
        %a = mul(%x, %y) : f32[B, 8]
        %b = take_rows(%a, %i) : f32[B, 8]
        return %b""")
    body.declare(Rows.of(values["take_rows"]))
    names = [line.partition(" ")[0] for line in source(body)]
    assert sorted(names) == ["a", "b", "index"]


def test_columns_of_parts_are_divided_only_where_no_loop_says_them() -> None:
    body, values = walk(PARTS)
    rows = Rows.of(values["reshape.1"])
    body.declare(rows)
    body.at(rows, "row", "at", 1)
    text = "\n".join(source(body))
    assert "x[row, at]" in text
    assert "[0, (at) % 16]" in text
    body, values = walk(PARTS)
    rows = Rows.of(values["reshape.1"])
    body.declare(rows)
    body.at(rows, "row", Column("i", "j", 16), 1)
    text = "\n".join(source(body))
    assert "[row, j * 16 + i]" in text
    assert "[0, i]" in text and "%" not in text


def test_rows_made_of_rows_count_them() -> None:
    body, values = walk("""
        input %x: f32[B*3, 8]
        %a = exp(%x) : f32[3*B, 8]
        %b = reshape(%a) {shape=[B, 3, 8]} : f32[B, 3, 8]
        %c = sum(%b) {axis=1} : f32[B, 8]
        return %c""")
    rows = Rows.of(values["sum"])
    body.declare(rows)
    assert body.lanes(rows) == LANES
    body.at(rows, "row", "0", LANES)
    assert any("x[(row) * 3 + j, T.Ramp(0, 1, 8)]" in line for line in source(body))


def test_rows_of_several_axes_are_told_apart() -> None:
    body, values = walk("""
        input %x: f32[B, L, 8]
        input %y: f32[B, 1, 8]
        %a = add(%x, %y) : f32[B, L, 8]
        return %a""")
    rows = Rows.of(values["add"])
    body.declare(rows)
    body.at(rows, "row", "at", 1)
    text = "\n".join(source(body))
    assert "a[row, at]" in text
    assert "b[(row) // L, (row) % L, at]" in text


def test_a_value_is_written_once_for_a_place() -> None:
    body, values = walk("""
        input %x: f32[B, 8]
        %a = exp(%x) : f32[B, 8]
        %b = mul(%a, %a) : f32[B, 8]
        %c = add(%b, %a) : f32[B, 8]
        return %c, %b""")
    wanted = [Rows.of(values["add"]), Rows.of(values["mul"])]
    body.declare(*wanted)
    body.all_at(wanted, "row", "at", 1)
    loads = [line for line in source(body) if line.endswith("= x[row, at]")]
    assert len(loads) == 1


def test_the_walk_ends_at_what_is_bound() -> None:
    body, values = walk(NORM)
    body.bind(values["silu"], lambda row, column, lanes: f"near[{row}, {column}, {lanes}]")
    rows = Rows.of(values["silu"])
    body.declare(rows)
    assert source(body) == []
    assert body.lanes(rows) == LANES
    body.at(rows, "row", "at", 4)
    assert source(body) == ["v: T.float32x4 = near[row, at, 4]"]


def test_bindings_are_forgotten_behind_their_block() -> None:
    body, values = walk(NORM)
    rows = Rows.of(values["rms_norm"])
    body.declare(rows)
    with body.bindings():
        body.prepare("row", rows)
        body.at(rows, "row", "0", LANES)
    with pytest.raises(RegionError, match="rms_norm is needed of other rows"):
        body.at(rows, "row", "0", LANES)
    body.prepare("row", rows)
    body.at(rows, "row", "0", LANES)


def test_a_row_that_was_not_prepared_is_refused() -> None:
    body, values = walk(NORM)
    rows = Rows.of(values["rms_norm"])
    body.declare(rows)
    body.prepare("row", rows)
    with pytest.raises(RegionError, match="rms_norm is needed of other rows than those at hand"):
        body.at(rows, "row + 1", "0", 1)
    with pytest.raises(RegionError, match="silu is needed of several rows at once"):
        body.at(Rows.of(values["silu"]), "row + 1", "0", 1)


def test_what_lies_in_memory_is_not_copied_for_a_norm() -> None:
    copied, direct = (NORM, NORM.replace("silu(%x)", "slice(%x) {axis=2, start=0, stop=64}"))
    for text, held in ((copied, True), (direct, False)):
        body, values = walk(text)
        rows = Rows.of(values["rms_norm"])
        body.declare(rows)
        body.prepare("row", rows)
        assert any(line.startswith("held = ") for line in source(body)) is held


def test_a_row_prepared_twice_is_computed_once() -> None:
    body, values = walk(NORM)
    rows = Rows.of(values["rms_norm"])
    body.declare(rows)
    body.prepare("row", rows)
    before = source(body)
    body.prepare("row", rows)
    assert source(body) == before


VECTORS = {
    "parts as wide as a vector": (PARTS, "reshape.1", True, LANES),
    "parts, from anywhere": (PARTS, "reshape.1", False, 1),
    "parts that a vector reaches over": (
        PARTS.replace("64", "48").replace("16", "12"),
        "reshape.1",
        True,
        1,
    ),
    "groups": (NORM, "rms_norm", True, LANES),
    "groups, from anywhere": (NORM, "rms_norm", False, 1),
    "one group, from anywhere": (NORM.replace("groups=4", "groups=1"), "rms_norm", False, LANES),
    "odd groups": (NORM.replace("64", "60"), "rms_norm", True, 1),
    "a slice that begins within a vector": (
        PARTS.replace(
            "return %c", "%d = slice(%c) {axis=1, start=4, stop=36} : f32[B, 32] return %d"
        ),
        "slice",
        True,
        1,
    ),
    "a slice that begins at a vector": (
        PARTS.replace(
            "return %c", "%d = slice(%c) {axis=1, start=8, stop=40} : f32[B, 32] return %d"
        ),
        "slice",
        True,
        LANES,
    ),
    "elements picked one by one": (
        """
        input %x: f32[B, 64]
        input %i: i32[B, 64] < 64
        %a = take_along(%x, %i) : f32[B, 64]
        %b = exp(%a) : f32[B, 64]
        return %b""",
        "exp",
        True,
        1,
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_stay_within_what_repeats(name: str) -> None:
    text, value, aligned, expected = VECTORS[name]
    body, values = walk(text)
    assert body.lanes(Rows.of(values[value]), aligned=aligned) == expected


def test_rows_of_a_value() -> None:
    value = walk(NORM)[1]["silu"]
    rows = Rows.of(value)
    assert (rows.own, rows.row, rows.width) == ((B, L), (64,), 64)
    assert not rows.is_one
    one = Rows(walk(NORM)[1]["weight"], (B, L))
    assert one.is_one and one.settled.lead == ()
    with pytest.raises(RegionError, match="the width of a row of %silu is 64\\*L"):
        _ = Rows.of(value, 2).width
