"""Arithmetic that returns its operand."""

import math

from nemoc.ir.op import Op
from nemoc.ir.ops import Add, Div, Exp, Full, Mul, Relu, Scale, Shift, Sigmoid, Softplus, Square
from nemoc.ir.rewrite import Replacement, Rewriter, Rule
from nemoc.ir.types import Value


def _scale_by_one(op: Op, rewriter: Rewriter) -> Replacement:
    """x · 1 = x"""
    assert isinstance(op, Scale)
    return op.x if op.factor == 1 else None


def _shift_by_negative_zero(op: Op, rewriter: Rewriter) -> Replacement:
    """x + (−0) = x; but −0 + 0 = +0"""
    assert isinstance(op, Shift)
    return op.x if _is_negative_zero(op.amount) else None


def _relu_of_nonnegative(op: Op, rewriter: Rewriter) -> Replacement:
    """max(y, 0) = y where y ≥ 0 or NaN"""
    assert isinstance(op, Relu)
    nonnegative = isinstance(rewriter.producer(op.x), Relu | Square | Exp | Sigmoid | Softplus)
    return op.x if nonnegative else None


def _add_of_zero(op: Op, rewriter: Rewriter) -> Replacement:
    """x + 0 = 0 + x = x for integers; for floats only with −0"""
    assert isinstance(op, Add)
    for x, other in ((op.a, op.b), (op.b, op.a)):
        value = _constant(other, rewriter)
        if value == 0 and (not x.dtype.is_float or _is_negative_zero(value)):
            return _unless_broadcast(op, x)
    return None


def _mul_by_one(op: Op, rewriter: Rewriter) -> Replacement:
    """x · 1 = 1 · x = x"""
    assert isinstance(op, Mul)
    for x, other in ((op.a, op.b), (op.b, op.a)):
        if _constant(other, rewriter) == 1:
            return _unless_broadcast(op, x)
    return None


def _div_by_one(op: Op, rewriter: Rewriter) -> Replacement:
    """x / 1 = x"""
    assert isinstance(op, Div)
    return _unless_broadcast(op, op.a) if _constant(op.b, rewriter) == 1 else None


def _is_negative_zero(value: float) -> bool:
    return value == 0 and math.copysign(1.0, value) < 0


def _constant(value: Value, rewriter: Rewriter) -> float | None:
    """What every element of a value is, if that is written in the graph."""
    producer = rewriter.producer(value)
    return producer.value if isinstance(producer, Full) else None


def _unless_broadcast(op: Op, x: Value) -> Replacement:
    """The operand, if the other one does not widen its shape."""
    return x if op.infer() == x.type else None


RULES = (
    Rule("scale-by-one", Scale, _scale_by_one),
    Rule("shift-by-negative-zero", Shift, _shift_by_negative_zero),
    Rule("relu-of-nonnegative", Relu, _relu_of_nonnegative),
    Rule("add-of-zero", Add, _add_of_zero),
    Rule("mul-by-one", Mul, _mul_by_one),
    Rule("div-by-one", Div, _div_by_one),
)
