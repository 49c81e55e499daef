"""Views of views: reshape, permute and slice as new strides over the same memory, wherever strides can say it.

And the other way round: views with as few axes as their strides allow.
"""

import functools

import sympy

from nemoc.codegen.plan import View
from nemoc.ir.dims import Dim, dim
from nemoc.ir.op import Op
from nemoc.ir.ops.shape import Permute, Reshape, Slice


def apply_view(op: Op, view: View) -> tuple[View, Dim] | None:
    """What a view op makes of its operand's view.

    Returns:
        The result's view and how many bytes its first element lies behind the operand's; None when no
        strides describe the result, or the op is no view.
    """
    match op:
        case Reshape(shape=shape):
            reshaped = reshape_view(view, shape)
            return None if reshaped is None else (reshaped, 0)
        case Permute(axes=axes):
            shape = tuple(view.shape[a] for a in axes)
            return View(view.dtype, shape, tuple(view.strides[a] for a in axes)), 0
        case Slice(axis=axis, start=start, stop=stop):
            shape = (*view.shape[:axis], stop - start, *view.shape[axis + 1 :])
            offset = dim(start * view.strides[axis] * view.dtype.bytes)
            return View(view.dtype, shape, view.strides), offset
    return None


@functools.cache
def reshape_view(view: View, shape: tuple[Dim, ...]) -> View | None:
    """The view under another shape of as many elements, in row-major order; None when strides cannot say it.

    Axes that lie as one in memory are merged, and the new axes have to divide the merged ones. Sizes are compared as
    polynomials: [B, L, 8] reshapes to [B·L, 8] and back.
    """
    runs = _runs(view)
    strides: list[Dim] = []
    for size in reversed(shape):
        if size == 1:
            strides.append(1)
            continue
        if not runs:
            return None
        rest, stride = runs.pop()
        left = quotient(rest, size)
        if left is None:
            return None
        strides.append(stride)
        if left != 1:
            runs.append((left, dim(stride * size)))
    return View(view.dtype, shape, tuple(reversed(strides))) if not runs else None


def _runs(view: View) -> list[tuple[Dim, Dim]]:
    """(elements, stride) of the longest evenly spaced runs of axes, outermost first, sizes of 1 left out."""
    runs: list[tuple[Dim, Dim]] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == dim(stride * size):
            runs[-1] = (dim(runs[-1][0] * size), stride)
        else:
            runs.append((size, stride))
    return runs


@functools.cache
def quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where it is a whole number or polynomial, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    numerator, denominator = sympy.fraction(quotient)
    return dim(numerator) if denominator == 1 else None


def merge_axes(views: list[View]) -> list[View]:
    """The same views with neighbouring axes made one wherever all of them allow it.

    All views have one shape; axes of size 1 disappear, and at least one axis remains.
    """
    axes: list[tuple[Dim, list[Dim]]] = []
    for i, size in enumerate(views[0].shape):
        steps = [v.strides[i] for v in views]
        if size == 1:
            continue
        if axes and all(a == dim(s * size) for a, s in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (dim(axes[-1][0] * size), steps)
        else:
            axes.append((size, steps))
    axes = axes or [(1, [1 for _ in views])]
    shape = tuple(size for size, _ in axes)
    return [View(v.dtype, shape, tuple(steps[k] for _, steps in axes)) for k, v in enumerate(views)]
