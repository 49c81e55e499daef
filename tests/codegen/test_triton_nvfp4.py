"""GPU kernels that make NVFP4 of activations and multiply it, in Triton's interpreter and as machine code."""

import functools
import re
from pathlib import Path

import pytest
import torch

from nemoc.codegen.check import check_site
from nemoc.codegen.plan import Site
from nemoc.codegen.triton.build import compile_variants
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.target import gpu_target
from nemoc.ir import parse
from nemoc.ir.ops import Fused
from support.gpu_kernels import assembly, check_kernel, variant
from support.kernels import relative_error

NATIVE = {
    "cuda:sm_100": "tcgen05.mma.kind::mxf4nvf4",
    "cuda:sm_120": "mma.sync.kind::mxf4nvf4",
}
"""GPUs whose matrix units multiply NVFP4 as it is, and by what instructions."""


def region(text: str) -> Site:
    """The dense site of a region whose body is that text."""
    body = parse(f"graph @body {{\n{text}\n}}\n")
    return Site.dense(Fused(body.inputs, body))


def normed(width: int) -> Site:
    """Rows that are normed and quantized."""
    return region(f"""
      input %h: bf16[B, L, {width}]
      input %weight: f32[{width}]
      %wide = cast(%h) {{dtype=f32}} : f32[B, L, {width}]
      %n = rms_norm(%wide, %weight) {{eps=1e-05}} : f32[B, L, {width}]
      %x = reshape(%n) {{shape=[B*L, 1, {width}]}} : f32[B*L, 1, {width}]
      %g = nvfp4_global_scale(%x) : f32[B*L]
      %s = nvfp4_block_scales(%x, %g) : f8e4m3[B*L, 1, {width // 16}]
      %q = quantize_nvfp4(%x, %s, %g) : u8[B*L, 1, {width // 2}]
      return %g, %s, %q
    """)


def dense(width: int, features: int) -> Site:
    """A product of rows and a weight that are NVFP4, and what follows it."""
    return region(f"""
      input %xq: u8[B*L, 1, {width // 2}]
      input %xs: f8e4m3[B*L, 1, {width // 16}]
      input %xg: f32[B*L]
      input %wq: u8[{features}, {width // 2}]
      input %ws: f8e4m3[{features}, {width // 16}]
      input %wg: f32[]
      %d = dequantize_nvfp4(%xq, %xs, %xg) : f32[B*L, 1, {width}]
      %x = reshape(%d) {{shape=[B, L, {width}]}} : f32[B, L, {width}]
      %w = dequantize_nvfp4(%wq, %ws, %wg) : f32[{features}, {width}]
      %y = linear(%x, %w) : f32[B, L, {features}]
      %r = relu(%y) : f32[B, L, {features}]
      return %r
    """)


def grouped(width: int, features: int, groups: int, rows: str = "B*L") -> Site:
    """A product of gathered rows, as of experts."""
    return region(f"""
      input %xq: u8[{rows}, 1, {width // 2}]
      input %xs: f8e4m3[{rows}, 1, {width // 16}]
      input %xg: f32[{rows}]
      input %token: i32[2*{rows}] < {rows}
      input %wq: u8[{groups}, {features}, {width // 2}]
      input %ws: f8e4m3[{groups}, {features}, {width // 16}]
      input %wg: f32[{groups}]
      input %offsets: i32[{groups + 1}]
      %d = dequantize_nvfp4(%xq, %xs, %xg) : f32[{rows}, 1, {width}]
      %t = reshape(%d) {{shape=[{rows}, {width}]}} : f32[{rows}, {width}]
      %x = take_rows(%t, %token) : f32[2*{rows}, {width}]
      %w = dequantize_nvfp4(%wq, %ws, %wg) {{dialect="compressed-tensors"}} : f32[{groups}, {features}, {width}]
      %y = grouped_linear(%x, %w, %offsets) : f32[2*{rows}, {features}]
      return %y
    """)


def active(width: int, features: int) -> Site:
    """A product whose activation is quantized by a tensor scale that is known before."""
    return region(f"""
      input %x: bf16[B, L, {width}]
      input %w: bf16[{features}, {width}]
      input %g: f32[]
      %y = linear(%x, %w) : f32[B, L, {features}]
      %r = relu(%y) : f32[B, L, {features}]
      %a = square(%r) : f32[B, L, {features}]
      %v = reshape(%a) {{shape=[B*L, 1, {features}]}} : f32[B*L, 1, {features}]
      %s = nvfp4_block_scales(%v, %g) : f8e4m3[B*L, 1, {features // 16}]
      %q = quantize_nvfp4(%v, %s, %g) : u8[B*L, 1, {features // 2}]
      return %s, %q
    """)


def packed(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and the tensor scales of random matrices [..., N, K]."""
    generator = torch.Generator().manual_seed(seed)
    *lead, rows, width = shape
    codes = torch.randint(0, 256, (*lead, rows, width // 2), generator=generator)
    scales = torch.rand(*lead, rows, width // 16, generator=generator).mul(8).exp2()
    largest = torch.rand(lead, generator=generator) + 0.5
    return codes.to(torch.uint8), scales.to(torch.float8_e4m3fn), largest


@pytest.mark.parametrize("width,rows", [(48, 12), (16400, 2)])
def test_rows_are_quantized_to_the_bit(width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(1, rows, width, generator=generator).exp()
    h[0, 1], h[0, 0, :16] = 0.0, 0.0
    weight = torch.randn(width, generator=generator)
    check_kernel(normed(width), {"B": 1, "L": rows}, h.bfloat16(), weight)


def test_what_is_rounded_before_is_held_against_what_is_rounded() -> None:
    site = region("""
      input %h: f32[B, 320]
      %n = cast(%h) {dtype=bf16} : bf16[B, 320]
      %x = reshape(%n) {shape=[B, 1, 320]} : bf16[B, 1, 320]
      %g = nvfp4_global_scale(%x) : f32[B]
      %s = nvfp4_block_scales(%x, %g) : f8e4m3[B, 1, 20]
      %q = quantize_nvfp4(%x, %s, %g) : u8[B, 1, 160]
      return %g, %s, %q
    """)
    operands = (torch.randn(9, 320, generator=torch.Generator().manual_seed(7)),)
    sizes, plan = {"B": 9, "L": 1, "C": 1}, emit(site, gpu_target("cuda:sm_90"))
    run = functools.partial(run_site, site, plan, sizes, operands)
    assert check_site(site, plan, operands, sizes, run, relative_error).error == 0.0


@pytest.mark.parametrize("target", ["cuda:sm_90", *NATIVE])
@pytest.mark.parametrize("width,features", [(32, 5), (176, 40)])
def test_products_of_nvfp4_are_exact(target: str, width: int, features: int) -> None:
    operands = (*packed(15, 1, width, seed=2), *packed(features, width, seed=3))
    site, gpu = dense(width, features), gpu_target(target)
    check_kernel(site, {"B": 3, "L": 5}, *operands, target=gpu, tolerance=1e-6)


@pytest.mark.parametrize("rows", ["B", "B*L"])
@pytest.mark.parametrize("target", ["cuda:sm_90", *NATIVE])
def test_grouped_products_of_nvfp4_are_exact(target: str, rows: str) -> None:
    token = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    stack = packed(3, 40, 176, seed=4)
    operands = (*packed(3, 1, 176, seed=5), token, *stack, offsets)
    site, gpu = grouped(176, 40, 3, rows), gpu_target(target)
    check_kernel(site, {"B": 3, "L": 1}, *operands, target=gpu, tolerance=1e-6)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
def test_activations_are_quantized_by_the_product_that_makes_them(target: str) -> None:
    generator = torch.Generator().manual_seed(6)
    x, w = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 5, 24), (80, 24)))
    scale, gpu = torch.tensor(0.01), gpu_target(target)
    check_kernel(active(24, 80), {"B": 3, "L": 5}, x, w, scale, target=gpu)


@pytest.mark.parametrize("target", NATIVE)
def test_matrix_units_multiply_nvfp4_as_it_is(target: str) -> None:
    sites = dense(2688, 1856), grouped(1856, 2688, 128)
    found = compile_variants([variant(site, target) for site in sites], gpu_target(target))
    for binary in found.values():
        assert [kind for kind, _ in binary.report.matrix] == [NATIVE[target]]
        assert (binary.report.spilled, binary.report.plain) == (0, ())


def test_codes_of_weights_are_loaded_by_sixteen_bytes_and_ahead(tmp_path: Path) -> None:
    made = variant(
        region("""
      input %x: bf16[B, 2688]
      input %q: u8[40960, 1344]
      input %s: f8e4m3[40960, 168]
      input %g: f32[]
      %w = dequantize_nvfp4(%q, %s, %g) : f32[40960, 2688]
      %y = linear(%x, %w) : f32[B, 40960]
      return %y
    """),
        "cuda:sm_90",
    ).kernel
    text = assembly(made, gpu_target("cuda:sm_90"), tmp_path)
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", text)
    assert not re.search(r"ld\.global\S*\.[bu]8 ", text)
