"""Naming elements of values: places in their rows, and rows in memory."""

from dataclasses import dataclass

from nemoc.codegen.plan import LayoutError, View
from nemoc.codegen.rows import Rows, Shape
from nemoc.codegen.tvm.writer import size_text
from nemoc.codegen.views import merge_axes


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
