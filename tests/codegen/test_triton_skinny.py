"""GPU kernels of products of very few rows: numbers in Triton's interpreter, which form is taken, and machine code."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.triton.build import Variant, compile_variants
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.inspect_binary import inspect_output
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.target import GPUS, INTERPRETER, gpu_target
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir import parse
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.nvfp4 import DIALECTS, decode, spread
from nemoc.ir.ops import Fused
from support.gpu_kernels import (
    assembly,
    check_kernel,
    compiled,
    instructions,
    loop_instructions,
)
from support.watched import run_watched

SM_90 = gpu_target("cuda:sm_90")
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def region(text: str) -> Site:
    """The dense site of a region whose body is that text."""
    body = parse(f"graph @body {{\n{text}\n}}\n")
    return Site.dense(Fused(body.inputs, body))


def draw(*shape: int, seed: int, dtype: str = "f32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(TYPES[dtype])


def packed(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and tensor scales of random weights [..., N, K]."""
    generator = torch.Generator().manual_seed(seed)
    *lead, rows, width = shape
    codes = torch.randint(0, 256, (*lead, rows, width // 2), generator=generator)
    scales = torch.rand(*lead, rows, width // 16, generator=generator).mul(8).exp2()
    whole = torch.rand(lead, generator=generator) + 0.5
    return codes.to(torch.uint8), scales.to(torch.float8_e4m3fn), whole


def dense(
    width: int, features: int, x: str = "bf16", dialect: str = "modelopt", spread: bool = False
) -> Site:
    """Rows times a weight in NVFP4; any bits are codes, `spread` or not."""
    attributes = f'dialect="{dialect}", spread={str(spread).lower()}'
    return region(f"""
      input %x: {x}[B, {width}]
      input %q: u8[{features}, {width // 2}]
      input %s: f8e4m3[{features}, {width // 16}]
      input %g: f32[]
      %w = dequantize_nvfp4(%q, %s, %g) {{{attributes}}} : f32[{features}, {width}]
      %y = linear(%x, %w) : f32[B, {features}]
      return %y
    """)


def stored(site: Site) -> Site:
    """The same with all operands weights, but for the first: they may be loaded before former kernels have ended."""
    return replace(site, weights=frozenset(range(1, len(site.operands))))


def plain(width: int, features: int, x: str = "bf16", w: str = "bf16") -> Site:
    return region(f"""
      input %x: {x}[B, {width}]
      input %w: {w}[{features}, {width}]
      %y = linear(%x, %w) : f32[B, {features}]
      return %y
    """)


def both_packed() -> Site:
    """A product with activations in NVFP4 too."""
    return region("""
      input %xq: u8[B, 1, 32]
      input %xs: f8e4m3[B, 1, 4]
      input %xg: f32[B]
      input %wq: u8[32, 32]
      input %ws: f8e4m3[32, 4]
      input %wg: f32[]
      %x = dequantize_nvfp4(%xq, %xs, %xg) : f32[B, 1, 64]
      %w = dequantize_nvfp4(%wq, %ws, %wg) : f32[32, 64]
      %y = linear(%x, %w) : f32[B, 1, 32]
      return %y
    """)


def experts(
    width: int, features: int, groups: int, each: int, x: str = "bf16", spread: bool = False
) -> Site:
    """Products of gathered rows with groups' weights in NVFP4, and what follows them."""
    order = f"{{spread={str(spread).lower()}}}"
    return region(f"""
      input %table: {x}[B, {width}]
      input %token: i32[{each}*B] < B
      input %q: u8[{groups}, {features}, {width // 2}]
      input %s: f8e4m3[{groups}, {features}, {width // 16}]
      input %g: f32[{groups}]
      input %offsets: i32[{groups + 1}]
      %x = take_rows(%table, %token) : {x}[{each}*B, {width}]
      %wide = cast(%x) {{dtype=f32}} : f32[{each}*B, {width}]
      %w = dequantize_nvfp4(%q, %s, %g) {order} : f32[{groups}, {features}, {width}]
      %y = grouped_linear(%wide, %w, %offsets) : f32[{each}*B, {features}]
      %r = relu(%y) : f32[{each}*B, {features}]
      %z = square(%r) : f32[{each}*B, {features}]
      return %z
    """)


def taken(plan: Plan, batch: int) -> list[int]:
    """Which launches have programs at a batch, by number."""
    sizes = {"B": batch, "L": 1, "C": 1}
    tasks = [evaluate_dim(stage.kernel.tasks, sizes) for stage in plan.stages]
    assert min(tasks) >= 0
    return [number for number, count in enumerate(tasks) if count]


@pytest.mark.parametrize("batch,x", [(1, "bf16"), (1, "f32"), (2, "bf16"), (3, "f32"), (9, "bf16")])
@pytest.mark.parametrize("width,features", [(32, 5), (176, 40), (1856, 7)])
def test_products_with_nvfp4_weights(batch: int, x: str, width: int, features: int) -> None:
    operands = (draw(batch, width, seed=batch, dtype=x), *packed(features, width, seed=2))
    plain, spread = dense(width, features, x), dense(width, features, x, spread=True)
    for site in (plain, stored(plain), stored(spread)):
        check_kernel(site, {"B": batch}, *operands, target=SM_90)


@pytest.mark.parametrize(
    "batch,width,features",
    [(2, 32, 16), (16, 32, 16), (8, 672, 43), (9, 672, 43), (2, 1376, 18), (16, 1376, 18)],
)
def test_products_whose_weights_are_decoded_in_fragments(
    batch: int, width: int, features: int
) -> None:
    operands = (draw(batch, width, seed=batch, dtype="bf16"), *packed(features, width, seed=24))
    plain, spread = dense(width, features), dense(width, features, spread=True)
    for site in (plain, stored(plain), stored(spread)):
        check_kernel(site, {"B": batch}, *operands, target=SM_90)


@pytest.mark.parametrize("width", [32, 672])
def test_a_single_row_of_a_wide_result_is_multiplied_in_fragments_too(width: int) -> None:
    site = stored(dense(width, 1072, spread=True))
    plan = emit(site, SM_90)
    assert taken(plan, 1) == taken(plan, 8)
    operands = (draw(1, width, seed=32, dtype="bf16"), *packed(1072, width, seed=33))
    check_kernel(site, {"B": 1}, *operands, plan=plan)


def test_a_single_row_of_a_narrow_result_is_not() -> None:
    plan = emit(stored(dense(672, 1040, spread=True)), SM_90)
    assert taken(plan, 1) != taken(plan, 2)


@pytest.mark.parametrize(
    "setting",
    [
        "product_forms._BROAD",  # fragments of wide results
        "fragments._STRAIGHT",  # a loop over long rows
        "fragments._HELD",  # weights that are not loaded early
    ],
)
def test_other_fragments(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"nemoc.codegen.triton.{setting}", 1)
    site = stored(dense(1376, 24, spread=True))
    for batch in (2, 16):
        operands = (draw(batch, 1376, seed=25, dtype="bf16"), *packed(24, 1376, seed=26))
        check_kernel(site, {"B": batch}, *operands, target=SM_90)


def test_a_row_that_is_quantized_in_blocks_is_multiplied_in_the_same_launch() -> None:
    site = replace(both_packed(), weights=frozenset({3, 4, 5}))
    x = packed(1, 1, 64, seed=30)
    check_kernel(site, {"B": 1}, *x, *packed(32, 64, seed=31), target=SM_90)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_the_whole_of_a_wide_weight_in_the_interpreters_schedule(dialect: str) -> None:
    site = dense(64, 10304, dialect=dialect)
    operands = (draw(1, 64, seed=3, dtype="bf16"), *packed(10304, 64, seed=4))
    check_kernel(site, {"B": 1}, *operands)


@pytest.mark.parametrize("kinds", ["f32 f32", "f32 bf16", "bf16 bf16", "bf16 f32"])
@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("width,features", [(7, 5), (1000, 43)])
def test_products_with_other_weights(batch: int, kinds: str, width: int, features: int) -> None:
    x, w = kinds.split()
    operands = (draw(batch, width, seed=5, dtype=x), draw(features, width, seed=6, dtype=w))
    check_kernel(plain(width, features, x, w), {"B": batch}, *operands, target=SM_90)


def test_every_code_times_every_scale_is_exact() -> None:
    codes = torch.tensor(
        [a | b << 4 for a, b in zip(range(0, 16, 2), range(1, 16, 2), strict=True)]
    )
    codes = codes.to(torch.uint8).repeat(254, 1)
    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    scales = bits[:, None].view(torch.float8_e4m3fn)
    numbers = decode(codes, DIALECTS["modelopt"], torch.float64) * scales.double()
    # Twice as wide there are fragments, and rows that are loaded early.
    narrow, wide = ((16, 1, (1, 2, 16)), (32, 2, (1, 2)))
    for (width, wider, batches), is_spread in product((narrow, wide), (False, True)):
        site = dense(width, 254, spread=is_spread)
        site = stored(site) if wider > 1 else site
        stored_codes = spread(codes) if is_spread else codes
        tensors = (stored_codes.repeat(1, wider), scales.repeat(1, wider), torch.tensor(1.0))
        for batch in batches:
            x = torch.eye(16 * wider)[-batch:].bfloat16()
            (found,) = run_site(site, emit(site, SM_90), {"B": batch}, (x, *tensors))
            assert torch.equal(found.double(), numbers.T[-batch:])


def test_a_block_whose_scale_is_nan_is_nan() -> None:
    codes, scales, whole = packed(16, 32, seed=7)
    scales.view(torch.uint8)[1, 1] = 0x7F
    for site in (dense(32, 16), stored(dense(32, 16)), stored(dense(32, 16, spread=True))):
        for batch in (1, 2, 3):
            operands = (draw(batch, 32, seed=8, dtype="bf16"), codes, scales, whole)
            (found,) = run_watched(site, emit(site, SM_90), {"B": batch}, operands)
            assert found.isnan().tolist() == [[n == 1 for n in range(16)]] * batch


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_norms_before_and_caches_behind_are_part_of_it(batch: int) -> None:
    site = region("""
      input %x: f32[B, 1, 48]
      input %weight: f32[48]
      input %q: u8[8, 24]
      input %s: f8e4m3[8, 3]
      input %g: f32[]
      input %cache: f32[B, C, 2, 4]
      input %lengths: i32[B]
      %n = rms_norm(%x, %weight) {eps=1e-05} : f32[B, 1, 48]
      %w = dequantize_nvfp4(%q, %s, %g) : f32[8, 48]
      %y = linear(%n, %w) : f32[B, 1, 8]
      %v = reshape(%y) {shape=[B, 1, 2, 4]} : f32[B, 1, 2, 4]
      %c = cache_write(%cache, %v, %lengths) : f32[B, C, 2, 4]
      return %c
    """)
    lengths = torch.tensor([2, 0, 9], dtype=torch.int32)[:batch]
    operands = (draw(batch, 1, 48, seed=9), draw(48, seed=10), *packed(8, 48, seed=11))
    cache = draw(batch, 9, 2, 4, seed=12)
    check_kernel(site, {"B": batch, "C": 9}, *operands, cache, lengths, target=SM_90)


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 16, 17])
def test_rows_are_computed_once_for_all_fragments(batch: int) -> None:
    site = region("""
      input %h: bf16[B, 1, 96]
      input %weight: f32[96]
      input %q: u8[40, 48]
      input %s: f8e4m3[40, 6]
      input %g: f32[]
      %wide = cast(%h) {dtype=f32} : f32[B, 1, 96]
      %n = rms_norm(%wide, %weight) {eps=1e-05} : f32[B, 1, 96]
      %x = cast(%n) {dtype=bf16} : bf16[B, 1, 96]
      %w = dequantize_nvfp4(%q, %s, %g) : f32[40, 96]
      %y = linear(%x, %w) : f32[B, 1, 40]
      return %y
    """)
    operands = (draw(batch, 1, 96, seed=27, dtype="bf16"), draw(96, seed=28))
    operands += packed(40, 96, seed=29)
    for one in (site, stored(site)):
        plan = emit(one, SM_90)
        # In float64 the rows are not rounded to bf16 before they are multiplied.
        check_kernel(one, {"B": batch}, *operands, tolerance=4e-3, plan=plan)
        names = [plan.stages[n].kernel.name for n in taken(plan, batch)]
        assert names[0].startswith("product_rows") == (1 < batch <= 16)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_products_that_are_added_and_a_residual(batch: int) -> None:
    site = region("""
      input %x: bf16[B, 12]
      input %v: bf16[36, 12]
      input %z: bf16[B, 32]
      input %q: u8[36, 16]
      input %s: f8e4m3[36, 2]
      input %g: f32[]
      input %residual: f32[B, 36]
      %a = linear(%x, %v) : f32[B, 36]
      %d = dequantize_nvfp4(%q, %s, %g) : f32[36, 32]
      %wide = cast(%z) {dtype=f32} : f32[B, 32]
      %b = linear(%wide, %d) : f32[B, 36]
      %c = add(%a, %b) : f32[B, 36]
      %r = add(%residual, %c) : f32[B, 36]
      return %r
    """)
    dense = (draw(batch, 12, seed=13, dtype="bf16"), draw(36, 12, seed=14, dtype="bf16"))
    more = (draw(batch, 32, seed=15, dtype="bf16"), *packed(36, 32, seed=16))
    operands = (*dense, *more, draw(batch, 36, seed=17))
    check_kernel(site, {"B": batch}, *operands, target=SM_90)


def chosen(batch: int, groups: int, each: int, width: int, x: str) -> list[torch.Tensor]:
    """Rows, which of them are chosen, and where each group's choices begin; the first and the last group have none."""
    generator = torch.Generator().manual_seed(batch)
    picked = torch.randint(1, groups - 1, (each * batch,), generator=generator)
    offsets = torch.bincount(picked, minlength=groups).cumsum(0).int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), offsets])
    token = torch.randint(0, batch, (each * batch,), generator=generator, dtype=torch.int32)
    return [draw(batch, width, seed=18, dtype=x), token, offsets]


@pytest.mark.parametrize("batch,x", [*((n, "bf16") for n in range(1, 10)), (1, "f32"), (3, "f32")])
def test_groups_of_few_rows_some_of_them_empty(batch: int, x: str) -> None:
    rows, token, offsets = chosen(batch, 6, 2, 48, x)
    for ordered in (False, True):
        site = experts(48, 34, 6, 2, x, spread=ordered)
        operands = (rows, token, *packed(6, 34, 48, seed=19), offsets)
        check_kernel(site, {"B": batch}, *operands, target=SM_90)


@pytest.mark.parametrize(
    "batch,each,groups", [(1, 2, 6), (6, 2, 6), (7, 2, 6), (5, 4, 12), (1, 1, 3)]
)
@pytest.mark.parametrize("width", [32, 1376])
def test_groups_of_few_rows_are_multiplied_in_fragments(
    batch: int, each: int, groups: int, width: int
) -> None:
    site = experts(width, 34, groups, each, spread=True)
    plan = emit(site, SM_90)
    assert len(plan.stages) == 2
    assert taken(plan, batch) == [int(batch * each > 2 * groups)]
    rows, token, offsets = chosen(batch, groups, each, width, "bf16")
    operands = (rows, token, *packed(groups, 34, width, seed=34), offsets)
    check_kernel(site, {"B": batch}, *operands, plan=plan)


def test_codes_of_a_group_are_all_asked_for_before_the_next_kernel_may_start() -> None:
    """Until then warps have waited for each other four times: for a running sum over groups, and for a maximum."""
    made = emit(experts(2688, 1856, 128, 6, spread=True), SM_90).stages[0].kernel
    assert isinstance(made, GpuKernel)
    (binary,) = compile_variants([Variant(made, (True,) * len(made.pointers))], SM_90).values()
    names = instructions(binary.code)
    early = names[names.index("ACQBULK") : names.index("PREEXIT")]
    assert early.count("LDG.E.128") == 2 * 6
    assert sum(name.startswith("BAR") for name in early) <= 4
    assert binary.report.spilled == 0 and binary.report.occupancy.warps >= 16


def test_activations_are_quantized_behind_a_product_of_one_row() -> None:
    site = region("""
      input %x: bf16[B, 24]
      input %w: bf16[80, 24]
      input %g: f32[]
      %y = linear(%x, %w) : f32[B, 80]
      %v = reshape(%y) {shape=[B, 1, 80]} : f32[B, 1, 80]
      %s = nvfp4_block_scales(%v, %g) : f8e4m3[B, 1, 5]
      %q = quantize_nvfp4(%v, %s, %g) : u8[B, 1, 40]
      return %s, %q
    """)
    operands = (draw(1, 24, seed=20, dtype="bf16"), draw(80, 24, seed=21, dtype="bf16"))
    check_kernel(site, {"B": 1}, *operands, torch.tensor(0.01), target=SM_90)


@pytest.mark.parametrize("target", GPUS)
def test_one_form_is_taken_whatever_the_batch(target: str) -> None:
    for site in (dense(2688, 1856), plain(2688, 256), experts(2688, 1856, 128, 6)):
        plan = emit(site, gpu_target(target))
        forms = [taken(plan, batch) for batch in range(1, 100)]
        # Of programs that share a reduction, with the launch that adds their sums.
        adds = [stage.kernel.name.startswith("product_added") for stage in plan.stages]
        for form in forms:
            assert [adds[number] for number in form] in ([False], [False, True])
            assert form == list(range(form[0], form[0] + len(form)))
        assert [form[0] for form in forms] == sorted(form[0] for form in forms)
        assert forms[0] == [0] and forms[-1][-1] == len(plan.stages) - 1


def test_several_rows_are_left_to_matrix_units() -> None:
    nvfp4, bf16 = (emit(site, SM_90) for site in (dense(2688, 1856), plain(2688, 1856)))
    assert [taken(nvfp4, batch)[0] for batch in (1, 2, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]
    assert [taken(bf16, batch)[0] for batch in (1, 2, 4, 16, 17)] == [0, 1, 1, 1, 2]


def test_prefill_and_products_of_native_nvfp4_use_matrix_units_only() -> None:
    many = region("""
      input %x: bf16[B, L, 64]
      input %w: bf16[32, 64]
      %y = linear(%x, %w) : f32[B, L, 32]
      return %y
    """)
    both = both_packed()
    assert len(emit(many, SM_90).stages) == 1
    assert len(emit(both, gpu_target("cuda:sm_120")).stages) == 2
    assert len(emit(both, SM_90).stages) > 2


@pytest.mark.parametrize("features", [128, 256, 1856, 2688, 4096, 10304, 131072])
def test_a_single_row_has_a_program_for_almost_every_multiprocessor(features: int) -> None:
    plan = emit(dense(2688, features), SM_90)
    programs = evaluate_dim(plan.stages[0].kernel.tasks, {"B": 1})
    assert programs >= min(features, 116)
    # The most programs of a multiprocessor are at most half as many again as the mean, if there are several.
    most = -(-programs // SM_90.multiprocessors)
    assert most == 1 or most * SM_90.multiprocessors <= 1.55 * programs


def kernels(site: Site) -> list[GpuKernel]:
    """The kernels of the forms without matrix units on sm_90."""
    made = [stage.kernel for stage in emit(site, SM_90).stages]
    return [k for k in made if isinstance(k, GpuKernel) and k.work and k.work.tile == (0, 0)]


def test_nothing_spills_and_four_programs_share_a_multiprocessor() -> None:
    packed_row, spread = dense(2688, 10304), dense(2688, 256, spread=True)
    sites = (packed_row, stored(packed_row), plain(2688, 10304), experts(1856, 2688, 128, 6))
    sites += (spread, stored(spread), experts(1856, 2688, 128, 6, spread=True))
    wanted = [Variant(k, (True,) * len(k.pointers)) for site in sites for k in kernels(site)]
    for binary in compile_variants(wanted, SM_90).values():
        assert binary.report.spilled == 0
        assert binary.report.occupancy.warps >= 8
        assert binary.report.matrix == ()


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_norms_that_are_computed_beside_the_sums_do_not_spill(kind: str) -> None:
    site = region(f"""
      input %h: {kind}[B, 2688]
      input %g: f32[2688]
      input %w: {kind}[10304, 2688]
      %wide = cast(%h) {{dtype=f32}} : f32[B, 2688]
      %n = rms_norm(%wide, %g) {{eps=1e-05, groups=1}} : f32[B, 2688]
      %x = cast(%n) {{dtype={kind}}} : {kind}[B, 2688]
      %y = linear(%x, %w) : f32[B, 10304]
      return %y
    """)
    wanted = [Variant(k, (True,) * len(k.pointers)) for k in kernels(site)]
    assert len(wanted) == {"bf16": 1, "f32": 2}[kind]
    assert not any(b.report.spilled for b in compile_variants(wanted, SM_90).values())


@pytest.mark.targets
@pytest.mark.parametrize("target", [name for name in GPUS if name != INTERPRETER])
def test_forms_of_few_rows_compile_for_every_gpu(target: str) -> None:
    gpu = gpu_target(target)
    sites = (dense(2688, 1856), plain(2688, 256), plain(2688, 128, "f32", "f32"))
    stages = [stage for site in sites for stage in emit(site, gpu).stages]
    wanted = {
        Variant(s.kernel, (True,) * len(s.args)) for s in stages if isinstance(s.kernel, GpuKernel)
    }
    assert len(compile_variants(wanted, gpu)) == len(stages)


@pytest.mark.parametrize("site", [dense(2688, 10304), plain(2688, 10304)], ids=["nvfp4", "bf16"])
def test_weights_are_loaded_by_sixteen_bytes_and_ahead(site: Site, tmp_path: Path) -> None:
    for made in kernels(site):
        loop = assembly(made, SM_90, tmp_path).rpartition("$L__BB0_1:")[2]
        assert len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10", loop)) >= 2
        assert not re.search(r"ld\.global", loop.partition("bra")[0])


def test_a_single_row_asks_for_weights_in_nvfp4_before_it_waits(tmp_path: Path) -> None:
    packed_row, plain_row = (
        assembly(kernels(site)[0], SM_90, tmp_path).partition("griddepcontrol.wait")
        for site in (dense(2688, 10304), plain(2688, 10304))
    )
    assert packed_row[0].count("prefetch.global.L2") >= 2  # codes and scales
    assert all(text and "prefetch" not in text for text in (packed_row[2], *plain_row[::2]))


@pytest.mark.parametrize("width,features", [(672, 8192), (1376, 2688)])
def test_weights_in_nvfp4_are_loaded_before_former_kernels_have_ended(
    width: int, features: int, tmp_path: Path
) -> None:
    plain, spread = (stored(dense(width, features, spread=spread)) for spread in (False, True))
    made = [stage.kernel for stage in emit(plain, SM_90).stages[:3]]
    made += [stage.kernel for stage in emit(spread, SM_90).stages[:2]]
    for kernel in made:
        assert isinstance(kernel, GpuKernel)
        answer = compiled(kernel, SM_90, tmp_path)
        early, _, late = answer["assembly"].partition("griddepcontrol.wait")
        assert len(re.findall(r"ld\.global\.v4\.b32", early)) >= 4
        assert "prefetch" not in early + late and "cp.async" not in late
        assert re.search(r"ld\.global\.b32", early)  # the tensor scale
        binary = inspect_output(answer, len(kernel.pointers), SM_90, kernel.early)
        assert binary.waits
        assert binary.report.spilled == 0


def test_fragments_are_multiplied_by_matrix_units_without_shared_memory(tmp_path: Path) -> None:
    kernel = emit(stored(dense(2688, 4096)), SM_90).stages[1].kernel
    assert isinstance(kernel, GpuKernel)
    text = assembly(kernel, SM_90, tmp_path)
    last = text.rindex("mma.sync")
    assert not re.search(r"bar\.sync|st\.shared|ld\.shared", text[:last])
    # Of 2688 elements in parts of 512, for sixteen rows in each of which a lane has two words.
    assert text.count("mma.sync") == 2 * 4 * 6


@pytest.mark.parametrize("width,features,columns", [(2688, 10304, 16), (4096, 2688, 8)])
def test_a_single_row_decodes_and_multiplies_nvfp4_in_five_instructions_a_weight(
    width: int, features: int, columns: int
) -> None:
    made = kernels(dense(width, features))[0]
    (binary,) = compile_variants([Variant(made, (True,) * len(made.pointers))], SM_90).values()
    weights_of_a_thread = columns * 1024 / 128
    assert len(loop_instructions(binary.code)) <= 5.1 * weights_of_a_thread


@pytest.mark.parametrize("width,features", [(2688, 10304), (4096, 2688)])
def test_fragments_of_spread_codes_take_two_and_a_half_instructions_a_weight(
    width: int, features: int
) -> None:
    counts = []
    for ordered in (False, True):
        plan = emit(stored(dense(width, features, spread=ordered)), SM_90)
        made = plan.stages[taken(plan, 8)[0]].kernel
        assert isinstance(made, GpuKernel)
        (binary,) = compile_variants([Variant(made, (True,) * len(made.pointers))], SM_90).values()
        steps = -(-width // (128 * made.warps))
        counts.append(len(instructions(binary.code)) / (steps * 64))
        assert binary.report.spilled == 0
    assert counts[0] > 3.4 and counts[1] < 2.5


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_read_of_x_is_loaded_before_anything_is_decoded(stage: int, ordered: bool) -> None:
    made = emit(stored(dense(2688, 256, spread=ordered)), SM_90).stages[stage].kernel
    assert isinstance(made, GpuKernel)
    (binary,) = compile_variants([Variant(made, (True,) * len(made.pointers))], SM_90).values()
    names = [re.split(r"[. ;]", text)[0] for text in instructions(binary.code)]
    waits, lets_next = names.index("ACQBULK"), names.index("PREEXIT")
    assert names[waits:lets_next].count("LDG") >= 3
    assert not {"HFMA2", "HMUL2", "FFMA", "HMMA"} & set(names[waits:lets_next])
    # The tensor scale is there before, and no warp waits for another but once.
    assert "LDG" not in names[-names[::-1].index("BAR") :]
    assert names.count("BAR") == 1
