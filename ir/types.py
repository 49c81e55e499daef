"""Tensor types and SSA values."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from nemoc.ir.dims import Dim, dims, format_dim, product, substitute_dim, symbols_of
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect

NAME = re.compile(r"[A-Za-z0-9_.\-]+")
"""What values and graphs may be called: what their text can say."""


@dataclass(frozen=True)
class TensorType:
    """An element type and a shape, whose dimensions may be symbolic."""

    dtype: DType
    shape: tuple[Dim, ...]

    @classmethod
    def of(cls, dtype: DType, shape: Iterable[Dim]) -> "TensorType":
        """A type with its dimensions in normal form.

        Raises:
            IRError: a dimension is negative.
        """
        normal = dims(shape)
        for size in normal:
            if isinstance(size, int):
                expect(size >= 0, f"{size} is no size of a tensor")
        return cls(dtype, normal)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def bytes(self) -> Dim:
        """Size of a dense tensor of this type."""
        return product((self.elements, self.dtype.bytes))

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Names of the symbols in the shape."""
        return frozenset().union(*(symbols_of(d) for d in self.shape))

    def with_dtype(self, dtype: DType) -> "TensorType":
        """The same shape with another element type."""
        return TensorType(dtype, self.shape)

    def substitute(self, mapping: Mapping[str, Dim]) -> "TensorType":
        """The type with dimension symbols replaced."""
        return TensorType(self.dtype, tuple(substitute_dim(d, mapping) for d in self.shape))

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:  # which messages are made of whether or not anything is wrong
        return f"{self.dtype}[{', '.join(format_dim(d) for d in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Value:
    """One SSA value; two values are the same only if they are the same object.

    Attributes:
        name: its name in text, which matches `NAME` and is unique within its graph.
        type: its tensor type.
        bound: for integer graph inputs and states, the exclusive upper bound of the elements
            (the lower bound is 0); what sample inputs are drawn from and user input is held to.
    """

    name: str
    type: TensorType
    bound: Dim | None = None

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the value's type."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """The element type of the value's type."""
        return self.type.dtype

    def __repr__(self) -> str:
        return f"%{self.name}"
