"""What can be tuned of GPU kernels: every legal schedule gives kernels that are right, in Triton's interpreter."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nemoc.autotune.search import Space
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import GPUS, INTERPRETER, GpuTarget, gpu_target
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.codegen.tunables import Choices, IllegalSchedule, Schedule
from nemoc.ir import parse
from nemoc.ir.ops import Fused
from nemoc.ir.sample_inputs import sample_arguments
from support.gpu_kernels import check_kernel
from support.mixers import mixer_operands, mixer_region

HOPPER = gpu_target("cuda:sm_90")

PRODUCT = """
  input %x: bf16[B, L, 96]
  input %w: bf16[80, 96]
  input %bias: f32[80]
  %y = linear(%x, %w) : f32[B, L, 80]
  %z = add(%y, %bias) : f32[B, L, 80]
  return %z
"""
GROUPED = """
  input %x: bf16[B, 96]
  input %w: bf16[3, 80, 96]
  input %offsets: i32[4]
  %y = grouped_linear(%x, %w, %offsets) : f32[B, 80]
  return %y
"""
PREFILL = """
  input %q: bf16[B, L, 4, 64]
  input %k: bf16[B, C, 2, 64]
  input %v: bf16[B, C, 2, 64]
  input %lengths: i32[B] < C - L + 1
  %a = cast(%q) {dtype=f32} : f32[B, L, 4, 64]
  %b = cast(%k) {dtype=f32} : f32[B, C, 2, 64]
  %c = cast(%v) {dtype=f32} : f32[B, C, 2, 64]
  %y = attention(%a, %b, %c, %lengths) {scale=0.125} : f32[B, L, 4, 64]
  return %y
"""
NORM = """
  input %x: f32[B, L, 96]
  input %weight: f32[96]
  %y = rms_norm(%x, %weight) {eps=1e-05} : f32[B, L, 96]
  return %y
"""
TEXTS = {
    "product": PRODUCT,
    "few rows": PRODUCT.replace("B, L,", "B,"),
    "grouped": GROUPED,
    "attention": PREFILL,
    "attention of a token": PREFILL.replace("C - L", "C - 1").replace("B, L,", "B, 1,"),
    "norm": NORM,
    "gate": NORM.replace("rms_norm(%x, %weight) {eps=1e-05}", "mul(%x, %weight)"),
}
MIXERS = {"scan": False, "scan of a token": True}
KEEPING = {
    "product": {"stages", "neighbours"},
    "few rows": {
        *("stages", "neighbours", "tile16_stages", "tile16_neighbours"),
        "few1_stages",
    },
    "grouped": {"stages", "neighbours", "few1_stages"},
    "attention": {"stages"},
    "attention of a token": {"stages"},
    "norm": set(),
    "gate": {"row_tile", "row_warps"},
    "scan": {"passed", "ahead", "adding_heads", "output_heads"},
    "scan of a token": set(),
}
"""The tunables that leave the order of sums alone, and so every bit."""


def site_of(name: str) -> Site:
    if name in MIXERS:
        return Site.dense(mixer_region(2, 16, 1, 16, decode=MIXERS[name], norms=1))
    body = parse(f"graph @body {{{TEXTS[name]}}}\n")
    return Site.dense(Fused(body.inputs, body))


def space_of(name: str, target: GpuTarget = HOPPER) -> Space:
    return Space.of(site_of(name), lambda site: emit(site, target))


def legal(space: Space, count: int) -> Iterator[tuple[Schedule, Plan]]:
    """Some legal schedules that are not the default, the same ones every time, with their plans."""
    draw = random.Random(7)
    default, found = space.plan({}), 0
    assert default is not None
    seen = {default.name}
    for _ in range(500):
        schedule = {t.name: draw.choice(t.values) for t in space.tunables}
        plan = space.plan(schedule)
        if plan is None or plan.name in seen:
            continue
        seen.add(plan.name)
        yield schedule, plan
        found += 1
        if found == count:
            return
    raise AssertionError(f"only {found} legal schedules")


BATCHES = {"few rows": (1, 3, 13, 50), "grouped": (1, 3, 50)}
"""Numbers of rows, of products that have a form for each; 1 of all others."""


@pytest.mark.parametrize("name", [*TEXTS, *MIXERS])
def test_every_legal_schedule_is_right(name: str) -> None:
    space = space_of(name)
    for schedule, plan in legal(space, 2):
        for batch in BATCHES.get(name, (1,)):
            sizes = {"B": batch, "L": 21, "C": 90}
            given = operands(name, space.site, sizes)
            try:
                check_kernel(space.site, sizes, *given, plan=plan, tolerance=2e-5)
            except AssertionError as error:
                raise AssertionError(f"{schedule}: {error}") from error


def operands(name: str, site: Site, sizes: dict[str, int]) -> list[torch.Tensor]:
    if name in MIXERS:
        return mixer_operands(site, sizes, [1 if MIXERS[name] else 17], seed=1)
    op, rows = site.op, sizes["B"]
    assert isinstance(op, Fused)
    given = sample_arguments(op.body, sizes, seed=3)
    given["offsets"] = torch.tensor([0, rows // 3, rows // 2, rows], dtype=torch.int32)
    return [given[v.name] for v in op.body.inputs]


@pytest.mark.parametrize("name", [*TEXTS, *MIXERS])
def test_only_what_leaves_the_order_of_sums_alone_keeps_bits(name: str) -> None:
    assert {t.name for t in space_of(name).tunables if t.keeps_bits} == KEEPING[name]


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("name", [*TEXTS, *MIXERS])
def test_settings_of_the_default_give_the_default(name: str, target: str) -> None:
    space = space_of(name, gpu_target(target))
    spelled, default = space.plan({t.name: t.default for t in space.tunables}), space.plan({})
    assert spelled is not None and default is not None
    assert spelled.name == default.name


@pytest.mark.parametrize("setting", [{"warps": 8}, {"stages": 3}])
def test_plans_that_differ_in_launching_alone_differ_in_name(setting: dict[str, int]) -> None:
    space = space_of("product")
    plans = [space.plan(s) for s in ({}, setting)]
    sources, names = set(), set()
    for plan in plans:
        assert plan is not None
        (stage,) = plan.stages
        assert isinstance(stage.kernel, GpuKernel)
        names.add(stage.kernel.name)
        sources.add(stage.kernel.source.replace(stage.kernel.name, ""))
    assert (len(names), len(sources)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "schedule", "reason"),
    [
        ("product", {"rows": 256, "columns": 128, "warps": 2}, "sums do not fit registers"),
        ("few rows", {"tile16_columns": 16, "tile16_warps": 8}, "warps have no tile each"),
        ("product", {"columns": 256}, "tiles are wider than the result"),
        ("product", {"depth": 256, "stages": 6}, "operands do not fit shared memory"),
        ("attention", {"rows": 128, "keys": 128, "warps": 2}, "tiles do not fit registers"),
        ("scan of a token", {"rows": 128}, "a program has more rows than its group"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(name: str, schedule: dict[str, int], reason: str) -> None:
    with pytest.raises(IllegalSchedule, match=reason):
        emit(replace(site_of(name), choices=Choices(schedule)), HOPPER)


def test_a_schedule_reaches_the_rows_behind_a_recurrence() -> None:
    space = space_of("scan")
    plans = [space.plan(s) for s in ({}, {"row_tile": 256})]
    assert plans[0] is not None and plans[1] is not None
    differing = [
        a.kernel.name.partition("_")[0]
        for a, b in zip(plans[0].stages, plans[1].stages, strict=True)
        if a.kernel.name != b.kernel.name
    ]
    assert differing == ["rows"]


def test_the_interpreter_has_the_same_tunables() -> None:
    for name in TEXTS:
        both = [space_of(name, t).tunables for t in (HOPPER, gpu_target(INTERPRETER))]
        assert {t.name for t in both[0]} == {t.name for t in both[1]}
