"""GPU kernels of regions around products, dense and grouped, in Triton's interpreter."""

import re
from dataclasses import replace

import pytest
import torch

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import gpu_target
from nemoc.codegen.tunables import Choices
from nemoc.ir import parse
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.ops import Fused
from support.gpu_kernels import check_kernel

SIZES = {"B": 3, "L": 5, "C": 9}
SM_90 = gpu_target("cuda:sm_90")


def region(text: str) -> Site:
    """The dense site of a region whose body is that text."""
    body = parse(f"graph @body {{\n{text}\n}}\n")
    return Site.dense(Fused(body.inputs, body))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
@pytest.mark.parametrize(
    "kinds", ["f32 f32", "f32 bf16", "bf16 bf16", "bf16 f32", "bf16 f16", "f16 bf16"]
)
@pytest.mark.parametrize("width,features", [(7, 5), (40, 300), (130, 64)])
def test_products_of_awkward_sizes(target: str, kinds: str, width: int, features: int) -> None:
    x, w = kinds.split()
    site = region(f"""
      input %x: {x}[B, L, {width}]
      input %w: {w}[{features}, {width}]
      input %bias: f32[{features}]
      %y = linear(%x, %w) : f32[B, L, {features}]
      %z = add(%y, %bias) : f32[B, L, {features}]
      return %z
    """)
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    small = 2.0**-20 if w == "bf16" else 1.0  # which an f16 has four bits of
    operands = (
        draw(3, 5, width, dtype=types[x]),
        draw(features, width, seed=1, dtype=types[w]) * small,
        draw(features, seed=2) * small,
    )
    check_kernel(site, SIZES, *operands, target=gpu_target(target), tolerance=2e-6)


@pytest.mark.parametrize("settings", [{"parts": 2}, {"parts": 8}, {"turned": 1, "parts": 4}])
@pytest.mark.parametrize("batch", [13, 50])
def test_programs_may_share_a_reduction(settings: dict[str, int], batch: int) -> None:
    site = region("""
      input %x: bf16[B, 300]
      input %w: bf16[72, 300]
      input %before: f32[B, 72]
      %y = linear(%x, %w) : f32[B, 72]
      %z = add(%before, %y) : f32[B, 72]
      return %z
    """)
    prefix = "tile16_" if batch <= 16 else ""
    choices = Choices({prefix + name: value for name, value in settings.items()})
    plan = emit(replace(site, choices=choices), gpu_target("cuda:sm_90"))
    choices.assert_used()
    assert len(plan.scratch) == 1
    operands = (
        draw(batch, 300, dtype=torch.bfloat16),
        draw(72, 300, seed=1, dtype=torch.bfloat16),
        draw(batch, 72, seed=2),
    )
    check_kernel(site, {"B": batch}, *operands, plan=plan, tolerance=2e-6)


def test_a_reduction_is_shared_where_there_are_fewer_tiles_than_multiprocessors() -> None:
    def stages(features: int) -> int:
        site = region(f"""
          input %x: bf16[64, 4096]
          input %w: bf16[{features}, 4096]
          %y = linear(%x, %w) : f32[64, {features}]
          return %y
        """)
        return len(emit(site, gpu_target("cuda:sm_90")).stages)

    assert (stages(2688), stages(131072)) == (2, 1)


def test_tiles_of_groups_are_higher_where_groups_have_more_rows() -> None:
    site = region("""
      input %x: bf16[6*B*L, 64]
      input %w: bf16[128, 64, 64]
      input %offsets: i32[129]
      %y = grouped_linear(%x, %w, %offsets) : f32[6*B*L, 64]
      return %y
    """)
    stages = emit(site, gpu_target("cuda:sm_90")).stages
    for length, rows in ((512, 64), (1365, 64), (1366, 128), (8192, 128)):
        sizes = {"B": 1, "L": length, "C": length}
        (stage,) = [s for s in stages if evaluate_dim(s.kernel.tasks, sizes)]
        assert f"tl.arange(0, {rows})[:, None]" in stage.kernel.source


def test_a_norm_of_few_rows_is_part_of_the_product() -> None:
    site = region("""
      input %x: f32[B, 1, 100]
      input %weight: f32[100]
      input %w: bf16[24, 100]
      %n = rms_norm(%x, %weight) {eps=1e-05} : f32[B, 1, 100]
      %c = cast(%n) {dtype=bf16} : bf16[B, 1, 100]
      %y = linear(%c, %w) : f32[B, 1, 24]
      return %y
    """)
    operands = (draw(3, 1, 100), draw(100, seed=1), draw(24, 100, seed=2, dtype=torch.bfloat16))
    # What is rounded to bf16 before the product may round the other way here and there.
    check_kernel(site, SIZES, *operands, tolerance=5e-3)


def test_rows_that_are_absent_from_a_tile_of_few_are_not_read() -> None:
    site = region("""
      input %x: bf16[B, 64]
      input %w: bf16[48, 64]
      %y = linear(%x, %w) : f32[B, 48]
      return %y
    """)
    sources = [stage.kernel.source for stage in emit(site, SM_90).stages]
    tiles = [text for text in sources if "dot(" in text]
    assert len(tiles) == 2  # of 16 and of 64 rows
    for text in tiles:
        loads = re.findall(r"tl\.load\(.*\)", text)
        assert any("mask=exists" in load for load in loads), text
    rows, weights = draw(3, 64, dtype=torch.bfloat16), draw(48, 64, seed=1, dtype=torch.bfloat16)
    check_kernel(site, {"B": 3}, rows, weights, target=SM_90)


def test_a_long_norm_is_read_in_parts() -> None:
    site = region("""
      input %x: f32[B, 3000]
      input %weight: f32[3000]
      input %w: f32[9, 3000]
      %n = rms_norm(%x, %weight) {eps=1e-05} : f32[B, 3000]
      %y = linear(%n, %w) : f32[B, 9]
      return %y
    """)
    operands = (draw(2, 3000), draw(3000, seed=1), draw(9, 3000, seed=2))
    check_kernel(site, {"B": 2}, *operands)


def test_what_masked_columns_become_before_a_product_does_not_count() -> None:
    site = region("""
      input %x: f32[B, L, 7]
      input %w: f32[5, 7]
      %e = exp(%x) : f32[B, L, 7]
      %y = linear(%e, %w) : f32[B, L, 5]
      return %y
    """)
    check_kernel(site, SIZES, draw(3, 5, 7), draw(5, 7, seed=1))


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
def test_products_that_are_added_share_a_tile(target: str) -> None:
    site = region("""
      input %x: f32[B*L, 12]
      input %v: bf16[36, 12]
      input %z: f32[B, L, 20]
      input %w: bf16[36, 20]
      %a = linear(%x, %v) : f32[B*L, 36]
      %r = relu(%z) : f32[B, L, 20]
      %b = linear(%r, %w) : f32[B, L, 36]
      %c = reshape(%a) {shape=[B, L, 36]} : f32[B, L, 36]
      %d = add(%c, %b) : f32[B, L, 36]
      return %d
    """)
    operands = (
        draw(15, 12),
        draw(36, 12, seed=1, dtype=torch.bfloat16),
        draw(3, 5, 20, seed=2),
        draw(36, 20, seed=3, dtype=torch.bfloat16),
    )
    check_kernel(site, SIZES, *operands, target=gpu_target(target))


def test_rows_of_a_product_go_behind_the_cached_ones_and_no_further_than_the_capacity() -> None:
    site = region("""
      input %x: f32[B, L, 6]
      input %w: f32[8, 6]
      input %cache: bf16[B, C, 2, 4]
      input %lengths: i32[B]
      %y = linear(%x, %w) : f32[B, L, 8]
      %n = cast(%y) {dtype=bf16} : bf16[B, L, 8]
      %v = reshape(%n) {shape=[B, L, 2, 4]} : bf16[B, L, 2, 4]
      %c = cache_write(%cache, %v, %lengths) : bf16[B, C, 2, 4]
      return %c
    """)
    cache = draw(3, 9, 2, 4, seed=2, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 4, 6], dtype=torch.int32)
    check_kernel(site, SIZES, draw(3, 5, 6), draw(8, 6, seed=1), cache, lengths, tolerance=5e-3)


GROUPED = """
  input %table: f32[B, 10]
  input %token: i32[2*B] < B
  input %w: bf16[4, 34, 10]
  input %offsets: i32[5]
  %x = take_rows(%table, %token) : f32[2*B, 10]
  %y = grouped_linear(%x, %w, %offsets) : f32[2*B, 34]
  %r = relu(%y) : f32[2*B, 34]
  %s = square(%r) : f32[2*B, 34]
  return %s
"""


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
@pytest.mark.parametrize(
    "counts", [[6, 0, 0, 0], [0, 0, 0, 6], [1, 2, 0, 3], [2, 1, 2, 1]], ids=str
)
def test_grouped_products_of_gathered_rows(target: str, counts: list[int]) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    token = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)
    operands = (draw(3, 10), token, draw(4, 34, 10, seed=1, dtype=torch.bfloat16), offsets)
    check_kernel(region(GROUPED), SIZES, *operands, target=gpu_target(target), tolerance=2e-6)


def test_groups_longer_than_a_tile_take_several() -> None:
    site = region(GROUPED)
    token = torch.arange(300, dtype=torch.int32) % 150
    offsets = torch.tensor([0, 3, 200, 200, 300], dtype=torch.int32)
    operands = (draw(150, 10), token, draw(4, 34, 10, seed=1, dtype=torch.bfloat16), offsets)
    check_kernel(site, {"B": 150}, *operands, target=gpu_target("cuda:sm_90"), tolerance=2e-6)


def test_results_that_are_no_rows_of_the_product_are_refused() -> None:
    site = region("""
      input %x: f32[B, 4]
      input %w: f32[6, 4]
      %y = linear(%x, %w) : f32[B, 6]
      %s = slice(%y) {axis=1, start=2, stop=5} : f32[B, 3]
      return %s
    """)
    with pytest.raises(RegionError, match="are not those of the product"):
        emit(site, gpu_target("cuda:sm_90"))


def test_many_tokens_take_large_tiles_and_a_step_of_one_token_flat_ones() -> None:
    def source(rows: str, form: int = -1) -> str:
        site = region(f"""
          input %x: bf16[{rows}, 256]
          input %w: bf16[20000, 256]
          %y = linear(%x, %w) : f32[{rows}, 20000]
          return %y
        """)
        return emit(site, gpu_target("cuda:sm_90")).stages[form].kernel.source

    assert "tl.arange(0, 256)[:, None]" in source("B, L")
    assert "tl.arange(0, 16)[:, None]" in source("B, 1", form=-2)
    assert "tl.arange(0, 64)[:, None]" in source("B, 1")
