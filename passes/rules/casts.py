"""Casts that lose nothing."""

from dataclasses import dataclass

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, Full
from nemoc.ir.rewrite import Replacement, Rewriter, Rule


def _cast_to_same_type(op: Op, rewriter: Rewriter) -> Replacement:
    """cast(x: t, t) = x"""
    assert isinstance(op, Cast)
    return op.x if op.x.dtype is op.dtype else None


def _cast_of_widening_cast(op: Op, rewriter: Rewriter) -> Replacement:
    """cast(cast(x: s, t), u) = cast(x, u) where t holds every value of s"""
    assert isinstance(op, Cast)
    inner = rewriter.producer(op.x)
    if not isinstance(inner, Cast) or not holds(inner.dtype, inner.x.dtype):
        return None
    if not inner.x.dtype.is_float == inner.dtype.is_float == op.dtype.is_float:
        return None  # between floats and integers, out-of-range values are no longer defined by the type
    return inner.x if inner.x.dtype is op.dtype else rewriter(Cast(inner.x, op.dtype))


def _cast_of_full(op: Op, rewriter: Rewriter) -> Replacement:
    """cast(full(v), t) = full(v) of type t where t holds v"""
    assert isinstance(op, Cast)
    full = rewriter.producer(op.x)
    if not isinstance(full, Full):
        return None
    cast = torch.tensor(full.value, dtype=full.dtype.torch).to(op.dtype.torch)
    same = float(cast.item()) == full.value
    return rewriter(Full(full.value, op.dtype, full.shape)) if same else None


@dataclass(frozen=True)
class _Float:
    """Bits of precision, and the exponents of the largest and smallest magnitudes."""

    precision: int
    top: int
    bottom: int


_FLOATS = {
    DType.F64: _Float(53, 1023, -1074),
    DType.F32: _Float(24, 127, -149),
    DType.BF16: _Float(8, 127, -133),
    DType.F16: _Float(11, 15, -24),
    DType.F8E4M3: _Float(4, 8, -9),
}


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of one type is a value of the other, both floats or both integers."""
    if wide.is_float != narrow.is_float:
        return False
    if wide.is_float:
        w, n = _FLOATS[wide], _FLOATS[narrow]
        return w.precision >= n.precision and w.top >= n.top and w.bottom <= n.bottom
    low, high = _range(narrow)
    wide_low, wide_high = _range(wide)
    return wide_low <= low and high <= wide_high


def _range(dtype: DType) -> tuple[int, int]:
    if dtype is DType.BOOL:
        return 0, 1
    info = torch.iinfo(dtype.torch)
    return info.min, info.max


RULES = (
    Rule("cast-to-same-type", Cast, _cast_to_same_type),
    Rule("cast-of-widening-cast", Cast, _cast_of_widening_cast),
    Rule("cast-of-full", Cast, _cast_of_full),
)
