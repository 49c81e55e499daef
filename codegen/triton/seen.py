"""Naming tiles of values: a value as rows of some width, and places in it.

A value's elements in row-major order, cut into rows of `width` elements, are its rows: [B, L, H] is B·L rows of H, or
2·B·L rows of H / 2. So reshapes change nothing, and every other view of elements is arithmetic on row and column
numbers.
"""

from dataclasses import dataclass

from nemoc.codegen.plan import Arg, RegionError, View
from nemoc.codegen.triton.writer import KernelWriter, size_text
from nemoc.codegen.views import merge_axes, quotient
from nemoc.ir.dims import Dim, dim, evaluate_dim, product, symbols_of
from nemoc.ir.dtypes import DType
from nemoc.ir.types import Value

Shape = tuple[Dim, ...]

_NARROW = 1 << 11
"""Strides below which a million rows are reached with 32 bits."""

_REACH = 1 << 31
"""What 32 bits cannot count to."""

_TOKENS = 1 << 13
"""Tokens of a step, or sequences of a batch, whose elements are reached with 32 bits if each has few enough."""

_ANY = DType.F32
"""An element type where none matters."""


@dataclass(frozen=True)
class Seen:
    """A value as rows of `width` elements."""

    value: Value
    width: int

    @classmethod
    def by_count(cls, value: Value, count: Dim) -> "Seen | None":
        """A value as so many rows; none if it has no such rows of a fixed width."""
        width = quotient(value.type.elements, count)
        if not isinstance(width, int):
            return None
        try:
            split_shape(value.shape, width)
        except RegionError:
            return None
        return cls(value, width)

    @property
    def count(self) -> Dim:
        """How many rows there are."""
        lead, _ = self.axes
        return product(lead)

    @property
    def axes(self) -> tuple[Shape, Shape]:
        """The value's axes: those that count rows and those within a row; an axis may be cut in two.

        Raises:
            RegionError: the value has no such rows.
        """
        return split_shape(self.value.shape, self.width)


def split_shape(shape: Shape, width: int) -> tuple[Shape, Shape]:
    """Axes whose last ones hold `width` elements: a shape in two parts, an axis cut in two where that is needed.

    Raises:
        RegionError: the shape has no rows of that width.
    """
    view = View(_ANY, shape, (0,) * len(shape))
    lead, row = split_view(view, width)
    return lead.shape, row.shape


def split_view(view: View, width: int) -> tuple[View, View]:
    """A tensor's axes in two parts, of which the last holds `width` elements.

    Raises:
        RegionError: the tensor has no rows of that width.
    """
    inner: Dim = 1
    cut = view.rank
    while inner != width:
        cut -= 1
        if cut < 0:
            raise RegionError(f"{list(view.shape)} has no rows of {width} elements")
        grown = dim(view.shape[cut] * inner)
        if isinstance(grown, int) and width % grown == 0:
            inner = grown
            continue
        part = width // inner if isinstance(inner, int) and width % inner == 0 else 0
        rest = quotient(view.shape[cut], part) if part else None
        if rest is None:
            raise RegionError(f"{list(view.shape)} has no rows of {width} elements")
        step = view.strides[cut]
        shape = (*view.shape[:cut], rest, part, *view.shape[cut + 1 :])
        strides = (*view.strides[:cut], dim(step * part), step, *view.strides[cut + 1 :])
        return split_view(View(view.dtype, shape, strides), width)
    lead = View(view.dtype, view.shape[:cut], view.strides[:cut])
    return lead, View(view.dtype, view.shape[cut:], view.strides[cut:])


@dataclass(frozen=True)
class Place:
    """A tile: which rows, and which elements of them.

    Attributes:
        row: row numbers, a tensor [rows, 1] or a number.
        column: element numbers, a tensor [1, columns] or a number; either may also be [rows, columns].
        rows, columns: the tile's size.
        mask: which columns exist, a tensor like `column`; empty for all.
        exists: which rows exist, for stores; empty for all. For loads rows are clamped to those that do.
    """

    row: str
    column: str
    rows: int
    columns: int
    mask: str = ""
    exists: str = ""


def map_index(writer: KernelWriter, index: str, full: Shape, own: Shape) -> str:
    """Where an element of a broadcast tensor comes from.

    Args:
        writer: the kernel.
        index: row-major numbers of elements of a tensor of shape `full`.
        full: a shape.
        own: the same number of axes, each of the same size or of size 1.

    Returns:
        Row-major numbers in a tensor of shape `own`.
    """
    if product(own) == 1:
        return "0"
    if own == full:
        return index
    return _strided(writer, index, full, _dense(own))


def offset(writer: KernelWriter, index: str, view: View) -> str:
    """Offsets, in elements, for row-major numbers of a tensor's elements."""
    (merged,) = merge_axes([view])
    return _strided(writer, index, merged.shape, merged.strides)


def _dense(own: Shape) -> Shape:
    """Strides of a dense tensor, 0 along axes of size 1."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(own):
        strides.append(0 if size == 1 else step)
        step = dim(step * size)
    return tuple(reversed(strides))


def _strided(writer: KernelWriter, index: str, shape: Shape, strides: Shape) -> str:
    """Σ index along each axis × its stride, neighbouring axes that allow it taken together."""
    if index == "0":
        return "0"
    (merged,) = merge_axes([View(_ANY, shape, strides)])
    terms: list[str] = []
    rest, step = index, _Step()
    axes = list(zip(merged.shape, merged.strides, strict=True))
    for number, (size, stride) in reversed(list(enumerate(axes))):
        if stride != 0:
            part = step.divided(writer, rest)
            if number:
                part = writer.let("i", f"{part} % {size_text(size)}")
            terms.append(
                part if stride == 1 else f"{wide(part, stride, size)} * {size_text(stride)}"
            )
        step = step.over(size)
    return writer.let("at", " + ".join(reversed(terms))) if terms else "0"


@dataclass(frozen=True)
class _Step:
    """How many elements one step along an axis skips."""

    size: Dim = 1

    def over(self, size: Dim) -> "_Step":
        return _Step(dim(self.size * size))

    def divided(self, writer: KernelWriter, index: str) -> str:
        return index if self.size == 1 else writer.let("i", f"{index} // {size_text(self.size)}")


def wide(index: str, stride: Dim, size: Dim) -> str:
    """An index below a size, as a factor of a product that may exceed 32 bits where sizes are large or unknown."""
    return f"tl.cast({index}, tl.int64)" if _reaches_far(stride, size) else index


def _reaches_far(stride: Dim, size: Dim) -> bool:
    """Whether 32 bits may be too few for offsets of that many steps; a cache has as many rows as anybody likes."""
    if not isinstance(stride, int) or stride >= _NARROW:
        return True
    if isinstance(size, int):
        return size * stride > _REACH
    each = evaluate_dim(size, dict.fromkeys(symbols_of(size), 1))
    return "C" in symbols_of(size) or each * stride * _TOKENS > _REACH


def pointer_to(writer: KernelWriter, arg: Arg, view: View, width: int, place: Place) -> str:
    """Pointers to a tensor's elements at a place, the tensor being seen as rows of `width` elements."""
    lead, row = split_view(view, width)
    terms = [offset(writer, place.row, lead), offset(writer, place.column, row)]
    text = " + ".join([writer.pointer(arg, view.dtype), *(t for t in terms if t != "0")])
    return writer.let("at", text)


def store_tile(writer: KernelWriter, pointer: str, tile: str, place: Place) -> None:
    """Store a tile where its place exists."""
    masks = " & ".join(m for m in (place.exists, place.mask) if m)
    writer.line(f"tl.store({pointer}, {tile}{f', mask={masks}' if masks else ''})")
