"""Products with weights in NVFP4, decoded in the kernel, against float64."""

import re

import pytest
import torch

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.linear_region import emit_linear_region
from nemoc.codegen.tvm.nvfp4 import emit_dequantize_nvfp4
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import DequantizeNvfp4
from nemoc.ir.region import Fused
from support.assembly import innermost_loops, kernel_assembly
from support.kernels import KernelSuite, older_cpus, value
from support.nvfp4 import codes_or_scales, given
from support.regions import region

ROWS = [1, 5, 6, 29]
"""Few enough to decode as they are multiplied, and more."""

BODIES = {
    "dense": """
        input %x: f32[B, 48]
        input %c: u8[3, 24, 32]
        input %s: f8e4m3[3, 3, 32]
        input %g: f32[]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[3, 48, 32]
        %y = linear(%x, %w) {interleave=32, features=96} : f32[B, 96]
        %a = relu(%y) : f32[B, 96]
        return %a""",
    "ragged, a divisor, residual": """
        input %x: f32[B, 16]
        input %c: u8[2, 8, 32]
        input %s: f8e4m3[2, 1, 32]
        input %g: f32[]
        input %r: f32[B, 37]
        %w = dequantize_nvfp4(%c, %s, %g) {dialect="compressed-tensors", interleave=32} : f32[2, 16, 32]
        %y = linear(%x, %w) {interleave=32, features=37} : f32[B, 37]
        %a = add(%r, %y) : f32[B, 37]
        return %a""",
    "behind a norm, wide panels": """
        input %x: f32[B, 80]
        input %n: f32[80]
        input %c: u8[2, 40, 64]
        input %s: f8e4m3[2, 5, 64]
        input %g: f32[]
        %h = rms_norm(%x, %n) {eps=1e-05} : f32[B, 80]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=64} : f32[2, 80, 64]
        %y = linear(%h, %w) {interleave=64, features=128} : f32[B, 128]
        return %y""",
    "narrow panels": """
        input %x: f32[B, 32]
        input %c: u8[2, 16, 16]
        input %s: f8e4m3[2, 2, 16]
        input %g: f32[]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=16} : f32[2, 32, 16]
        %y = linear(%x, %w) {interleave=16, features=30} : f32[B, 30]
        %a = relu(%y) : f32[B, 30]
        return %a""",
    "long rows": """
        input %x: f32[B, 16640]
        input %c: u8[1, 8320, 32]
        input %s: f8e4m3[1, 1040, 32]
        input %g: f32[]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[1, 16640, 32]
        %y = linear(%x, %w) {interleave=32, features=32} : f32[B, 32]
        %a = relu(%y) : f32[B, 32]
        return %a""",
    "groups": """
        input %x: f32[B, 32]
        input %c: u8[5, 2, 16, 32]
        input %s: f8e4m3[5, 2, 2, 32]
        input %g: f32[5]
        input %offsets: i32[6] < B + 1
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[5, 2, 32, 32]
        %y = grouped_linear(%x, %w, %offsets) {interleave=32, features=64} : f32[B, 64]
        %a = relu(%y) : f32[B, 64]
        %q = square(%a) : f32[B, 64]
        return %q""",
    "two products, one packed": """
        input %x: f32[B, 32]
        input %c: u8[1, 16, 32]
        input %s: f8e4m3[1, 2, 32]
        input %g: f32[]
        input %z: f32[B, 24]
        input %v: bf16[1, 24, 32]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[1, 32, 32]
        %y = linear(%x, %w) {interleave=32, features=30} : f32[B, 30]
        %u = linear(%z, %v) {interleave=32, features=30} : f32[B, 30]
        %a = add(%y, %u) : f32[B, 30]
        return %a""",
}

SUITE = KernelSuite()
CASES = {
    name: SUITE.add(Site.dense(region(text)), emit_linear_region) for name, text in BODIES.items()
}

SUITES = {cpu: KernelSuite(cpu_target(f"cpu:{cpu}")) for cpu in older_cpus()}
OLDER = {
    (cpu, name): suite.add(Site.dense(region(BODIES[name])), emit_linear_region)
    for cpu, suite in SUITES.items()
    for name in ("dense", "ragged, a divisor, residual", "behind a norm, wide panels", "groups")
}

UNPACKED = {
    "rows": SUITE.add(
        Site.dense(
            DequantizeNvfp4(
                value(DType.U8, 3, 5, 16), value(DType.F8E4M3, 3, 5, 2), value(DType.F32, 3)
            )
        ),
        emit_dequantize_nvfp4,
    ),
    "blocks": SUITE.add(
        Site.dense(
            DequantizeNvfp4(
                value(DType.U8, 2, 16, 32),
                value(DType.F8E4M3, 2, 2, 32),
                value(DType.F32),
                "compressed-tensors",
                32,
            )
        ),
        emit_dequantize_nvfp4,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", ROWS)
def test_region_is_its_body(name: str, rows: int) -> None:
    CASES[name].check({"B": rows}, *given(CASES[name].site.op, {"B": rows}), tolerance=2e-6)


@pytest.mark.parametrize(("cpu", "name"), OLDER)
def test_older_cpus_give_the_same(cpu: str, name: str) -> None:
    """Without byte shuffles, with short ones, and without products of four bytes."""
    case = OLDER[cpu, name]
    for rows in (1, 7):
        case.check({"B": rows}, *given(case.site.op, {"B": rows}), tolerance=2e-6)


@pytest.mark.parametrize("name", UNPACKED)
def test_weights_can_be_unpacked_as_a_whole(name: str) -> None:
    case = UNPACKED[name]
    generator = torch.Generator().manual_seed(3)
    shapes = [(v.dtype.torch, tuple(map(int, v.shape))) for v in case.site.operands]
    codes, scales = (
        codes_or_scales(torch.empty(shape, dtype=dtype), generator) for dtype, shape in shapes[:2]
    )
    g = torch.rand(shapes[2][1], generator=generator) + 0.5
    case.check({}, codes, scales, g, tolerance=1e-7)


def test_weights_of_groups_without_rows_are_not_touched() -> None:
    case = CASES["groups"]
    op = case.site.op
    assert isinstance(op, Fused)
    tensors = given(op, {"B": 5})
    for tensor, operand in zip(tensors, op.body.inputs, strict=True):
        if operand.name == "offsets":
            tensor[:] = torch.tensor([0, 0, 3, 3, 5, 5])
        elif operand.name == "global_scale":
            tensor[[0, 2, 4]] = float("nan")
    (y,) = case.run({"B": 5}, *tensors)
    assert bool(y.isfinite().all())


def test_panels_of_other_heights_have_no_kernel_and_fall_back() -> None:
    text = BODIES["narrow panels"].replace("16]", "8]").replace("interleave=16", "interleave=8")
    op = region(text.replace("[2, ", "[4, "))
    with pytest.raises(RegionError, match="no skeleton for NVFP4 in blocks of 8 rows"):
        emit_linear_region(Site.dense(op), SUITE.target)


def _assembly(cpu: str, body: str = BODIES["dense"]) -> str:
    target = cpu_target(f"cpu:{cpu}")
    (stage,) = emit(Site.dense(region(body)), target).stages
    return kernel_assembly(stage, target)


@pytest.mark.parametrize(
    ("cpu", "lookup"),
    [
        ("x86-64-v3", r"vpshufb\s.*%ymm"),
        ("x86-64-v4", r"vpshufb\s.*%ymm"),
        ("x86-64-v2", r"pshufb\s.*%xmm"),
        ("apple-m1", r"tbl\.16b|tbl\s+v\d+\.16b"),
    ],
)
def test_codes_are_looked_up_by_byte_shuffles(cpu: str, lookup: str) -> None:
    assert len(re.findall(lookup, _assembly(cpu))) >= 8


def test_loops_over_k_spill_nothing_though_one_kernel_has_those_of_one_row_and_of_many() -> None:
    normed = """
        input %x: f32[B, L, 1024]
        input %n: f32[1024]
        input %c: u8[193, 512, 32]
        input %s: f8e4m3[193, 64, 32]
        input %g: f32[]
        %h = rms_norm(%x, %n) {eps=1e-05} : f32[B, L, 1024]
        %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[193, 1024, 32]
        %y = linear(%h, %w) {interleave=32, features=6176} : f32[B, L, 6176]
        return %y"""
    loops = innermost_loops(_assembly("x86-64-v3", normed))
    multiplying = [loop for loop in loops if loop.count("vfmadd") >= 8]
    assert len({"vpshufb" in loop for loop in multiplying}) == 2  # those of one row decode
    assert not re.findall(r"\(%r[sb]p\)", "\n".join(multiplying))
