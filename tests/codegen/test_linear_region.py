"""Regions around products: the kernel of a body with linear and grouped_linear against the body's evaluation."""

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tvm.linear_region import emit_linear_region
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Cast
from nemoc.ir.region import Fused
from support.kernels import CompiledSite, KernelSuite
from support.regions import operands, region

SUITE = KernelSuite()
SIZES = [
    {"B": 1, "L": 1, "C": 4},
    {"B": 2, "L": 1, "C": 4},
    {"B": 1, "L": 13, "C": 20},
    {"B": 3, "L": 10, "C": 16},
]
"""1, 2, 13 and 30 rows, with one token each and with several: every mix of tile heights."""

IN_REGISTERS = {
    "bias and activation": """
        input %x: f32[B, L, 37]
        input %w: bf16[3, 37, 32]
        input %b: f32[70]
        %y = linear(%x, %w) {interleave=32, features=70} : f32[B, L, 70]
        %a = add(%y, %b) : f32[B, L, 70]
        %s = silu(%a) : f32[B, L, 70]
        return %s""",
    "residual": """
        input %x: f32[B, L, 48]
        input %w: bf16[2, 48, 32]
        input %r: f32[B, L, 64]
        %y = linear(%x, %w) {interleave=32, features=64} : f32[B, L, 64]
        %a = add(%y, %r) : f32[B, L, 64]
        return %a""",
    "several results": """
        input %x: f32[B, L, 24]
        input %w: f32[2, 24, 32]
        input %r: f32[B*L, 50]
        %y = linear(%x, %w) {interleave=32, features=50} : f32[B, L, 50]
        %v = reshape(%y) {shape=[B*L, 50]} : f32[B*L, 50]
        %a = relu(%v) : f32[B*L, 50]
        %q = square(%a) : f32[B*L, 50]
        %s = sub(%r, %q) : f32[B*L, 50]
        %c = cast(%s) {dtype=bf16} : bf16[B*L, 50]
        %h = reshape(%q) {shape=[B, L, 5, 10]} : f32[B, L, 5, 10]
        return %h, %c, %y""",
    "one feature": """
        input %x: f32[B, L, 33]
        input %w: bf16[1, 33, 32]
        input %r: f32[B, L, 1]
        %y = linear(%x, %w) {interleave=32, features=1} : f32[B, L, 1]
        %a = sub(%y, %r) : f32[B, L, 1]
        return %a""",
    "norm": """
        input %x: f32[B, L, 61]
        input %n: bf16[61]
        input %w: bf16[3, 61, 32]
        %u = cast(%n) {dtype=f32} : f32[61]
        %a = rms_norm(%x, %u) {eps=1e-05} : f32[B, L, 61]
        %v = reshape(%a) {shape=[B*L, 61]} : f32[B*L, 61]
        %y = linear(%v, %w) {interleave=32, features=96} : f32[B*L, 96]
        %g = gelu(%y) : f32[B*L, 96]
        return %g""",
    "norm of a gate, and the gate again": """
        input %x: f32[B, L, 64]
        input %z: f32[B, L, 64]
        input %n: f32[64]
        input %w: bf16[2, 64, 32]
        %s = silu(%z) : f32[B, L, 64]
        %g = mul(%x, %s) : f32[B, L, 64]
        %a = rms_norm(%g, %n) {eps=1e-05, groups=4} : f32[B, L, 64]
        %y = linear(%a, %w) {interleave=32, features=64} : f32[B, L, 64]
        %o = add(%y, %g) : f32[B, L, 64]
        return %o""",
    "narrow x, wide panels": """
        input %x: f32[B, L, 40]
        input %w: f16[2, 40, 64]
        %a = cast(%x) {dtype=f16} : f16[B, L, 40]
        %y = linear(%a, %w) {interleave=64, features=128} : f32[B, L, 128]
        %s = scale(%y) {factor=3.0} : f32[B, L, 128]
        return %s""",
    "many panels for rows of a norm": """
        input %x: f32[B, L, 16]
        input %n: f32[16]
        input %w: f32[33, 16, 32]
        %a = rms_norm(%x, %n) {eps=1e-05} : f32[B, L, 16]
        %y = linear(%a, %w) {interleave=32, features=1050} : f32[B, L, 1050]
        return %y""",
    "last tokens": """
        input %x: f32[B, L, 20]
        input %v: i32[B] < L + 1
        input %w: bf16[1, 20, 32]
        %t = take_last(%x, %v) : f32[B, 20]
        %y = linear(%t, %w) {interleave=32, features=30} : f32[B, 30]
        return %y""",
    "rows of a table": """
        input %t: f32[B, L, 20]
        input %i: i64[2*B*L] < 3*B*L
        input %w: bf16[2, 20, 32]
        %v = reshape(%t) {shape=[B*L, 20]} : f32[B*L, 20]
        %j = floor_div(%i) {divisor=3} : i64[2*B*L]
        %x = take_rows(%v, %j) : f32[2*B*L, 20]
        %y = linear(%x, %w) {interleave=32, features=64} : f32[2*B*L, 64]
        %a = tanh(%y) : f32[2*B*L, 64]
        return %a""",
    "cache": """
        input %c: f32[B, C, 2, 24]
        input %x: f32[B, L, 37]
        input %w: bf16[2, 37, 32]
        input %l: i32[B] < C
        %y = linear(%x, %w) {interleave=32, features=48} : f32[B, L, 48]
        %h = reshape(%y) {shape=[B, L, 2, 24]} : f32[B, L, 2, 24]
        %d = cache_write(%c, %h, %l) : f32[B, C, 2, 24]
        return %d""",
    "narrow cache behind a norm, and the rows": """
        input %c: bf16[B, C, 3, 16]
        input %x: f32[B, L, 30]
        input %n: f32[30]
        input %w: bf16[2, 30, 32]
        input %l: i32[B] < C
        %a = rms_norm(%x, %n) {eps=1e-05} : f32[B, L, 30]
        %y = linear(%a, %w) {interleave=32, features=48} : f32[B, L, 48]
        %b = cast(%y) {dtype=bf16} : bf16[B, L, 48]
        %h = reshape(%b) {shape=[B, L, 3, 16]} : bf16[B, L, 3, 16]
        %d = cache_write(%c, %h, %l) : bf16[B, C, 3, 16]
        return %d, %y""",
    "experts": """
        input %x: f32[B*L, 40]
        input %w: bf16[5, 3, 40, 32]
        input %o: i32[6] < B*L + 1
        %y = grouped_linear(%x, %w, %o) {interleave=32, features=70} : f32[B*L, 70]
        %r = relu(%y) : f32[B*L, 70]
        %q = square(%r) : f32[B*L, 70]
        return %q""",
    "experts of gathered tokens": """
        input %x: f32[B, L, 37]
        input %p: i32[3*B*L] < 3*B*L
        input %w: bf16[5, 2, 37, 32]
        input %o: i32[6] < 3*B*L + 1
        %v = reshape(%x) {shape=[B*L, 37]} : f32[B*L, 37]
        %t = floor_div(%p) {divisor=3} : i32[3*B*L]
        %g = take_rows(%v, %t) : f32[3*B*L, 37]
        %y = grouped_linear(%g, %w, %o) {interleave=32, features=64} : f32[3*B*L, 64]
        %r = relu(%y) : f32[3*B*L, 64]
        %q = square(%r) : f32[3*B*L, 64]
        return %q""",
    "experts of normed tokens": """
        input %x: f32[B*L, 24]
        input %n: f32[24]
        input %p: i32[2*B*L] < B*L
        input %w: f32[5, 2, 24, 32]
        input %o: i32[6] < 2*B*L + 1
        %a = rms_norm(%x, %n) {eps=1e-05} : f32[B*L, 24]
        %g = take_rows(%a, %p) : f32[2*B*L, 24]
        %y = grouped_linear(%g, %w, %o) {interleave=32, features=40} : f32[2*B*L, 40]
        %s = silu(%y) : f32[2*B*L, 40]
        return %s""",
}

BY_COLUMNS = {
    "combine": """
        input %x: f32[3*B*L, 24]
        input %w: bf16[5, 3, 24, 32]
        input %o: i32[6] < 3*B*L + 1
        input %p: i32[3*B*L] < 3*B*L
        input %m: f32[B*L, 3]
        input %r: f32[B, L, 70]
        %y = grouped_linear(%x, %w, %o) {interleave=32, features=70} : f32[3*B*L, 70]
        %t = take_rows(%y, %p) : f32[3*B*L, 70]
        %a = reshape(%t) {shape=[B*L, 3, 70]} : f32[B*L, 3, 70]
        %n = reshape(%m) {shape=[B*L, 3, 1]} : f32[B*L, 3, 1]
        %b = mul(%a, %n) : f32[B*L, 3, 70]
        %c = sum(%b) {axis=1} : f32[B*L, 70]
        %d = reshape(%c) {shape=[B, L, 70]} : f32[B, L, 70]
        %e = add(%d, %r) : f32[B, L, 70]
        return %e""",
    "combine with a shared expert": """
        input %x: f32[3*B*L, 24]
        input %w: bf16[5, 2, 24, 32]
        input %o: i32[6] < 3*B*L + 1
        input %p: i32[3*B*L] < 3*B*L
        input %m: f32[B*L, 3]
        input %r: f32[B, L, 64]
        input %s: f32[B, L, 50]
        input %u: bf16[2, 50, 32]
        %q = square(%x) : f32[3*B*L, 24]
        %y = grouped_linear(%q, %w, %o) {interleave=32, features=64} : f32[3*B*L, 64]
        %t = take_rows(%y, %p) : f32[3*B*L, 64]
        %a = reshape(%t) {shape=[B*L, 3, 64]} : f32[B*L, 3, 64]
        %n = reshape(%m) {shape=[B*L, 3, 1]} : f32[B*L, 3, 1]
        %b = mul(%a, %n) : f32[B*L, 3, 64]
        %c = sum(%b) {axis=1} : f32[B*L, 64]
        %d = reshape(%c) {shape=[B, L, 64]} : f32[B, L, 64]
        %e = linear(%s, %u) {interleave=32, features=64} : f32[B, L, 64]
        %f = add(%d, %e) : f32[B, L, 64]
        %g = add(%f, %r) : f32[B, L, 64]
        %h = cast(%d) {dtype=bf16} : bf16[B, L, 64]
        return %g, %h""",
    "sum of two products, one of a norm": """
        input %x: f32[B, L, 30]
        input %z: f32[B, L, 17]
        input %n: f32[30]
        input %w: bf16[35, 30, 32]
        input %u: f32[35, 17, 32]
        %a = rms_norm(%x, %n) {eps=1e-05} : f32[B, L, 30]
        %y = linear(%a, %w) {interleave=32, features=1100} : f32[B, L, 1100]
        %q = linear(%z, %u) {interleave=32, features=1100} : f32[B, L, 1100]
        %s = add(%y, %q) : f32[B, L, 1100]
        return %s""",
    "shares of a row's weight": """
        input %x: f32[B, L, 30]
        input %w: bf16[2, 30, 32]
        input %m: f32[B, L, 5]
        %y = linear(%x, %w) {interleave=32, features=40} : f32[B, L, 40]
        %e = exp(%m) : f32[B, L, 5]
        %t = sum(%e) {axis=2} : f32[B, L]
        %u = reshape(%t) {shape=[B, L, 1]} : f32[B, L, 1]
        %s = div(%y, %u) : f32[B, L, 40]
        return %s""",
}

BODIES = IN_REGISTERS | BY_COLUMNS
CASES = {
    name: SUITE.add(Site.dense(region(text)), emit_linear_region) for name, text in BODIES.items()
}


def given(case: CompiledSite, sizes: dict[str, int], seed: int = 0) -> list[torch.Tensor]:
    """Random operands, offsets of groups in order: some groups are empty."""
    op = case.site.op
    assert isinstance(op, Fused)
    tensors = operands(op, sizes, seed)
    for i, value in enumerate(op.body.inputs):
        if value.name == "offsets" and value.bound is not None:
            tensors[i] = tensors[i].sort().values
            tensors[i][0], tensors[i][-1] = 0, evaluate_dim(value.bound, sizes) - 1
    return tensors


def tolerance_of(case: CompiledSite) -> float:
    """Relative error against float64, in which nothing is rounded to narrower types."""
    op = case.site.op
    assert isinstance(op, Fused)
    casts = {node.op.dtype for node in op.body.nodes if isinstance(node.op, Cast)}
    return 5e-3 if casts & {DType.BF16, DType.F16} else 5e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s['B']}x{s['L']}")
def test_region_is_its_body(name: str, sizes: dict[str, int]) -> None:
    case = CASES[name]
    tensors, tolerance = given(case, sizes, seed=sizes["L"]), tolerance_of(case)
    case.check(sizes, *tensors, tolerance=tolerance)
    if case.plan.in_place:
        case.check(sizes, *tensors, tolerance=tolerance, in_place=True)
