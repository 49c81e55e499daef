"""The watch over interpreted kernels finds what would go wrong on a GPU only."""

from dataclasses import replace

import pytest
import torch

from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.writer import KernelWriter
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Cast
from support.gpu_kernels import INTERPRETER, check_kernel
from support.kernels import value
from support.regions import operands, region
from support.watched import run_watched

SIZE = 64


def run(*lines: str, programs: int = 2, in_place: bool = False) -> torch.Tensor:
    """What some programs make of 64 numbers; `x` and `y` are the pointers, `at` a half's offsets for each program."""
    writer = KernelWriter("test")
    x = writer.pointer(Arg("operand", 0), DType.F32)
    y = x if in_place else writer.pointer(Arg("result", 0), DType.F32)
    writer.line(f"x, y = {x}, {y}")
    writer.line("at = tl.program_id(0) * 32 + tl.arange(0, 32)")
    for line in lines:
        writer.line(line)
    site = Site.dense(Cast(value(DType.F32, SIZE), DType.F32))
    updates = ((0, 0),) if in_place else ()
    plan = Plan((writer.finish(programs),), updates=updates)
    (found,) = run_watched(site, plan, {}, [torch.arange(float(SIZE))])
    return found


def test_a_sound_kernel_runs_as_ever() -> None:
    assert torch.equal(run("tl.store(y + at, tl.load(x + at) + 1)"), torch.arange(1.0, SIZE + 1))


def test_masked_lanes_may_be_anywhere() -> None:
    run("e = at * 9 < 64", "tl.store(y + at * 9, tl.load(x + at * 9, mask=e), mask=e)")


@pytest.mark.parametrize("outside", ["at + 1", "at - 1"])
def test_a_load_outside_the_tensor_is_found(outside: str) -> None:
    with pytest.raises(AssertionError, match="loads what is not its own"):
        run(f"tl.store(y + at, tl.load(x + {outside}))")


def test_a_load_of_what_nothing_has_written_is_found() -> None:
    with pytest.raises(AssertionError, match="reads what nothing has written: result0"):
        run("tl.store(y + at, tl.load(y + at))")


@pytest.mark.parametrize("first", [0, 1])
def test_an_element_that_one_program_reads_and_another_one_writes_is_found(first: int) -> None:
    wrong = (
        "reads what another program writes" if first == 0 else "writes what another program reads"
    )
    with pytest.raises(AssertionError, match=f"{wrong}: operand0"):
        run(
            "z = tl.load(x + tl.arange(0, 32))",
            "tl.debug_barrier()",
            f"own = tl.where(tl.program_id(0) == {first}, 0, 32)",
            "tl.store(y + own + tl.arange(0, 32), z)",
            in_place=True,
        )


def test_two_programs_that_write_one_element_are_found() -> None:
    with pytest.raises(AssertionError, match="writes what another program writes: result0"):
        run("tl.store(y + tl.arange(0, 32), tl.load(x + at))")


@pytest.mark.parametrize("wait", [True, False])
def test_reading_back_takes_a_barrier(wait: bool) -> None:
    lines = ["tl.store(y + at, tl.load(x + at))", "tl.store(y + at, tl.load(y + at))"]
    if wait:
        run(lines[0], "tl.debug_barrier()", "z = tl.load(y + at)", "tl.debug_barrier()", lines[0])
        return
    with pytest.raises(AssertionError, match="reads what it wrote, without a barrier: result0"):
        run(*lines)


@pytest.mark.parametrize("wait", [True, False])
def test_writing_in_place_takes_a_barrier(wait: bool) -> None:
    lines = ["z = tl.load(x + at)", "tl.debug_barrier()", "tl.store(y + at, z + 1)"]
    if wait:
        assert torch.equal(run(*lines, in_place=True), torch.arange(1.0, SIZE + 1))
        return
    with pytest.raises(AssertionError, match="writes what it read, without a barrier: operand0"):
        run(lines[0], lines[2], in_place=True)


def test_an_element_that_a_store_has_twice_is_found() -> None:
    with pytest.raises(AssertionError, match="writes an element twice, without a barrier"):
        run("tl.store(y + at // 2, tl.load(x + at))")


def test_what_is_sorted_along_is_read_where_it_is() -> None:
    op = region("""
      input %k: i32[B, 3] < 8
      input %w: f32[3*B]
      %order, %position, %offsets = group_by(%k) {groups=8} : i32[3*B], i32[3*B], i32[9]
      %t = take_rows(%w, %order) : f32[3*B]
      %q = cast(%position) {dtype=f32} : f32[3*B]
      %r = mul(%w, %q) : f32[3*B]
      return %offsets, %t, %r
    """)
    check_kernel(Site.dense(op), {"B": 5}, *operands(op, {"B": 5}))


def test_a_recurrence_updated_without_its_barrier_is_found() -> None:
    op = region("""
      input %x: f32[B, 4, 8]
      input %dt: f32[B, 4]
      input %a: f32[4]
      input %b: f32[B, 2, 16]
      input %c: f32[B, 2, 16]
      input %state: f32[B, 4, 8, 16]
      %y, %next = ssd_update(%x, %dt, %a, %b, %c, _, %state) : f32[B, 4, 8], f32[B, 4, 8, 16]
      return %y, %next
    """)
    site, given = Site.dense(op), operands(op, {"B": 2})
    plan = emit(site, INTERPRETER)
    run_watched(site, plan, {"B": 2}, given)
    (stage,) = plan.stages
    source = stage.kernel.source.replace("    tl.debug_barrier()\n", "")
    bare = replace(stage, kernel=replace(stage.kernel, source=source))
    with pytest.raises(AssertionError, match="writes what it read, without a barrier: operand5"):
        run_watched(site, replace(plan, stages=(bare,)), {"B": 2}, given)
