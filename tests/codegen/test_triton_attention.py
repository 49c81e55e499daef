"""Attention on GPUs against the op's meaning; cached rows that were never written hold NaN."""

from dataclasses import replace

import pytest
import torch

from nemoc.codegen.plan import RegionError, Site, View
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.attention import default_schedule, emit_attention
from nemoc.codegen.triton.flash import Attended
from nemoc.codegen.triton.target import GPUS, GpuTarget, gpu_target
from nemoc.ir.dims import B, C, Dim, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Attention
from support.gpu_kernels import INTERPRETER, check_kernel
from support.kernels import value
from support.regions import region

F32, BF16 = DType.F32, DType.BF16

F32_ERROR = 2e-6
NEAR_ERROR = 2e-5
"""Where weights are cut to 16 bits, to be multiplied with values of bf16."""
ROUNDED_ERROR = 1e-3
"""Of a result in bf16, compared with the exact one in bf16: a few are at the other side of a tie."""


def attention(
    heads: int,
    kv_heads: int,
    width: int,
    dtype: DType,
    length: Dim,
    capacity: Dim = C,
    scale: float | None = None,
) -> Site:
    k, v = (value(dtype, B, capacity, kv_heads, width) for _ in "kv")
    q, lengths = value(F32, B, length, heads, width), value(DType.I32, B)
    return Site.dense(Attention(q, k, v, lengths, width**-0.5 if scale is None else scale))


def wrapped(body: str, heads: int, kv_heads: int, width: int, length: str, dtype: str) -> Site:
    """A region that takes queries %q, a cache %k and %v, and %lengths; `body` writes q for a query's type."""
    q = f"[B, {length}, {heads}, {width}]"
    cache = f"{dtype}[B, C, {kv_heads}, {width}]"
    text = f"input %q: bf16{q}\ninput %k: {cache}\ninput %v: {cache}\ninput %lengths: i32[B]\n"
    flat = f"[B, {length}, {heads * width}]"
    body = body.replace("Q", q).replace("CACHE", cache).replace("FLAT", flat)
    return Site.dense(region(text + body))


def check(
    site: Site,
    length: int,
    capacity: int,
    cached: list[int],
    tolerance: float,
    target: GpuTarget = INTERPRETER,
) -> None:
    """Compare on random operands; keys grow along the cache, so that the largest score moves."""
    generator = torch.Generator().manual_seed(capacity)
    heads, width = (int(n) for n in site.operands[0].shape[2:])
    kv_heads, batch = int(site.operands[1].shape[2]), len(cached)
    q = torch.randn(batch, length, heads, width, generator=generator) * 2
    k, v = (torch.randn(batch, capacity, kv_heads, width, generator=generator) for _ in "kv")
    k *= torch.linspace(0.2, 2, capacity)[:, None, None]
    for b, start in enumerate(cached):
        k[b, start + length :] = v[b, start + length :] = float("nan")
    typed = [t.to(w.dtype.torch) for t, w in zip((q, k, v), site.operands[:3], strict=True)]
    lengths = torch.tensor(cached, dtype=torch.int32)
    plan = emit_attention(site, target)
    assert len(plan.stages) == (2 if site.operands[0].shape[1] == 1 else 1)
    sizes = {"B": batch, "L": length, "C": capacity}
    check_kernel(site, sizes, *typed, lengths, tolerance=tolerance, plan=plan)


SHAPES = {
    "no sharing": (3, 3, 16, F32),
    "3 share": (6, 2, 64, BF16),
    "16 share, f32": (32, 2, 128, F32),
    "16 share, bf16": (16, 1, 128, BF16),
    "width no power of 2": (4, 2, 80, BF16),
    "narrower than a tile": (2, 1, 7, F32),
}


def error_of(dtype: DType) -> float:
    return F32_ERROR if dtype == F32 else NEAR_ERROR


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("length", "capacity", "cached"),
    [(1, 1, [0]), (20, 200, [0, 126, 151]), (3, 401, [390, 255]), (9, 70, [67, 0])],
    ids=[
        "one token",
        "from nothing, up to a block's end and beyond",
        "far behind",
        "past the capacity",
    ],
)
def test_several_tokens(name: str, length: int, capacity: int, cached: list[int]) -> None:
    *shape, dtype = SHAPES[name]
    check(attention(*shape, dtype, L), length, capacity, cached, error_of(dtype))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("capacity", "cached"),
    [(1, [0]), (130, [127, 128, 5]), (700, [650, 70]), (40, [40, 39])],
    ids=["first token", "one or two parts", "longer parts", "past the capacity"],
)
def test_one_token(name: str, capacity: int, cached: list[int]) -> None:
    *shape, dtype = SHAPES[name]
    check(attention(*shape, dtype, 1), 1, capacity, cached, error_of(dtype))


@pytest.mark.parametrize("seen", [255, 256, 257, 511, 512, 513])
def test_no_row_is_lost_where_parts_of_a_full_cache_meet(seen: int) -> None:
    """All rows weigh alike, so that each one missing or counted twice would show."""
    site = attention(2, 1, 16, F32, 1)
    q = torch.zeros(1, 1, 2, 16)
    k, v = torch.ones(1, seen, 1, 16), torch.rand(1, seen, 1, 16)
    lengths = torch.tensor([seen - 1], dtype=torch.int32)
    plan = emit_attention(site, INTERPRETER)
    check_kernel(site, {"C": seen}, q, k, v, lengths, tolerance=1e-6, plan=plan)


def test_many_heads_that_share_are_several_tiles() -> None:
    check(attention(70, 1, 16, BF16, 1), 1, 150, [140, 3], NEAR_ERROR)
    check(attention(40, 2, 16, F32, 1), 1, 150, [140, 3], F32_ERROR)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_scale(scale: float) -> None:
    check(attention(4, 2, 16, F32, L, scale=scale), 5, 30, [9], 1e-5)
    check(attention(4, 2, 16, BF16, 1, scale=scale), 1, 30, [9], NEAR_ERROR)


@pytest.mark.parametrize("length", [L, 1])
def test_operands_and_results_of_any_strides(length: Dim) -> None:
    site = attention(6, 2, 16, BF16, length)
    row, cache = 6 * 16 + 24, 2 * 16 + 8
    q = View(F32, site.operands[0].shape, (row * length, row, 16, 1))
    k = View(BF16, site.operands[1].shape, (cache * C, cache, 16, 1))
    v = View(BF16, site.operands[2].shape, (2 * 20 * C, 20, 20 * C, 1))
    site = Site(site.op, (q, k, v, site.operands[3]), (q,))
    check(site, 5 if length == L else 1, 150, [140, 3], NEAR_ERROR)


AROUND = """
%w = cast(%q) {dtype=f32} : f32Q
%a = attention(%w, %k, %v, %lengths) {scale=0.125} : f32Q
%z = cast(%a) {dtype=bf16} : bf16Q
%y = reshape(%z) {shape=FLAT} : bf16FLAT
return %y
"""

COMPUTED = """
%w = cast(%q) {dtype=f32} : f32Q
%s = square(%w) : f32Q
%u = div(%s, %w) : f32Q
%e = exp(%k) : CACHE
%a = attention(%u, %e, %v, %lengths) {scale=0.01} : f32Q
%g = silu(%a) : f32Q
%y = add(%g, %w) : f32Q
return %y, %a
"""


@pytest.mark.parametrize("length", ["L", "1"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_casts_around(length: str, dtype: str) -> None:
    site = wrapped(AROUND, 6, 2, 64, length, dtype)
    check(site, 5 if length == "L" else 1, 160, [131, 3], ROUNDED_ERROR)


def test_narrow_queries_and_keys_are_multiplied_as_they_are() -> None:
    plan = emit_attention(wrapped(AROUND, 6, 2, 64, "L", "bf16"), gpu_target("cuda:sm_90"))
    assert " dot(" in plan.stages[0].kernel.source
    assert "dot_near(" in plan.stages[0].kernel.source
    assert "dot_wide(" not in plan.stages[0].kernel.source


@pytest.mark.parametrize("length", ["L", "1"])
def test_anything_element_wise_before_and_behind(length: str) -> None:
    """0² / 0 is no number: what a tile holds beyond a row's end must not count."""
    site = wrapped(COMPUTED, 2, 1, 24, length, "f32")
    check(site, 5 if length == "L" else 1, 160, [131, 3], 1e-5)


WIDENED = "%w = cast(%q) {dtype=f32} : f32Q\n"
ATTENDED = WIDENED + "%a = attention(%w, %k, %v, %lengths) {scale=1.0} : f32Q\n"
REFUSED = {
    "there are 0 attentions": WIDENED + "return %w",
    "there are 2 attentions": ATTENDED
    + "%b = attention(%w, %k, %v, %lengths) {scale=2.0} : f32Q\nreturn %a, %b",
    "are not those of attention": ATTENDED + "%s = sum(%a) {axis=3} : f32[B, L, 2]\nreturn %s",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_regions_are_refused(reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        emit_attention(wrapped(REFUSED[reason], 2, 1, 16, "L", "bf16"), INTERPRETER)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_with_the_schedules_of_a_gpu(dtype: DType) -> None:
    target = gpu_target("cuda:sm_90")
    check(attention(3, 1, 16, dtype, L), 45, 300, [0, 210], error_of(dtype), target)
    check(attention(3, 1, 16, dtype, 1), 1, 300, [0, 210], error_of(dtype), target)


def test_parts_are_longer_where_there_are_many() -> None:
    target = replace(gpu_target("cuda:sm_90"), multiprocessors=4)
    check(attention(1, 1, 16, BF16, 1), 1, 1100, [1023, 1024, 400, 70], NEAR_ERROR, target)


@pytest.mark.parametrize("name", [name for name in GPUS if not GPUS[name].is_interpreter])
def test_a_cache_is_split_in_no_more_parts_than_it_has_blocks(name: str) -> None:
    def splits(capacity: Dim) -> int:
        site = attention(32, 2, 128, BF16, 1, capacity)
        made = Attended.of(body_of(as_region(site)))
        return default_schedule(made, GPUS[name]).splits

    assert splits(64) == 1
    assert splits(128) == 2
    assert splits(C) >= 32


def test_queries_of_a_prompt_that_were_widened_before_a_view_are_multiplied_as_bf16() -> None:
    body = """
      %wide = cast(%q) {dtype=f32} : f32Q
      %flat = reshape(%wide) {shape=[B, L, 64]} : f32FLAT
      %heads = reshape(%flat) {shape=[B, L, 4, 16]} : f32Q
      %y = attention(%heads, %k, %v, %lengths) {scale=0.25} : f32Q
      %out = cast(%y) {dtype=bf16} : bf16Q
      return %out
    """
    site = wrapped(body, 4, 2, 16, "L", "bf16")
    plan = emit_attention(site, gpu_target("cuda:sm_90"))
    assert "dot_wide" not in plan.stages[0].kernel.source
    check(site, 5, 40, [3, 30], ROUNDED_ERROR)
