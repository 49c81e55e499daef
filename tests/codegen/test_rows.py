"""Regions without anchors: the kernel of a body of row-local ops against the body's evaluation."""

import dataclasses

import pytest
import torch

from nemoc.codegen.plan import LayoutError, RegionError, Site, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.tvm.rows import emit_rows
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B, L, ceil_div, dim
from nemoc.ir.dtypes import DType
from support.kernels import CompiledSite, KernelSuite
from support.regions import operands, region

SIZES = {"B": 3, "L": 7}
SUITE = KernelSuite()

BODIES = {
    "a chain": """
        input %x: f32[B, L, 100]
        input %w: f32[100]
        %a = silu(%x) : f32[B, L, 100]
        %b = mul(%a, %w) : f32[B, L, 100]
        %c = add(%b, %x) : f32[B, L, 100]
        return %c""",
    "several results": """
        input %x: f32[B, L, 2500]
        input %z: f32[B, L, 2500]
        %a = add(%x, %z) : f32[B, L, 2500]
        %b = sigmoid(%a) : f32[B, L, 2500]
        return %a, %b""",
    "results of several widths": """
        input %x: f32[B, 64]
        %a = tanh(%x) : f32[B, 64]
        %b = slice(%a) {axis=1, start=5, stop=42} : f32[B, 37]
        %c = reshape(%a) {shape=[B, 4, 16]} : f32[B, 4, 16]
        return %a, %b, %c""",
    "gate and grouped norm": """
        input %x: f32[B, L, 128]
        input %z: f32[B, L, 128]
        input %w: f32[128]
        %g = silu(%z) : f32[B, L, 128]
        %a = mul(%x, %g) : f32[B, L, 128]
        %b = rms_norm(%a, %w) {eps=1e-05, groups=4} : f32[B, L, 128]
        return %b""",
    "norm of odd groups": """
        input %x: f32[B, 60]
        input %w: f32[60]
        %a = rms_norm(%x, %w) {eps=1e-05, groups=3} : f32[B, 60]
        %b = scale(%a) {factor=3.0} : f32[B, 60]
        return %b""",
    "residual and norm": """
        input %x: f32[B, L, 200]
        input %y: f32[B, L, 200]
        input %w: f32[200]
        %a = add(%x, %y) : f32[B, L, 200]
        %b = rms_norm(%a, %w) {eps=1e-05} : f32[B, L, 200]
        return %a, %b""",
    "norm of a norm": """
        input %x: f32[B, 48]
        input %w: f32[48]
        %a = rms_norm(%x, %w) {eps=1e-05} : f32[B, 48]
        %b = softplus(%a) : f32[B, 48]
        %c = rms_norm(%b, %w) {eps=1e-05} : f32[B, 48]
        return %c""",
    "a norm along a part of the row": """
        input %x: f32[B, 3, 16]
        input %w: f32[16]
        %a = relu(%x) : f32[B, 3, 16]
        %b = rms_norm(%a, %w) {eps=1e-05} : f32[B, 3, 16]
        return %b""",
    "last tokens": """
        input %x: f32[B, L, 80]
        input %v: i32[B] < L + 1
        input %w: f32[80]
        %a = gelu(%x) : f32[B, L, 80]
        %b = take_last(%a, %v) : f32[B, 80]
        %c = rms_norm(%b, %w) {eps=1e-05} : f32[B, 80]
        return %c""",
    "last tokens of a norm": """
        input %x: f32[B, L, 80]
        input %v: i32[B] < L + 1
        input %w: f32[80]
        %a = scale(%x) {factor=0.5} : f32[B, L, 80]
        %b = rms_norm(%a, %w) {eps=1e-05} : f32[B, L, 80]
        %c = take_last(%b, %v) : f32[B, 80]
        return %c""",
    "rows of a table": """
        input %t: f32[9, 40]
        input %i: i64[B, L] < 9
        input %w: f32[40]
        %a = take_rows(%t, %i) : f32[B, L, 40]
        %b = rms_norm(%a, %w) {eps=1e-05} : f32[B, L, 40]
        return %a, %b""",
    "rows of a computed table": """
        input %t: f32[9, 40]
        input %i: i32[B, L] < 27
        input %w: f32[40]
        %n = rms_norm(%t, %w) {eps=1e-05} : f32[9, 40]
        %j = floor_div(%i) {divisor=3} : i32[B, L]
        %a = take_rows(%n, %j) : f32[B, L, 40]
        return %a""",
    "weighted sum of chosen rows": """
        input %x: f32[B*L*3, 48]
        input %p: i32[B*L*3] < B*L*3
        input %w: f32[B*L, 3]
        input %r: f32[B, L, 48]
        %a = take_rows(%x, %p) : f32[3*B*L, 48]
        %b = reshape(%a) {shape=[B*L, 3, 48]} : f32[B*L, 3, 48]
        %v = reshape(%w) {shape=[B*L, 3, 1]} : f32[B*L, 3, 1]
        %c = mul(%b, %v) : f32[B*L, 3, 48]
        %d = sum(%c) {axis=1} : f32[B*L, 48]
        %e = reshape(%d) {shape=[B, L, 48]} : f32[B, L, 48]
        %f = add(%e, %r) : f32[B, L, 48]
        return %f""",
    "shares of a sum": """
        input %x: f32[B, L, 33]
        %e = exp(%x) : f32[B, L, 33]
        %s = sum(%e) {axis=2} : f32[B, L]
        %t = reshape(%s) {shape=[B, L, 1]} : f32[B, L, 1]
        %y = div(%e, %t) : f32[B, L, 33]
        return %y""",
    "choice": """
        input %x: f32[B*L, 64]
        input %b: f32[64]
        %s = sigmoid(%x) : f32[B*L, 64]
        %c = add(%s, %b) : f32[B*L, 64]
        %g = group_limit(%c) {groups=4, keep=2} : f32[B*L, 64]
        %k = top_k(%g) {k=6} : i32[B*L, 6]
        %w = take_along(%s, %k) : f32[B*L, 6]
        %t = sum(%w) {axis=1} : f32[B*L]
        %u = reshape(%t) {shape=[B*L, 1]} : f32[B*L, 1]
        %v = div(%w, %u) : f32[B*L, 6]
        return %k, %v, %g""",
    "a row repeated in parts": """
        input %x: f32[B, 128]
        input %w: f32[32]
        input %v: f32[4, 1]
        %s = slice(%x) {axis=1, start=8, stop=104} : f32[B, 96]
        %r = reshape(%s) {shape=[B, 3, 32]} : f32[B, 3, 32]
        %y = mul(%r, %w) : f32[B, 3, 32]
        %q = reshape(%x) {shape=[B, 4, 32]} : f32[B, 4, 32]
        %z = mul(%q, %v) : f32[B, 4, 32]
        return %y, %z""",
    "slices of parts": """
        input %x: f32[B, 4, 32]
        input %w: f32[32]
        %a = mul(%x, %w) : f32[B, 4, 32]
        %b = reshape(%a) {shape=[B, 128]} : f32[B, 128]
        %c = slice(%b) {axis=1, start=8, stop=72} : f32[B, 64]
        return %c""",
    "parts of a repeating row from its middle": """
        input %x: f32[B, 128]
        input %w: f32[32]
        %v = reshape(%x) {shape=[B, 4, 32]} : f32[B, 4, 32]
        %a = sub(%v, %w) : f32[B, 4, 32]
        %b = slice(%a) {axis=1, start=1, stop=3} : f32[B, 2, 32]
        return %b""",
    "behind an axis of one": """
        input %x: f32[B, 1, 96]
        %e = exp(%x) : f32[B, 1, 96]
        %s = slice(%e) {axis=2, start=16, stop=80} : f32[B, 1, 64]
        %h = reshape(%s) {shape=[B, 8, 8]} : f32[B, 8, 8]
        %r = reshape(%e) {shape=[B, 1, 3, 32]} : f32[B, 1, 3, 32]
        %t = sum(%r) {axis=2} : f32[B, 1, 32]
        %u = reshape(%t) {shape=[B, 32]} : f32[B, 32]
        return %h, %u""",
    "broadcasts": """
        input %x: f32[B, L, 40]
        input %c: f32[B, L, 1]
        input %r: f32[B, 1, 40]
        input %s: f32[]
        input %o: f32[1, 1, 40]
        %a = mul(%x, %c) : f32[B, L, 40]
        %b = add(%a, %r) : f32[B, L, 40]
        %d = sub(%b, %s) : f32[B, L, 40]
        %p = tanh(%o) : f32[1, 1, 40]
        %e = add(%d, %p) : f32[B, L, 40]
        return %e""",
    "a scale that is one row": """
        input %x: f32[B, 40]
        input %w: f32[40]
        input %g: f32[40]
        %n = rms_norm(%w, %g) {eps=1e-05} : f32[40]
        %a = mul(%x, %n) : f32[B, 40]
        return %a""",
    "no rows": """
        input %x: f32[40]
        input %s: f32[]
        %a = mul(%x, %s) : f32[40]
        %b = full() {value=2.0, dtype=f32, shape=[40]} : f32[40]
        %c = add(%a, %b) : f32[40]
        return %c""",
    "one element": """
        input %x: f32[]
        %a = exp(%x) : f32[]
        return %a""",
    "lengths": """
        input %x: i32[B] < 100
        input %y: i32[B] < 100
        %a = add(%x, %y) : i32[B]
        %b = floor_div(%a) {divisor=7} : i32[B]
        return %a, %b""",
    "float64": """
        input %x: f64[B, 21]
        input %w: f64[21]
        %a = add(%x, %x) : f64[B, 21]
        %b = rms_norm(%a, %w) {eps=1e-05} : f64[B, 21]
        return %b""",
}
CASES = {name: SUITE.add(Site.dense(region(text)), emit_rows) for name, text in BODIES.items()}

NARROW = {
    kind: SUITE.add(
        Site.dense(
            region(f"""
                input %x: f32[B, 40]
                input %y: f32[B, 40]
                %a = cast(%x) {{dtype={kind}}} : {kind}[B, 40]
                %b = cast(%a) {{dtype=f32}} : f32[B, 40]
                %c = mul(%b, %y) : f32[B, 40]
                %d = full() {{value=0.1, dtype={kind}, shape=[40]}} : {kind}[40]
                %e = cast(%d) {{dtype=f32}} : f32[40]
                %f = add(%y, %e) : f32[B, 40]
                return %c, %f, %a""")
        ),
        emit_rows,
    )
    for kind in ("bf16", "f16")
}


def _strided() -> CompiledSite:
    site = Site.dense(region(BODIES["several results"].replace("2500", "40")))
    x = View(DType.F32, (B, L, 40), (dim(100 * L), 100, 1))
    z = View(DType.F32, (B, L, 40), (40, dim(40 * B), 1))
    return SUITE.add(dataclasses.replace(site, operands=(x, z)), emit_rows)


def _by_columns() -> CompiledSite:
    site = Site.dense(region(BODIES["residual and norm"]))
    turned = View(DType.F32, (B, L, 200), (dim(200 * L), 1, L))
    return SUITE.add(dataclasses.replace(site, operands=(turned, *site.operands[1:])), emit_rows)


VIEWS = {"strided rows": _strided(), "columns": _by_columns()}


@pytest.mark.parametrize("name", CASES)
def test_region_is_its_body(name: str) -> None:
    case = CASES[name]
    given = operands(region(BODIES[name]), SIZES)
    case.check(SIZES, *given, tolerance=1e-6)
    if case.plan.in_place:
        case.check(SIZES, *given, tolerance=1e-6, in_place=True)


@pytest.mark.parametrize("name", VIEWS)
def test_operands_may_have_strides(name: str) -> None:
    case = VIEWS[name]
    generator = torch.Generator().manual_seed(5)
    shapes = [[SIZES.get(str(n), 0) or int(n) for n in v.shape] for v in body_of(case.site).inputs]
    case.check(SIZES, *(torch.randn(s, generator=generator) for s in shapes), tolerance=1e-6)


@pytest.mark.parametrize("kind", NARROW)
def test_casts_round_within_a_body(kind: str) -> None:
    """With tolerance 0: the bits are those of op by op evaluation."""
    case = NARROW[kind]
    generator = torch.Generator().manual_seed(9)
    case.check({"B": 5}, *(torch.randn(5, 40, generator=generator) for _ in range(2)))


def test_a_row_without_valid_tokens_gives_its_first() -> None:
    x, _, w = operands(region(BODIES["last tokens"]), SIZES)
    valid = torch.tensor([0, 1, 7], dtype=torch.int32)
    CASES["last tokens"].check(SIZES, x, valid, w, tolerance=1e-6)


def test_equal_scores_are_chosen_in_order() -> None:
    _, bias = operands(region(BODIES["choice"]), SIZES)
    scores = torch.randint(-1, 2, (21, 64), generator=torch.Generator().manual_seed(2)).float()
    CASES["choice"].check(SIZES, scores, bias.round(), tolerance=1e-6)


def test_elementwise_regions_are_cut_like_elementwise_ops() -> None:
    (stage,) = CASES["several results"].plan.stages
    assert stage.kernel.tasks == 3 * B * L  # ⌈2500 / 1024⌉ parts of each row
    (stage,) = CASES["a chain"].plan.stages
    assert stage.kernel.tasks == ceil_div(dim(B * L), 10)  # ⌊1024 / 100⌋ rows together


def test_whole_rows_stay_in_one_task() -> None:
    (stage,) = CASES["residual and norm"].plan.stages
    assert stage.kernel.tasks == ceil_div(dim(B * L), 5)


def test_results_take_the_place_of_operands_read_at_the_same_elements() -> None:
    assert CASES["a chain"].plan.in_place == ((0, 0),)
    assert CASES["several results"].plan.in_place == ((0, 0), (1, 1))
    assert CASES["residual and norm"].plan.in_place == ((0, 0), (1, 1))
    assert CASES["shares of a sum"].plan.in_place == ((0, 0),)


@pytest.mark.parametrize(
    "name", ["results of several widths", "rows of a table", "slices of parts", "choice"]
)
def test_nothing_is_overwritten_that_is_still_read(name: str) -> None:
    assert CASES[name].plan.in_place == ()


def test_an_operand_that_may_be_another_is_not_overwritten() -> None:
    """Of operands with one view one is read at other elements than it would be written at: they may be one tensor."""
    op = region("""
        input %x: f32[8, 40]
        input %t: f32[8, 40]
        input %i: i32[8] < 8
        %a = take_rows(%t, %i) : f32[8, 40]
        %b = add(%x, %a) : f32[8, 40]
        return %b""")
    assert emit_rows(Site.dense(op), cpu_target()).in_place == ()


REFUSED = {
    "is needed of several rows": """
        input %x: f32[B*3, 16]
        input %w: f32[16]
        %a = rms_norm(%x, %w) {eps=1e-05} : f32[3*B, 16]
        %b = reshape(%a) {shape=[B, 48]} : f32[B, 48]
        return %b""",
    "too many to hold": """
        input %x: f32[B, 20000]
        input %w: f32[20000]
        %a = silu(%x) : f32[B, 20000]
        %b = rms_norm(%a, %w) {eps=1e-05} : f32[B, 20000]
        return %b""",
    "concat is not computed row by row": """
        input %x: f32[B, 8]
        %a = silu(%x) : f32[B, 8]
        %b = concat([%a, %x]) {axis=1} : f32[B, 16]
        return %b""",
    "permute is not computed row by row": """
        input %x: f32[B, 8]
        %a = silu(%x) : f32[B, 8]
        %b = permute(%a) {axes=[1, 0]} : f32[8, B]
        return %b""",
    "exp is not computed row by row": """
        input %x: f64[B, 8]
        %a = exp(%x) : f64[B, 8]
        return %a""",
    "repeat in a way that no row number says": """
        input %x: f32[B, 1, 8]
        input %y: f32[B, L, 8]
        %a = silu(%x) : f32[B, 1, 8]
        %b = add(%a, %y) : f32[B, L, 8]
        return %b""",
    "repeats within rows": """
        input %x: f32[2, 1, 8]
        input %y: f32[B, 48]
        %a = reshape(%y) {shape=[B, 2, 3, 8]} : f32[B, 2, 3, 8]
        %b = add(%a, %x) : f32[B, 2, 3, 8]
        %c = reshape(%b) {shape=[B, 48]} : f32[B, 48]
        return %c""",
    "no rows in common": """
        input %x: f32[B, 8]
        input %y: f32[L, 8]
        %a = silu(%x) : f32[B, 8]
        %b = silu(%y) : f32[L, 8]
        return %a, %b""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_rows_is_refused(reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        emit_rows(Site.dense(region(REFUSED[reason])), cpu_target())


def test_elements_of_a_row_without_common_stride_are_asked_for_densely() -> None:
    site = Site.dense(region(BODIES["slices of parts"]))
    gaps = View(DType.F32, (B, 4, 32), (400, 100, 1))
    with pytest.raises(LayoutError, match="no common stride"):
        emit_rows(dataclasses.replace(site, operands=(gaps, site.operands[1])), cpu_target())
