"""Reshapes, permutations, slices and concatenations that cancel or merge."""

from itertools import pairwise

from nemoc.ir.op import Op
from nemoc.ir.ops import Concat, Full, Permute, Reshape, Slice
from nemoc.ir.rewrite import Replacement, Rewriter, Rule
from nemoc.ir.types import TensorType, Value


def _reshape_to_same_shape(op: Op, rewriter: Rewriter) -> Replacement:
    """reshape(x, shape of x) = x"""
    assert isinstance(op, Reshape)
    return op.x if op.infer() == op.x.type else None


def _reshape_of_reshape(op: Op, rewriter: Rewriter) -> Replacement:
    """reshape(reshape(x, s), t) = reshape(x, t)"""
    assert isinstance(op, Reshape)
    inner = rewriter.producer(op.x)
    return rewriter(Reshape(inner.x, op.shape)) if isinstance(inner, Reshape) else None


def _permute_of_permute(op: Op, rewriter: Rewriter) -> Replacement:
    """permute(permute(x, p), q) = permute(x, p ∘ q)"""
    assert isinstance(op, Permute)
    inner = rewriter.producer(op.x)
    if not isinstance(inner, Permute):
        return None
    return rewriter(Permute(inner.x, tuple(inner.axes[a] for a in op.axes)))


def _permute_of_unit_axes(op: Op, rewriter: Rewriter) -> Replacement:
    """permute(x, p) = reshape(x, its shape) where p moves axes of size 1 only, or none"""
    assert isinstance(op, Permute)
    moved = [a for a in op.axes if op.x.shape[a] != 1]
    if moved != sorted(moved):
        return None
    return rewriter(Reshape(op.x, tuple(op.x.shape[a] for a in op.axes)))


def _slice_of_everything(op: Op, rewriter: Rewriter) -> Replacement:
    """slice(x, 0 : size of the axis) = x"""
    assert isinstance(op, Slice)
    return op.x if op.infer() == op.x.type else None


def _slice_of_slice(op: Op, rewriter: Rewriter) -> Replacement:
    """slice(slice(x, a : b), c : d) = slice(x, a + c : a + d) on one axis"""
    assert isinstance(op, Slice)
    inner = rewriter.producer(op.x)
    if not isinstance(inner, Slice) or inner.axis != op.axis:
        return None
    return rewriter(Slice(inner.x, op.axis, inner.start + op.start, inner.start + op.stop))


def _slice_of_concat(op: Op, rewriter: Rewriter) -> Replacement:
    """slice(concat(…, x, …), a : b) = slice(x, a − start of x : b − start of x) where x covers a : b"""
    assert isinstance(op, Slice)
    concat = rewriter.producer(op.x)
    if not isinstance(concat, Concat) or concat.axis != op.axis:
        return None
    start = 0
    for x in concat.xs:
        size = x.shape[op.axis]
        if not isinstance(size, int):
            return None
        if start <= op.start and op.stop <= start + size:
            return rewriter(Slice(x, op.axis, op.start - start, op.stop - start))
        start += size
    return None


def _concat_of_one(op: Op, rewriter: Rewriter) -> Replacement:
    """concat(x) = x"""
    assert isinstance(op, Concat)
    return op.xs[0] if len(op.xs) == 1 else None


def _concat_of_adjacent_slices(op: Op, rewriter: Rewriter) -> Replacement:
    """concat(slice(x, a : b), slice(x, b : c), …) = slice(x, a : …)"""
    assert isinstance(op, Concat)
    slices = [p for p in map(rewriter.producer, op.xs) if isinstance(p, Slice)]
    if len(slices) < len(op.xs) or any(s.axis != op.axis for s in slices):
        return None
    if any(a.x is not b.x or a.stop != b.start for a, b in pairwise(slices)):
        return None
    return rewriter(Slice(slices[0].x, op.axis, slices[0].start, slices[-1].stop))


def _layout_of_full(op: Op, rewriter: Rewriter) -> Replacement:
    """reshape, permute or slice(full(v)) = full(v) of the new shape"""
    full = rewriter.producer(_only(op.operands()))
    result = op.infer()
    assert isinstance(result, TensorType)
    return rewriter(Full(full.value, full.dtype, result.shape)) if isinstance(full, Full) else None


def _only(operands: tuple[Value, ...]) -> Value:
    (x,) = operands
    return x


RULES = (
    Rule("reshape-to-same-shape", Reshape, _reshape_to_same_shape),
    Rule("reshape-of-reshape", Reshape, _reshape_of_reshape),
    Rule("permute-of-permute", Permute, _permute_of_permute),
    Rule("permute-of-unit-axes", Permute, _permute_of_unit_axes),
    Rule("slice-of-everything", Slice, _slice_of_everything),
    Rule("slice-of-slice", Slice, _slice_of_slice),
    Rule("slice-of-concat", Slice, _slice_of_concat),
    Rule("concat-of-one", Concat, _concat_of_one),
    Rule("concat-of-adjacent-slices", Concat, _concat_of_adjacent_slices),
    Rule("layout-of-full", (Reshape, Permute, Slice), _layout_of_full),
)
