"""Dimensions as functions of three integers.

A step evaluates thousands of dimensions. Substitution in sympy takes a tenth of a millisecond for each; closures that
are made once take a microsecond. Results are exact: integers, and fractions inside an expression where there are any.
"""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy

from nemoc.ir.dims import Dim, format_dim
from nemoc.ir.errors import IRError

Sizes = tuple[int, int, int]
"""B, L and C."""

_ORDER = ("B", "L", "C")
_Number = int | Fraction
_Function = Callable[[Sizes], Any]
"""Gives a `_Number`; typed loosely, since closures mix both kinds."""

_MOST_EXPONENT, _LARGEST_BASE = 64, 1 << 128
"""Limits of powers: dimensions come from files, and a power of powers could fill the memory."""


def dim_function(value: Dim) -> Callable[[Sizes], int]:
    """A dimension as a function of B, L and C.

    The function raises `IRError` where the dimension is no integer, as `evaluate_dim` does.

    Raises:
        IRError: the dimension has other symbols, or is no sum, product, power, quotient, floor, ceiling, Min or Max.
    """
    if isinstance(value, int):
        return lambda sizes: value
    function = _compile(value, value)

    def evaluate(sizes: Sizes) -> int:
        try:
            found: _Number = function(sizes)
        except ZeroDivisionError:
            raise _wrong(value, "divides by 0", sizes) from None
        if isinstance(found, Fraction):
            if found.denominator != 1:
                raise _wrong(value, f"is {found}", sizes)
            return found.numerator
        return found

    return evaluate


def _compile(node: Any, whole: Dim) -> _Function:
    if node.is_Rational:
        number = int(node) if node.is_Integer else Fraction(int(node.p), int(node.q))
        return lambda sizes: number
    if node.is_Symbol and node.name in _ORDER:
        return operator.itemgetter(_ORDER.index(node.name))
    if node.is_Pow:
        return _power(node, whole)
    if isinstance(node, sympy.floor | sympy.ceiling):
        return _rounded(node, whole)
    join = _join(node)
    if join is None:
        raise IRError(f"dimension {format_dim(whole)} cannot be computed: it has {node}")
    parts = tuple(_compile(part, whole) for part in node.args)
    return lambda sizes: join([part(sizes) for part in parts])


def _join(node: Any) -> Callable[[list[Any]], Any] | None:
    """What a node does with the values of its arguments."""
    if node.is_Add:
        return sum
    if node.is_Mul:
        return math.prod
    if isinstance(node, sympy.Min):
        return min
    return max if isinstance(node, sympy.Max) else None


def _rounded(node: Any, whole: Dim) -> _Function:
    """⌊n / d⌋ or ⌈n / d⌉ by a division of integers."""
    numerator, denominator = (_compile(part, whole) for part in node.args[0].as_numer_denom())
    if isinstance(node, sympy.floor):
        return lambda sizes: numerator(sizes) // denominator(sizes)
    return lambda sizes: -(-numerator(sizes) // denominator(sizes))


def _power(node: Any, whole: Dim) -> _Function:
    base, exponent = node.args
    if not exponent.is_Integer or abs(int(exponent)) > _MOST_EXPONENT:
        raise IRError(f"dimension {format_dim(whole)} cannot be computed: it has {node}")
    inner, power = _compile(base, whole), int(exponent)

    def evaluate(sizes: Sizes) -> _Number:
        value: _Number = inner(sizes)
        if not -_LARGEST_BASE < value < _LARGEST_BASE:
            raise _wrong(whole, "is too large", sizes)
        return math.prod([value] * power) if power > 0 else 1 / Fraction(value) ** -power

    return evaluate


def _wrong(value: Dim, what: str, sizes: Sizes) -> IRError:
    return IRError(
        f"dimension {format_dim(value)} {what} when {dict(zip(_ORDER, sizes, strict=True))}"
    )
