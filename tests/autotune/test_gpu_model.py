"""What is predicted of a launch on a GPU: bounds that nothing passes, and what makes a schedule slower."""

import dataclasses

import pytest

from nemoc.autotune.gpu_model import LAUNCH, RATES, Demand, launch_seconds, plan_seconds
from nemoc.codegen.plan import Site
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import GPUS, INTERPRETER, gpu_target
from nemoc.ir import parse
from nemoc.ir.ops import Fused
from support.gpu_trials import paper_binary

HOPPER = gpu_target("cuda:sm_90")
MANY = HOPPER.multiprocessors * 8

MATRIX = Demand(MANY, 1e6, flops=1e9, loaded=1e6, steps=32, tile=(128, 128), stages=3)
"""A launch that matrix units hold up."""

STREAM = Demand(MANY, 1e9, flops=1e4, loaded=1e6, steps=32, tile=(16, 32), stages=3)
"""A launch that memory holds up."""

THIN = dataclasses.replace(STREAM, traffic=1e8, loaded=1e5)
"""The same of programs that ask for little at a time."""

WAITING = dataclasses.replace(STREAM, programs=32, traffic=32e6)
"""The same of too few programs to keep memory busy."""


def seconds(demand: Demand, **binary: object) -> float:
    return launch_seconds(demand, paper_binary(**binary), HOPPER)  # type: ignore[arg-type]


def test_every_gpu_target_has_rates() -> None:
    assert set(RATES) == set(GPUS) - {INTERPRETER}


def test_no_launch_is_faster_than_memory_or_matrix_units() -> None:
    assert seconds(STREAM) > STREAM.traffic / HOPPER.bandwidth
    assert seconds(MATRIX) > MATRIX.programs * MATRIX.flops / RATES[HOPPER.name].matrix


def test_a_launch_takes_time_unless_nothing_has_to_be_done() -> None:
    assert seconds(Demand(0, 1e9)) == 0.0
    assert LAUNCH < seconds(Demand(1, 4.0, loaded=4.0)) < 2 * LAUNCH


def test_one_program_too_many_is_waited_for() -> None:
    even, odd = (dataclasses.replace(MATRIX, programs=n + HOPPER.multiprocessors) for n in (0, 1))
    assert seconds(odd, programs=1) == pytest.approx(2 * seconds(even, programs=1), rel=0.02)


@pytest.mark.parametrize(
    ("base", "slower"),
    [
        (MATRIX, {"spilled": 512}),
        (MATRIX, {"warps": 1, "programs": 1}),
        (MATRIX, {"matrix": ("mma.sync.bf16",)}),
        (MATRIX, {"matrix": ("wgmma.mma_async.bf16", "wgmma.mma_async.tf32")}),
        (MATRIX, {"matrix": ()}),
        (STREAM, {"spilled": 64}),
        (THIN, {"programs": 1}),
    ],
)
def test_code_that_is_worse_is_slower(base: Demand, slower: dict[str, object]) -> None:
    assert seconds(base, **slower) > 1.05 * seconds(base)


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        (MATRIX, {"tile": (16, 128)}),
        (WAITING, {"stages": 2}),
        (STREAM, {"run": 32}),
        (STREAM, {"loaded": 4e6}),
    ],
)
def test_schedules_that_do_worse_are_slower(base: Demand, changed: dict[str, object]) -> None:
    worse = dataclasses.replace(base, **changed)  # type: ignore[arg-type]
    assert seconds(worse) > 1.05 * seconds(base)


def product(rows: str, features: int = 4096) -> Site:
    body = parse(f"""
      graph @body {{
        input %x: bf16[{rows}, 2048]
        input %w: bf16[{features}, 2048]
        %y = linear(%x, %w) : f32[{rows}, {features}]
        return %y
      }}
    """)
    return Site.dense(Fused(body.inputs, body))


def product_seconds(site: Site, sizes: dict[str, int], target: str = HOPPER.name) -> float:
    plan = emit(site, gpu_target(target))
    binaries = [paper_binary()] * len(plan.stages)
    return plan_seconds(site, plan, binaries, gpu_target(target), sizes)


def test_a_product_of_one_row_takes_as_long_as_reading_its_weights() -> None:
    found = product_seconds(product("B"), {"B": 1, "L": 1, "C": 9})
    assert 1.0 < found / (4096 * 2048 * 2 / HOPPER.bandwidth) < 2.0


def test_a_product_of_many_rows_takes_as_long_as_its_arithmetic() -> None:
    found = product_seconds(product("B, L"), {"B": 1, "L": 8192, "C": 8192})
    assert 1.0 < found / (2 * 8192 * 4096 * 2048 / RATES[HOPPER.name].matrix) < 2.0


def test_experts_that_nobody_chose_are_not_read() -> None:
    body = parse("""
      graph @body {
        input %x: bf16[B, 2048]
        input %w: bf16[128, 512, 2048]
        input %offsets: i32[129]
        %y = grouped_linear(%x, %w, %offsets) : f32[B, 512]
        return %y
      }
    """)
    site = Site.dense(Fused(body.inputs, body))
    few, many = (product_seconds(site, {"B": b, "L": 1, "C": 9}) for b in (6, 600))
    assert few < 128 * 512 * 2048 * 2 / HOPPER.bandwidth < many
