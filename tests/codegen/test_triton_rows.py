"""GPU kernels of regions that are computed row by row, in Triton's interpreter."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nemoc.codegen.plan import Arg, Site, View
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.seen import wide
from nemoc.codegen.triton.target import gpu_target
from nemoc.ir.dims import B, C, Dim, L, dim
from nemoc.ir.dtypes import DType
from support.gpu_kernels import INTERPRETER, check_kernel
from support.regions import operands, region

SIZES = {"B": 2, "L": 5, "C": 9}

REGIONS = {
    "a gated norm whose rows are groups": """
        input %x: f32[B, L, 12]
        input %z: f32[B, L, 12]
        input %w: f32[12]
        %s = silu(%z) : f32[B, L, 12]
        %g = mul(%x, %s) : f32[B, L, 12]
        %n = rms_norm(%g, %w) {eps=1e-05, groups=3} : f32[B, L, 12]
        return %n
    """,
    "experts chosen within groups and weighted": """
        input %x: f32[B, 12]
        input %bias: f32[12]
        %s = sigmoid(%x) : f32[B, 12]
        %c = add(%s, %bias) : f32[B, 12]
        %l = group_limit(%c) {groups=3, keep=2} : f32[B, 12]
        %k = top_k(%l) {k=3} : i32[B, 3]
        %w = take_along(%s, %k) : f32[B, 3]
        %t = sum(%w) {axis=1} : f32[B]
        %v = reshape(%t) {shape=[B, 1]} : f32[B, 1]
        %d = div(%w, %v) : f32[B, 3]
        return %d, %k
    """,
    "rows gathered, weighted and summed": """
        input %table: f32[3*B, 10]
        input %index: i32[3*B] < 3*B
        input %w: f32[B, 3, 1]
        %r = take_rows(%table, %index) : f32[3*B, 10]
        %v = reshape(%r) {shape=[B, 3, 10]} : f32[B, 3, 10]
        %m = mul(%v, %w) : f32[B, 3, 10]
        %s = sum(%m) {axis=1} : f32[B, 10]
        return %s
    """,
    "results of several widths": """
        input %x: f32[B, L, 6]
        input %w: f32[6]
        %n = rms_norm(%x, %w) {eps=1e-05} : f32[B, L, 6]
        %h = slice(%n) {axis=2, start=2, stop=5} : f32[B, L, 3]
        %t = sum(%n) {axis=2} : f32[B, L]
        return %n, %h, %t
    """,
    "operands broadcast along either axis": """
        input %x: f32[B, L, 2, 3]
        input %a: f32[B, 1, 2, 1]
        input %b: f32[L, 1, 3]
        input %c: f32[1]
        %p = add(%x, %a) : f32[B, L, 2, 3]
        %q = mul(%p, %b) : f32[B, L, 2, 3]
        %r = add(%q, %c) : f32[B, L, 2, 3]
        return %r
    """,
    "a slice of heads of a slice": """
        input %x: f32[B, L, 20]
        %s = slice(%x) {axis=2, start=4, stop=16} : f32[B, L, 12]
        %v = reshape(%s) {shape=[B, L, 3, 4]} : f32[B, L, 3, 4]
        %h = slice(%v) {axis=2, start=1, stop=3} : f32[B, L, 2, 4]
        %e = exp(%h) : f32[B, L, 2, 4]
        return %e
    """,
    "the last valid token, normalised": """
        input %x: f32[B, L, 7]
        input %valid: i32[B] < L + 1
        input %w: f32[7]
        %t = take_last(%x, %valid) : f32[B, 7]
        %n = rms_norm(%t, %w) {eps=1e-05} : f32[B, 7]
        return %n
    """,
    "integers": """
        input %a: i32[B] < 9
        input %b: i32[B] < 9
        %s = add(%a, %b) : i32[B]
        %h = floor_div(%s) {divisor=3} : i32[B]
        return %h
    """,
    "a norm, and the scales of several formats of it": """
        input %x: f32[B, 32]
        input %w: f32[32]
        %n = rms_norm(%x, %w) {eps=1e-05} : f32[B, 32]
        %rows = reshape(%n) {shape=[B, 1, 32]} : f32[B, 1, 32]
        %f = fp8_scale(%rows) : f32[B]
        %g = nvfp4_global_scale(%rows) : f32[B]
        %h = nvfp4_global_scale(%rows) {four_over_six=true} : f32[B]
        return %n, %f, %g, %h
    """,
    "several choices by the same scores": """
        input %x: f32[B, 12]
        %l = group_limit(%x) {groups=3, keep=2} : f32[B, 12]
        %m = group_limit(%x) {groups=4, keep=2} : f32[B, 12]
        %k = top_k(%x) {k=3} : i32[B, 3]
        %j = top_k(%x) {k=2} : i32[B, 2]
        %a = take_along(%l, %k) : f32[B, 3]
        %b = take_along(%m, %j) : f32[B, 2]
        %p = exp(%a) : f32[B, 3]
        %q = exp(%b) : f32[B, 2]
        return %p, %q, %k, %j
    """,
    "a permuted operand": """
        input %x: f32[B, L, 3]
        %p = permute(%x) {axes=[1, 2, 0]} : f32[L, 3, B]
        %e = exp(%p) : f32[L, 3, B]
        return %e
    """,
}


@pytest.mark.parametrize("target", ["triton-interpret", "cuda:sm_90"])
@pytest.mark.parametrize("name", REGIONS)
def test_regions_equal_their_bodies(name: str, target: str) -> None:
    op = region(REGIONS[name])
    check_kernel(Site.dense(op), SIZES, *operands(op, SIZES), target=gpu_target(target))


def test_a_row_longer_than_a_tile_is_stored_in_parts() -> None:
    op = region("""
        input %x: f32[B, 9000]
        input %w: f32[9000]
        %n = rms_norm(%x, %w) {eps=1e-05} : f32[B, 9000]
        return %n
    """)
    check_kernel(Site.dense(op), {"B": 2}, *operands(op, {"B": 2}))


def test_a_few_of_many_scores_are_chosen_for_many_tokens() -> None:
    op = region("""
        input %x: f32[B*L, 130]
        %k = top_k(%x) {k=6} : i32[B*L, 6]
        %w = take_along(%x, %k) : f32[B*L, 6]
        return %w, %k
    """)
    sizes = {"B": 3, "L": 100}
    check_kernel(Site.dense(op), sizes, *operands(op, sizes), target=gpu_target("cuda:sm_90"))


def test_rows_with_gaps_between_them_are_read_and_written_where_they_are() -> None:
    op = region("input %x: f32[B, L, 6]\n%y = exp(%x) : f32[B, L, 6]\nreturn %y")
    apart = View(DType.F32, (B, L, 6), (dim(10 * L), 10, 1))
    check_kernel(Site(op, (apart,), (apart,)), SIZES, *operands(op, SIZES))


def test_tokens_without_a_common_stride_are_found_by_sequence_and_number() -> None:
    op = region("input %x: f32[B, L, 6]\n%y = exp(%x) : f32[B, L, 6]\nreturn %y")
    apart = View(DType.F32, (B, L, 6), (dim(6 * L + 5), 6, 1))
    check_kernel(
        Site(op, (apart,), (View.dense(op.result_types()[0]),)), SIZES, *operands(op, SIZES)
    )


def test_rows_beyond_two_thousand_million_elements_are_found() -> None:
    count = (1 << 21) + 8
    op = region(f"""
        input %table: i8[{count}, 1024]
        input %index: i32[B] < {count}
        %r = take_rows(%table, %index) : i8[B, 1024]
        %y = cast(%r) {{dtype=f32}} : f32[B, 1024]
        return %y
    """)
    (stage,) = emit(Site.dense(op), INTERPRETER).stages
    index = torch.tensor([0, count - 1], dtype=torch.int32)
    start = torch.empty(1, dtype=torch.int8)  # of a table that nobody has memory for
    given = {
        Arg("operand", 0): start,
        Arg("operand", 1): index,
        Arg("result", 0): torch.empty(2, 1024),
    }
    offsets: list[int] = []
    load = InterpreterBuilder.create_masked_load

    def without_table(this: Any, pointers: Any, *rest: Any) -> Any:
        if pointers.get_element_ty() != tl.int8:
            return load(this, pointers, *rest)
        offsets.extend(int(at) - start.data_ptr() for at in pointers.data.ravel())
        return TensorHandle(np.zeros(pointers.data.shape, np.int8), tl.int8)

    sizes = {"B": 2, "L": 1, "C": 1}
    with mock.patch.object(InterpreterBuilder, "create_masked_load", without_table):
        pointers = [given[arg] for arg in stage.args]
        Interpreter([stage.kernel]).launch(stage.kernel.name, pointers, sizes)
    assert set(offsets) == {int(row) * 1024 + i for row in index for i in range(1024)}


@pytest.mark.parametrize(
    ("stride", "size", "far"),
    [
        (2047, 1 << 20, False),
        (2048, 5, True),
        (1024, 1 << 21, False),
        (1024, (1 << 21) + 1, True),
        (64, dim(B * L * 256), False),
        (128, dim(B * (1 << 13)), True),  # states of a recurrence
        (128, dim(2 * B * C), True),
        (C, 4, True),
    ],
)
def test_offsets_have_64_bits_where_32_may_be_too_few(stride: Dim, size: Dim, far: bool) -> None:
    assert wide("i", stride, size) == ("tl.cast(i, tl.int64)" if far else "i")


def test_equal_ops_on_equal_views_have_equal_kernels() -> None:
    text = "input %x: f32[B, L, 6]\n%y = exp(%x) : f32[B, L, 6]\nreturn %y"
    first, second = (emit(Site.dense(region(text)), INTERPRETER) for _ in range(2))
    other = emit(Site.dense(region(text.replace("6", "7"))), INTERPRETER)
    assert first.stages[0].kernel == second.stages[0].kernel != other.stages[0].kernel


def test_columns_may_have_any_stride() -> None:
    op = region("input %x: f32[B, L, 6]\n%y = exp(%x) : f32[B, L, 6]\nreturn %y")
    turned = View(DType.F32, (B, L, 6), (1, B, dim(B * L)))
    dense = View.dense(op.result_types()[0])
    check_kernel(Site(op, (turned,), (dense,)), SIZES, *operands(op, SIZES))
