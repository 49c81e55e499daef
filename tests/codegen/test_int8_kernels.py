"""Products in integers against float64: rows rounded to int8, weights in NVFP4."""

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.linear_region import emit_linear_region
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import RoundToInt8
from nemoc.ir.region import Fused
from support.kernels import CompiledSite, KernelSuite, older_cpus, value
from support.nvfp4 import given
from support.regions import region

ROWS = [1, 3, 4, 29]
"""With and without rows that share the decoding of a panel."""

BODIES = {
    "dense": """
        input %x: f32[B, 144]
        input %c: u8[3, 72, 32]
        input %s: f8e4m3[3, 9, 32]
        input %g: f32[]
        %q = round_to_int8(%x) : f32[B, 144]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[3, 144, 32]
        %y = linear(%q, %w) {interleave=32, features=96} : f32[B, 96]
        %a = relu(%y) : f32[B, 96]
        return %a""",
    "ragged, a divisor, residual": """
        input %x: f32[B, 16]
        input %c: u8[2, 8, 32]
        input %s: f8e4m3[2, 1, 32]
        input %g: f32[]
        input %r: f32[B, 37]
        %q = round_to_int8(%x) : f32[B, 16]
        %w = dequantize_nvfp4(%c, %s, %g) {dialect="compressed-tensors", interleave=32} : f32[2, 16, 32]
        %y = linear(%q, %w) {interleave=32, features=37} : f32[B, 37]
        %a = add(%r, %y) : f32[B, 37]
        return %a""",
    "narrow panels": """
        input %x: f32[B, 32]
        input %c: u8[2, 16, 16]
        input %s: f8e4m3[2, 2, 16]
        input %g: f32[]
        %q = round_to_int8(%x) : f32[B, 32]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=16} : f32[2, 32, 16]
        %y = linear(%q, %w) {interleave=16, features=30} : f32[B, 30]
        return %y""",
    "gathered rows in groups": """
        input %t: f32[L, 32]
        input %i: i32[B] < L
        input %c: u8[5, 2, 16, 32]
        input %s: f8e4m3[5, 2, 2, 32]
        input %g: f32[5]
        input %offsets: i32[6] < B + 1
        %x = take_rows(%t, %i) : f32[B, 32]
        %q = round_to_int8(%x) : f32[B, 32]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[5, 2, 32, 32]
        %y = grouped_linear(%q, %w, %offsets) {interleave=32, features=64} : f32[B, 64]
        %a = relu(%y) : f32[B, 64]
        return %a""",
    "blocks of another length": """
        input %x: f32[B, 48]
        input %c: u8[1, 24, 32]
        input %s: f8e4m3[1, 3, 32]
        input %g: f32[]
        %q = round_to_int8(%x) {block=12} : f32[B, 48]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[1, 48, 32]
        %y = linear(%q, %w) {interleave=32, features=32} : f32[B, 32]
        return %y""",
    "weights that are not packed": """
        input %x: f32[B, 48]
        input %w: bf16[1, 48, 32]
        %q = round_to_int8(%x) : f32[B, 48]
        %y = linear(%q, %w) {interleave=32, features=32} : f32[B, 32]
        return %y""",
}
BEHIND_A_NORM = """
    input %x: f32[B, 80]
    input %n: f32[80]
    input %c: u8[2, 40, 32]
    input %s: f8e4m3[2, 5, 32]
    input %g: f32[]
    %h = rms_norm(%x, %n) {eps=1e-05} : f32[B, 80]
    %q = round_to_int8(%h) : f32[B, 80]
    %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[2, 80, 32]
    %y = linear(%q, %w) {interleave=32, features=64} : f32[B, 64]
    return %y"""

SUITE = KernelSuite()
CASES = {
    name: SUITE.add(Site.dense(region(text)), emit_linear_region) for name, text in BODIES.items()
}
NORM = SUITE.add(Site.dense(region(BEHIND_A_NORM)), emit_linear_region)
ALONE = SUITE.add(Site.dense(RoundToInt8(value(DType.F32, 5, 96))), emit)

SUITES = {cpu: KernelSuite(cpu_target(f"cpu:{cpu}")) for cpu in older_cpus()}
OLDER = {
    (cpu, name): suite.add(Site.dense(region(BODIES[name])), emit_linear_region)
    for cpu, suite in SUITES.items()
    for name in ("dense", "gathered rows in groups")
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", ROWS)
def test_region_is_its_body(name: str, rows: int) -> None:
    sizes = {"B": rows, "L": 7}
    CASES[name].check(sizes, *given(CASES[name].site.op, sizes), tolerance=2e-6)


@pytest.mark.parametrize(("cpu", "name"), OLDER)
def test_older_cpus_give_the_same(cpu: str, name: str) -> None:
    case = OLDER[cpu, name]
    for rows in (1, 5):
        sizes = {"B": rows, "L": 7}
        case.check(sizes, *given(case.site.op, sizes), tolerance=2e-6)


def test_what_is_rounded_may_be_computed_in_the_kernel() -> None:
    """A number next to the middle of two steps may go to either: so few that they change results by thousandths."""
    sizes = {"B": 29}
    NORM.check(sizes, *given(NORM.site.op, sizes), tolerance=5e-3)


def test_numbers_are_rounded_by_themselves_to_the_bit() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    x[2, 16:32] = 0.0
    x[3, :16] = 1e-39
    ALONE.check({}, x)


def test_a_block_by_itself_is_spoiled_by_what_is_no_number() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    x[3, 17], x[4, 40] = float("nan"), float("inf")
    (y,) = ALONE.run({}, x)
    spoiled = torch.zeros(5, 96, dtype=torch.bool)
    spoiled[3, 16:32], spoiled[4, 32:48] = True, True
    assert torch.equal(y.isnan(), spoiled)


def _special(case: CompiledSite, special: float) -> torch.Tensor:
    op = case.site.op
    assert isinstance(op, Fused)
    tensors = given(op, {"B": 3})
    for operand, tensor in zip(op.body.inputs, tensors, strict=True):
        if operand.name == "x":
            tensor[1, 20] = special
    (y,) = case.run({"B": 3}, *tensors)
    return y


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_lost(special: float) -> None:
    y = _special(CASES["narrow panels"], special)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_the_largest_numbers_do_not_overflow_sixteen_bits() -> None:
    case = CASES["dense"]
    op = case.site.op
    assert isinstance(op, Fused)
    tensors = given(op, {"B": 4})
    for operand, tensor in zip(op.body.inputs, tensors, strict=True):
        if operand.name == "x":
            tensor[:2], tensor[2:] = 3.0, -3.0
        if operand.name == "packed":
            tensor[:, ::2], tensor[:, 1::2] = 0x77, 0xFF
            tensor[0] = 0x77
    case.check({"B": 4}, *tensors, tolerance=2e-6)


@pytest.mark.parametrize(
    ("cpu", "instruction"),
    [("x86-64-v3", "pmadd.ub.sw"), ("x86-64-v4", "pmadd.ub.sw"), ("znver4", "vpdpbusd")],
)
def test_bytes_are_multiplied_where_the_cpu_can(cpu: str, instruction: str) -> None:
    plan = emit_linear_region(Site.dense(region(BODIES["dense"])), cpu_target(f"cpu:{cpu}"))
    made, multiplied = (stage.kernel.source for stage in plan.stages)
    assert instruction in multiplied
    assert "llvm.x86" not in made


def test_other_cpus_multiply_what_is_rounded_in_float32() -> None:
    plan = emit_linear_region(Site.dense(region(BODIES["dense"])), cpu_target("cpu:apple-m1"))
    (stage,) = plan.stages
    assert "pmadd" not in stage.kernel.source
