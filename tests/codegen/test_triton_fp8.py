"""GPU kernels that make FP8 of activations and multiply it, in Triton's interpreter and as machine code."""

from pathlib import Path

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.triton.build import compile_variants
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import GPUS, gpu_target
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir import parse
from nemoc.ir.ops import Fused
from support.gpu_kernels import assembly, check_kernel, loop_instructions, variant

NATIVE = {
    "cuda:sm_90": "wgmma.mma_async.e4m3",
    "cuda:sm_100": "tcgen05.mma.kind::f8f6f4",
    "cuda:sm_120": "mma.sync.e4m3",
    "hip:gfx950": "v_mfma_f32_32x32x64_f8f6f4",
}
"""GPUs whose matrix units multiply FP8, and by what instructions."""


def region(text: str) -> Site:
    """The dense site of a region whose body is that text."""
    body = parse(f"graph @body {{\n{text}\n}}\n")
    return Site.dense(Fused(body.inputs, body))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def dense(width: int, features: int, x: str = "f8e4m3", rows: str = "B, L") -> Site:
    """Rows times a weight in FP8, and the scales of both."""
    return region(f"""
      input %x: {x}[{rows}, {width}]
      input %w: f8e4m3[{features}, {width}]
      input %rows: f32[{rows}, 1]
      input %scale: f32[]
      %y = linear(%x, %w) : f32[{rows}, {features}]
      %s = mul(%y, %rows) : f32[{rows}, {features}]
      %z = mul(%s, %scale) : f32[{rows}, {features}]
      return %z
    """)


def grouped(width: int, features: int, groups: int, each: int = 2, rows: str = "B*L") -> Site:
    """Products of gathered rows in FP8 with groups' weights in FP8."""
    return region(f"""
      input %table: f8e4m3[{rows}, {width}]
      input %token: i32[{each}*{rows}] < {rows}
      input %w: f8e4m3[{groups}, {features}, {width}]
      input %offsets: i32[{groups + 1}]
      %x = take_rows(%table, %token) : f8e4m3[{each}*{rows}, {width}]
      %y = grouped_linear(%x, %w, %offsets) : f32[{each}*{rows}, {features}]
      return %y
    """)


def recoded(width: int, features: int) -> Site:
    """Rows in FP8 times a weight in NVFP4 of which FP8 is made."""
    return region(f"""
      input %x: f8e4m3[B, L, {width}]
      input %q: u8[{features}, {width // 2}]
      input %s: f8e4m3[{features}, {width // 16}]
      input %scale: f32[]
      %w = nvfp4_to_fp8(%q, %s) : f8e4m3[{features}, {width}]
      %y = linear(%x, %w) : f32[B, L, {features}]
      %z = mul(%y, %scale) : f32[B, L, {features}]
      return %z
    """)


def recoded_groups(width: int, features: int, groups: int) -> Site:
    """Products of gathered rows in FP8 with groups' weights in NVFP4 of which FP8 is made."""
    return region(f"""
      input %table: f8e4m3[B*L, {width}]
      input %token: i32[2*B*L] < B*L
      input %q: u8[{groups}, {features}, {width // 2}]
      input %s: f8e4m3[{groups}, {features}, {width // 16}]
      input %offsets: i32[{groups + 1}]
      %x = take_rows(%table, %token) : f8e4m3[2*B*L, {width}]
      %w = nvfp4_to_fp8(%q, %s) : f8e4m3[{groups}, {features}, {width}]
      %y = grouped_linear(%x, %w, %offsets) : f32[2*B*L, {features}]
      return %y
    """)


def packed(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of random matrices [..., N, K], and scales of their blocks, all that there are."""
    generator = torch.Generator().manual_seed(seed)
    *lead, width = shape
    codes = torch.randint(0, 256, (*lead, width // 2), generator=generator)
    scales = torch.randint(1, 127, (*lead, width // 16), generator=generator)
    return codes.to(torch.uint8), scales.to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [40, 16400])
def test_rows_are_rounded_with_a_scale_each(width: int, dtype: str) -> None:
    site = region(f"""
      input %x: {dtype}[B, L, {width}]
      %rows = reshape(%x) {{shape=[B*L, 1, {width}]}} : {dtype}[B*L, 1, {width}]
      %g = fp8_scale(%rows) : f32[B*L]
      %q = quantize_fp8(%rows, %g) : f8e4m3[B*L, 1, {width}]
      return %g, %q
    """)
    x = draw(2, 3, width, seed=1, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
    x[1, 1] = 0.0  # a row of zeros, and numbers that become subnormal
    x[0, 0, ::2] *= 1e-4
    check_kernel(site, {"B": 2, "L": 3}, x, tolerance=0.0)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize("x", ["f8e4m3", "bf16", "f32"])
@pytest.mark.parametrize("width,features", [(7, 5), (176, 40)])
def test_products_with_weights_in_fp8(target: str, x: str, width: int, features: int) -> None:
    kinds = {"f8e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "f32": torch.float32}
    operands = (
        draw(3, 5, width, seed=2, dtype=kinds[x]),
        draw(features, width, seed=3, dtype=torch.float8_e4m3fn),
        draw(3, 5, 1, seed=4).exp(),
        torch.tensor(0.37),
    )
    site = dense(width, features, x)
    check_kernel(site, {"B": 3, "L": 5}, *operands, target=gpu_target(target), tolerance=2e-6)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize("width,features", [(48, 5), (176, 40)])
def test_products_with_fp8_made_of_nvfp4(target: str, width: int, features: int) -> None:
    x = draw(3, 5, width, seed=10, dtype=torch.float8_e4m3fn)
    operands = (x, *packed(features, width, seed=11), torch.tensor(0.37))
    gpu = gpu_target(target)
    check_kernel(recoded(width, features), {"B": 3, "L": 5}, *operands, target=gpu, tolerance=2e-6)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
def test_grouped_products_with_fp8_made_of_nvfp4(target: str) -> None:
    offsets = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    token = torch.tensor([2, 0, 1, 1, 0, 2, 3, 4, 4, 3], dtype=torch.int32)
    table = draw(5, 176, seed=12, dtype=torch.float8_e4m3fn)
    operands = (table, token, *packed(3, 40, 176, seed=13), offsets)
    site = recoded_groups(176, 40, 3)
    check_kernel(site, {"B": 1, "L": 5}, *operands, target=gpu_target(target), tolerance=2e-6)


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_fp8_made_of_nvfp4_has_the_bits_of_the_op(target: str) -> None:
    site = region("""
      input %q: u8[64, 88]
      input %s: f8e4m3[64, 11]
      %w = nvfp4_to_fp8(%q, %s) : f8e4m3[64, 176]
      return %w
    """)
    check_kernel(site, {}, *packed(64, 176, seed=14), target=gpu_target(target), tolerance=0.0)


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_few_rows_with_weights_in_fp8(target: str, batch: int) -> None:
    operands = (
        draw(batch, 176, seed=5, dtype=torch.bfloat16),
        draw(43, 176, seed=6, dtype=torch.float8_e4m3fn),
        draw(batch, 1, seed=7).exp(),
        torch.tensor(0.37),
    )
    site = dense(176, 43, "bf16", "B")
    check_kernel(site, {"B": batch}, *operands, target=gpu_target(target), tolerance=2e-6)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
def test_grouped_products_in_fp8(target: str) -> None:
    offsets = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    token = torch.tensor([2, 0, 1, 1, 0, 2, 3, 4, 4, 3], dtype=torch.int32)
    table = draw(5, 130, seed=8, dtype=torch.float8_e4m3fn)
    stack = draw(3, 40, 130, seed=9, dtype=torch.float8_e4m3fn)
    site = grouped(130, 40, 3)
    operands = (table, token, stack, offsets)
    check_kernel(site, {"B": 1, "L": 5}, *operands, target=gpu_target(target), tolerance=2e-6)


@pytest.mark.parametrize("target", NATIVE)
def test_matrix_units_multiply_fp8_as_it_is(target: str) -> None:
    sites = (
        dense(2688, 10304),
        grouped(2688, 1856, 128),
        recoded(2688, 10304),
        recoded_groups(2688, 1856, 128),
    )
    found = compile_variants([variant(site, target) for site in sites], gpu_target(target))
    assert len(found) == len(sites)
    for binary in found.values():
        assert [kind for kind, _ in binary.report.matrix] == [NATIVE[target]]
        assert (binary.report.spilled, binary.report.plain) == (0, ())


def test_fp8_is_made_of_nvfp4_in_few_instructions_a_weight() -> None:
    sm_90 = gpu_target("cuda:sm_90")
    (binary,) = compile_variants([variant(recoded(2688, 10304), "cuda:sm_90")], sm_90).values()
    weights_of_a_thread = 128 * 128 / 256
    assert len(loop_instructions(binary.code)) <= 3.4 * weights_of_a_thread


def test_matrix_units_take_fp8_from_where_it_arrives(tmp_path: Path) -> None:
    (stage,) = emit(dense(2688, 2048), gpu_target("cuda:sm_90")).stages
    assert isinstance(stage.kernel, GpuKernel)
    text = assembly(stage.kernel, gpu_target("cuda:sm_90"), tmp_path)
    assert "wgmma.mma_async" in text
    assert "ldmatrix" not in text  # nothing is moved to registers and back


@pytest.mark.parametrize("target", [n for n, gpu in GPUS.items() if not gpu.fp8])
def test_gpus_without_such_units_multiply_what_it_decodes_to(target: str) -> None:
    (binary,) = compile_variants([variant(dense(256, 128), target)], gpu_target(target)).values()
    assert all("bf16" in kind for kind, _ in binary.report.matrix)
    assert binary.report.matrix
