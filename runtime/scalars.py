"""Numbers from users: Python's, numpy's or torch's; each refusal is one line."""

import math
import operator
from typing import Any

from nemoc.ir.errors import NemocError


def as_integer(value: Any) -> int | None:
    """An integer as Python's own; none for anything else, truth values included."""
    if isinstance(value, bool) or _has_axes(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the last two: tensors that hold no integer
        return None


def as_number(value: Any) -> float:
    """A number as Python's own; NaN for anything else, which fails every comparison."""
    if isinstance(value, bool) or not hasattr(value, "__float__") or _has_axes(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _has_axes(value: Any) -> bool:
    """Whether a value is an array or tensor of more than one number, or could be."""
    return getattr(value, "ndim", None) not in (None, 0)


def check_integer(name: str, value: Any) -> int:
    """An integer as Python's own.

    Raises:
        NemocError: it is none.
    """
    found = as_integer(value)
    if found is None:
        raise NemocError(f"{name} is {value!r}, expected an integer")
    return found


def check_count(name: str, value: Any) -> int:
    """An integer from 1 as Python's own.

    Raises:
        NemocError: it is none.
    """
    found = check_integer(name, value)
    if found < 1:
        raise NemocError(f"{name} is {found}, expected at least 1")
    return found
