"""Values as rows: the leading axes count rows, in row-major order, and the elements of the last axes lie in a row."""

from dataclasses import dataclass, replace

from nemoc.codegen.plan import RegionError
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
        return replace(self, lead=self.own) if self.is_one else self

    @property
    def width(self) -> int:
        """Elements of a row.

        Raises:
            RegionError: the number is not fixed.
        """
        return fixed(product(self.row), f"the width of a row of %{self.value.name}")


def fixed(size: Dim, what: str) -> int:
    """A dimension as an integer.

    Raises:
        RegionError: it has symbols in it; `what` says what it is.
    """
    if not isinstance(size, int):
        raise RegionError(f"{what} is {size}, not a fixed number")
    return size
