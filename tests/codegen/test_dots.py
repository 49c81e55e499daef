"""Products in integers of 32 bits: rows as they are, in three bytes a number, with weights in NVFP4."""

import re

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tvm.dots import dot_decoder
from nemoc.codegen.tvm.linear_region import emit_linear_region
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.region import Fused
from support.assembly import innermost_loops, kernel_assembly
from support.kernels import CompiledSite, KernelSuite
from support.nvfp4 import given
from support.regions import region

CPU = "cpu:znver4"
"""One that has the instruction."""

DENSE = """
    input %x: f32[B, 96]
    input %c: u8[2, 48, 32]
    input %s: f8e4m3[2, 6, 32]
    input %g: f32[]
    %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[2, 96, 32]
    %y = linear(%x, %w) {interleave=32, features=64} : f32[B, 64]
    return %y"""

GATHERED = """
    input %t: f32[TABLE, 32]
    input %i: i32[ROWS] < TABLE
    input %c: u8[5, 2, 16, 32]
    input %s: f8e4m3[5, 2, 2, 32]
    input %g: f32[5]
    input %offsets: i32[6] < ROWS + 1
    %h = relu(%t) : f32[TABLE, 32]
    %x = take_rows(%h, %i) : f32[ROWS, 32]
    %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[5, 2, 32, 32]
    %y = grouped_linear(%x, %w, %offsets) {interleave=32, features=64} : f32[ROWS, 64]
    return %y"""

TWO = """
    input %x: f32[B, 48]
    input %c: u8[1, 24, 32]
    input %s: f8e4m3[1, 3, 32]
    input %g: f32[]
    input %z: f32[B, 32]
    input %d: u8[1, 16, 32]
    input %t: f8e4m3[1, 2, 32]
    input %h: f32[]
    %w = dequantize_nvfp4(%c, %s, %g) {interleave=32} : f32[1, 48, 32]
    %y = linear(%x, %w) {interleave=32, features=30} : f32[B, 30]
    %v = dequantize_nvfp4(%d, %t, %h) {interleave=32} : f32[1, 32, 32]
    %u = linear(%z, %v) {interleave=32, features=30} : f32[B, 30]
    %a = add(%y, %u) : f32[B, 30]
    return %a"""


def gathered(table: str, rows: str) -> str:
    """A product of so many rows that an index chooses of a table."""
    return GATHERED.replace("TABLE", table).replace("ROWS", rows)


SUITE = KernelSuite()
CASE = SUITE.add(Site.dense(region(DENSE)), emit_linear_region)
OTHERS = {
    name: SUITE.add(Site.dense(region(text)), emit_linear_region)
    for name, text in {
        "rows of a table, each several times": gathered("B", "6*B"),
        "some rows of a table": gathered("L", "B"),
        "two products": TWO,
    }.items()
}

needs_the_instruction = pytest.mark.skipif(
    dot_decoder(KernelWriter("x"), cpu_target(), 32) is None,
    reason="this CPU has no products of four bytes in vectors of 512 bits (AVX-512 VNNI)",
)


def _operands(case: CompiledSite, **replaced: torch.Tensor) -> list[torch.Tensor]:
    """Random operands of the region, x last, but for those given."""
    op = case.site.op
    assert isinstance(op, Fused)
    rows = len(replaced["x"])
    inputs = zip(op.body.inputs, given(op, {"B": rows}), strict=True)
    return [replaced.get(v.name, tensor) for v, tensor in inputs]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rows", [1, 5])
def test_region_is_its_body(name: str, rows: int) -> None:
    case, sizes = OTHERS[name], {"B": rows, "L": 7}
    tensors = given(case.site.op, sizes)
    op = case.site.op
    assert isinstance(op, Fused)
    for operand, tensor in zip(op.body.inputs, tensors, strict=True):
        if operand.name == "offsets":
            last = 6 * rows if name.startswith("rows") else rows
            tensor[:] = torch.tensor([0, 0, last // 3, last // 2, last, last])
    case.check(sizes, *tensors, tolerance=2e-6)


@needs_the_instruction
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_rows_lose_no_more_than_sums_in_float32(size: float) -> None:
    x = _random(6, 96) * size
    CASE.check({"B": 6}, *_operands(CASE, x=x), tolerance=3e-7)


@needs_the_instruction
def test_a_block_keeps_its_small_numbers_beside_a_large_one() -> None:
    """What is lost of them is what float32 would lose of their sums with the large one, had that a weight."""
    x = _random(6, 96)
    x[:, ::16] *= 1e4
    CASE.check({"B": 6}, *_operands(CASE, x=x), tolerance=3e-7)
    codes = torch.randint(
        0, 256, (2, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    codes[:, ::8] &= 0xF0  # the large ones meet zeros
    CASE.check({"B": 6}, *_operands(CASE, x=x, packed=codes), tolerance=1e-3)


@needs_the_instruction
def test_numbers_of_few_bits_are_multiplied_exactly() -> None:
    """bf16 within a factor of 8, by weights of which all scales are 1."""
    x = (_random(4, 96).sign() * (1 + _random(4, 96).abs())).to(torch.bfloat16).float()
    scales = torch.ones(2, 6, 32).to(torch.float8_e4m3fn)
    operands = _operands(CASE, x=x, scales=scales, global_scale=torch.tensor(1.0))
    CASE.check({"B": 4}, *operands, tolerance=1e-7)
    (y,) = CASE.run({"B": 4}, *operands)
    assert torch.equal(y, y.to(torch.float64).mul(2**8).round().div(2**8).float())


@needs_the_instruction
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("largest", [1.0, 2 - 2.0**-23, 2 - 2.0**-7, 2 - 2.0**-6, 1e35])
def test_the_largest_sums_fit(sign: float, largest: float) -> None:
    x = torch.full((5, 96), sign * largest)
    x[1::2, ::2] *= -1
    codes = torch.full((2, 48, 32), 0x77, dtype=torch.uint8)
    codes[:, :, 1::2] = 0xFF
    codes[:, :, 2::4] = 0x7F
    tiny = torch.full((2, 6, 32), 2.0**-6).to(torch.float8_e4m3fn)
    CASE.check({"B": 5}, *_operands(CASE, x=x, packed=codes, scales=tiny), tolerance=3e-7)


@needs_the_instruction
def test_numbers_below_two_to_the_minus_104_lose_bits_one_by_one() -> None:
    x = _random(4, 96) * 2.0**-110
    operands = _operands(CASE, x=x)
    CASE.check({"B": 4}, *operands, tolerance=2.0**-14)
    (y,) = CASE.run({"B": 4}, *_operands(CASE, x=torch.full((4, 96), 2.0**-130)))
    assert torch.equal(y, torch.zeros(4, 64))


@needs_the_instruction
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_row(special: float) -> None:
    x = _random(4, 96)
    x[2, 40] = special
    (y,) = CASE.run({"B": 4}, *_operands(CASE, x=x))
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3]].isfinite().all())


@needs_the_instruction
def test_rows_alone_and_together_have_the_same_bits() -> None:
    x = _random(7, 96)
    (together,) = CASE.run({"B": 7}, *_operands(CASE, x=x))
    operands = _operands(CASE, x=x)
    for row in range(7):
        (y,) = CASE.run({"B": 1}, *operands[:-1], x[row : row + 1])
        assert torch.equal(y[0], together[row])


@pytest.mark.parametrize(
    ("table", "rows", "made"),
    [("B", "6*B", "B"), ("2*B", "B", "B"), ("L", "B", "B"), ("32768", "B", "B")],
)
def test_rows_of_a_table_are_made_integers_once_unless_fewer_may_be_taken(
    table: str, rows: str, made: str
) -> None:
    plan = emit_linear_region(Site.dense(region(gathered(table, rows))), cpu_target(CPU))
    assert [str(stage.kernel.tasks) for stage in plan.stages] == [made, "2"]


@pytest.mark.parametrize("rounding", ["", "%q = round_to_int8(%x) : f32[B, L, 1024]"])
def test_loops_over_blocks_spill_nothing(rounding: str) -> None:
    text = f"""
        input %x: f32[B, L, 1024]
        input %c: u8[193, 512, 32]
        input %s: f8e4m3[193, 64, 32]
        input %g: f32[]
        {rounding}
        %w = dequantize_nvfp4(%c, %s, %g) {{interleave=32}} : f32[193, 1024, 32]
        %y = linear({"%q" if rounding else "%x"}, %w) {{interleave=32, features=6176}} : f32[B, L, 6176]
        return %y"""
    plan = emit_linear_region(Site.dense(region(text)), cpu_target(CPU))
    loops = innermost_loops(kernel_assembly(plan.stages[-1], cpu_target(CPU)))
    multiplying = [loop for loop in loops if "vpdpbusd" in loop]
    assert len(multiplying) >= 2  # one row, and several
    assert not re.findall(r"\(%r[sb]p\)", "\n".join(multiplying))
    each = 8 if rounding else 24
    assert {loop.count("vpdpbusd") for loop in multiplying} == {each, 4 * each}
