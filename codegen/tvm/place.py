"""Naming elements of values: values as rows, and places in them.

Kernels that carry out a region see each of its values as rows: the leading axes count rows, in row-major order, and the
elements of the last axes lie in a row.
"""

import dataclasses
from dataclasses import dataclass

from nemoc.codegen.plan import LayoutError, RegionError, View
from nemoc.codegen.tvm.elementwise import merge_axes
from nemoc.codegen.tvm.writer import size_text
from nemoc.ir.dims import Dim, product
from nemoc.ir.types import Value

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Rows:
    """A value seen as rows.

    Attributes:
        value: the value.
        lead: the axes that count rows; the value's own leading axes are broadcast to them.
        trail: how many of the value's last axes make up a row.
    """

    value: Value
    lead: Shape
    trail: int = 1

    @classmethod
    def of(cls, value: Value, trail: int = 1) -> "Rows":
        """A value by its own leading axes."""
        return cls(value, value.shape[: value.type.rank - trail], trail)

    @property
    def own(self) -> Shape:
        """The value's leading axes, before they are broadcast."""
        return self.value.shape[: self.value.type.rank - self.trail]

    @property
    def row(self) -> Shape:
        """The axes of a row."""
        return self.value.shape[self.value.type.rank - self.trail :]

    @property
    def is_one(self) -> bool:
        """Whether the value is a single row, which all rows share."""
        return product(self.own) == 1

    @property
    def settled(self) -> "Rows":
        """The same without a broadcast that no row number is needed for."""
        return dataclasses.replace(self, lead=self.own) if self.is_one else self

    @property
    def width(self) -> int:
        """Elements of a row.

        Raises:
            RegionError: the number is not fixed.
        """
        return fixed(product(self.row), f"the width of a row of %{self.value.name}")


@dataclass(frozen=True)
class Column:
    """The number of an element within a row: `inner`, or `outer * step + inner` with 0 ≤ inner < step.

    Kept in two parts where a kernel's loops give it so: what divides by `step` again then costs nothing.
    """

    inner: str
    outer: str = "0"
    step: int = 0

    @property
    def text(self) -> str:
        """The number as an int32 expression."""
        return self.inner if self.outer == "0" else f"{self.outer} * {self.step} + {self.inner}"

    def shifted(self, amount: int) -> "Column":
        """The column so many elements further."""
        return Column(f"{self.text} + {amount}") if amount else self

    def split(self, step: int, width: int) -> "Column":
        """The same number in two parts.

        Args:
            step: elements of a part.
            width: elements of the row, a multiple of `step`.
        """
        if step == width or self.step == step:
            return self if self.step == step else Column(self.text, "0", step)
        return Column(f"({self.text}) % {step}", f"({self.text}) // {step}", step)


@dataclass(frozen=True)
class Place:
    """Where a vector of elements is wanted.

    Attributes:
        row: the row's number, an int32 expression.
        column: the first element's number in the row.
        lanes: how many elements.
    """

    row: str
    column: Column
    lanes: int


def fixed(size: Dim, what: str) -> int:
    """A dimension as an integer.

    Raises:
        RegionError: it has symbols in it; `what` says what it is.
    """
    if not isinstance(size, int):
        raise RegionError(f"{what} is {size}, not a fixed number")
    return size


def rows_view(view: View, rows: Rows) -> View:
    """A tensor as a matrix of rank 2, rows by their elements.

    Raises:
        LayoutError: its leading axes, or those of a row, have no common stride.
    """
    lead, row = row_axes(view, rows)
    if lead.rank != 1:
        raise LayoutError(f"rows of {view} have no common stride")
    return View(view.dtype, lead.shape + row.shape, lead.strides + row.strides)


def row_axes(view: View, rows: Rows) -> tuple[View, View]:
    """A tensor's axes merged as far as strides allow: those that count rows, and the one along a row.

    Raises:
        LayoutError: the axes of a row have no common stride.
    """
    seen = view.broadcast((*rows.lead, *rows.row))
    cut = len(rows.lead)
    (lead,) = merge_axes([View(seen.dtype, seen.shape[:cut], seen.strides[:cut])])
    (row,) = merge_axes([View(seen.dtype, seen.shape[cut:], seen.strides[cut:])])
    if row.rank != 1:
        raise LayoutError(f"elements of a row of {view} have no common stride")
    return lead, row


def row_index(row: str, shape: Shape) -> str:
    """The indices, separated by commas, along the leading axes of a tensor for a row number."""
    indices: list[str] = []
    for size in reversed(shape[1:]):
        indices.append(f"({row}) % {size_text(size)}")
        row = f"({row}) // {size_text(size)}"
    return ", ".join([row, *reversed(indices)])


def ramp(at: str, lanes: int) -> str:
    """The index of `lanes` elements of a local array."""
    return at if lanes == 1 else f"T.Ramp({at}, 1, {lanes})"
