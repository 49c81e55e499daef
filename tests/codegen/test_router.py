"""Router regions against their bodies: weights to float32, choices and orders exactly."""

import pytest
import torch

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.tvm.router import emit_router
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B, L, dim
from nemoc.ir.region import Fused
from support.kernels import CompiledSite, KernelSuite
from support.regions import operands, region

SUITE = KernelSuite()


def router(
    experts: int,
    k: int,
    width: int = 64,
    rows: str = "B*L",
    norm: bool = True,
    groups: int = 1,
    block: int = 16,
    results: str = "%weights, %position, %offsets, %token",
    sort: bool = True,
) -> Fused:
    """A router as models have it: norm, scores, biased choice, weights that sum to 2.5, sorting."""
    panels = -(-experts // block)
    normed = f"rms_norm(%x, %g) {{eps=1e-05}} : f32[{rows}, {width}]"
    limited = f"group_limit(%biased) {{groups={groups}, keep={max(1, groups // 2)}}}"
    slots = f"{k}*{rows}"
    sorting = f"""
      %order, %position, %offsets = group_by(%chosen) {{groups={experts}}}
        : i32[{slots}], i32[{slots}], i32[{experts + 1}]
      %token = floor_div(%order) {{divisor={k}}} : i32[{slots}]"""
    return region(f"""
      input %x: f32[{rows}, {width}]
      input %g: f32[{width}]
      input %w: bf16[{panels}, {width}, {block}]
      input %bias: f32[{experts}]
      %n = {normed if norm else f"scale(%x) {{factor=1.0}} : f32[{rows}, {width}]"}
      %logits = linear(%{"n" if norm else "x"}, %w) {{interleave={block}, features={experts}}} : f32[{rows}, {experts}]
      %scores = sigmoid(%logits) : f32[{rows}, {experts}]
      %biased = add(%scores, %bias) : f32[{rows}, {experts}]
      %choice = {limited if groups > 1 else "scale(%biased) {factor=1.0}"} : f32[{rows}, {experts}]
      %chosen = top_k(%choice) {{k={k}}} : i32[{rows}, {k}]
      %taken = take_along(%scores, %chosen) : f32[{rows}, {k}]
      %total = sum(%taken) {{axis=1}} : f32[{rows}]
      %column = reshape(%total) {{shape=[{rows}, 1]}} : f32[{rows}, 1]
      %safe = shift(%column) {{amount=1e-20}} : f32[{rows}, 1]
      %shares = div(%taken, %safe) : f32[{rows}, {k}]
      %weights = scale(%shares) {{factor=2.5}} : f32[{rows}, {k}]
      {sorting if sort else ""}
      return {results}""")


def add(op: Fused) -> CompiledSite:
    return SUITE.add(Site.dense(op), emit_router)


CASES = {
    "many rows": add(router(40, 4)),
    "one task": add(router(40, 4, rows="B")),
    "one of many": add(router(17, 1, rows="B")),
    "a single row": add(router(40, 4, rows="1")),
    "a fixed number of rows": add(router(40, 4, rows="30")),
    "groups": add(router(64, 6, groups=4)),
    "without a norm": add(router(40, 4, norm=False)),
    "with its norm and its choices": add(
        router(40, 4, results="%weights, %position, %offsets, %token, %n, %chosen")
    ),
    "with its order": add(router(8, 2, results="%weights, %order, %offsets")),
    "without sorting": add(router(40, 3, sort=False, results="%weights, %chosen")),
    "scores only": add(router(40, 3, width=50, block=32, sort=False, results="%scores")),
}
ROWS = (1, 2, 5, 12, 13, 30)


def given(case: CompiledSite, rows: int, seed: int = 0) -> list[torch.Tensor]:
    op = case.site.op
    assert isinstance(op, Fused)
    found = operands(op, {"B": rows, "L": 1}, seed)
    return [t * 0.3 if t.dtype == torch.bfloat16 else t for t in found]


@pytest.mark.parametrize("name", CASES)
def test_router_is_its_body(name: str) -> None:
    case = CASES[name]
    fixed = case.site.operands[0].shape[0]
    for rows in [fixed] if isinstance(fixed, int) else ROWS:
        case.check({"B": rows, "L": 1}, *given(case, rows, rows), tolerance=2e-6)


def test_rows_are_those_of_batch_and_length() -> None:
    case = CASES["many rows"]
    case.check({"B": 3, "L": 9}, *given(case, 27), tolerance=2e-6)


@pytest.mark.parametrize(
    "name", ["many rows", "one task", "groups", "with its norm and its choices"]
)
def test_equal_scores_are_chosen_in_order(name: str) -> None:
    """Every second expert has the weights and the bias of its neighbour; then all scores are equal."""
    case = CASES[name]
    tensors = given(case, 30)
    for i, tensor in enumerate(tensors):
        if tensor.dtype == torch.bfloat16:
            tensors[i] = tensor[..., ::2].repeat_interleave(2, dim=-1)
        elif tensor.shape == (case.site.operands[-1].shape[0],):
            tensors[i] = torch.zeros_like(tensor)
    case.check({"B": 30, "L": 1}, *tensors, tolerance=2e-6)
    for i, tensor in enumerate(tensors):
        if tensor.shape[0] == 30:
            tensors[i] = torch.zeros_like(tensor)
    case.check({"B": 30, "L": 1}, *tensors, tolerance=2e-6)


def test_sorting_is_a_launch_of_its_own_where_rows_are_many() -> None:
    tasks = [stage.kernel.tasks for stage in CASES["many rows"].plan.stages]
    assert len(tasks) == 2 and tasks[1] == 1
    (stage,) = CASES["one task"].plan.stages
    assert stage.kernel.tasks == 1
    (stage,) = CASES["without sorting"].plan.stages


def test_choices_need_memory_of_their_own_only_if_nobody_else_does() -> None:
    (view,) = CASES["many rows"].plan.scratch
    assert view.shape == (dim(B * L), 4)
    assert CASES["with its norm and its choices"].plan.scratch == ()
    assert CASES["without sorting"].plan.scratch == ()


REFUSED = {
    "a router has one product": """
      input %x: f32[B, 8]
      input %w: f32[4, 8]
      %y = linear(%x, %w) : f32[B, 4]
      %z = top_k(%y) {k=2} : i32[B, 2]
      return %z""",
    "needs slots in two orders": """
      input %x: f32[B, 8]
      input %w: f32[1, 8, 16]
      %y = linear(%x, %w) {interleave=16, features=4} : f32[B, 4]
      %z = top_k(%y) {k=2} : i32[B, 2]
      %order, %position, %offsets = group_by(%z) {groups=4} : i32[2*B], i32[2*B], i32[5]
      %s = add(%order, %position) : i32[2*B]
      return %s""",
    "is not computed slot by slot": """
      input %x: f32[B, 8]
      input %w: f32[1, 8, 16]
      %y = linear(%x, %w) {interleave=16, features=4} : f32[B, 4]
      %z = top_k(%y) {k=2} : i32[B, 2]
      %order, %position, %offsets = group_by(%z) {groups=4} : i32[2*B], i32[2*B], i32[5]
      %s = floor_div(%order) {divisor=2} : i32[2*B]
      %t = take_rows(%x, %s) : f32[2*B, 8]
      return %t""",
    "has no row for each row of scores": """
      input %x: f32[B, 8]
      input %w: f32[1, 8, 16]
      %y = linear(%x, %w) {interleave=16, features=4} : f32[B, 4]
      %z = sum(%y) {axis=0} : f32[4]
      return %z""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_regions_are_refused(reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        emit_router(Site.dense(region(REFUSED[reason])), cpu_target())
