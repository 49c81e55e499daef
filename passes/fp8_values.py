"""Values that E4M3 numbers stand for, as passes find them in graphs."""

from dataclasses import dataclass

from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Cast, Mul, Reshape, TakeRows
from nemoc.ir.rewrite import Rewriter
from nemoc.ir.types import Value


@dataclass(frozen=True)
class Fp8Value:
    """A decoded value, codes · scale.

    Attributes:
        codes: f8e4m3 [..., K].
        scale: f32 [] or [..., 1], with the axes of the codes, any of which may be 1.
    """

    codes: Value
    scale: Value


def decoded_from(value: Value, rewriter: Rewriter) -> Fp8Value | None:
    """What a value is decoded from: through roundings, views that keep rows, and gathers."""
    op = rewriter.producer(value)
    match op:
        case Cast() if op.dtype.is_float:
            return decoded_from(op.x, rewriter)
        case Mul():
            return _product(op.a, op.b, rewriter) or _product(op.b, op.a, rewriter)
        case Reshape() if op.x.type.rank and op.shape[-1:] == op.x.shape[-1:]:
            return _moved(decoded_from(op.x, rewriter), op, rewriter)
        case TakeRows() if op.table.type.rank > 1:
            return _moved(decoded_from(op.table, rewriter), op, rewriter)
    return None


def _product(wide: Value, scale: Value, rewriter: Rewriter) -> Fp8Value | None:
    """The product of E4M3 numbers and a scale in f32 that is constant along the last axis."""
    cast = rewriter.producer(wide)
    if not isinstance(cast, Cast) or cast.x.dtype is not DType.F8E4M3:
        return None
    if scale.dtype is not DType.F32:
        return None
    if scale.type.rank and (scale.type.rank != wide.type.rank or scale.shape[-1] != 1):
        return None
    return Fp8Value(cast.x, scale)


def _moved(found: Fp8Value | None, op: Reshape | TakeRows, rewriter: Rewriter) -> Fp8Value | None:
    """The same after its rows have been laid out or picked."""
    if found is None:
        return None
    codes, scale = found.codes, found.scale
    if scale.type.rank and scale.shape[:-1] != codes.shape[:-1]:
        return None
    match op:
        case Reshape():
            moved = rewriter(Reshape(codes, op.shape))
            if scale.type.rank:
                scale = rewriter(Reshape(scale, (*op.shape[:-1], 1)))
        case TakeRows():
            moved = rewriter(TakeRows(codes, op.index))
            if scale.type.rank:
                scale = rewriter(TakeRows(scale, op.index))
    return Fp8Value(moved, scale)
