"""What an op is: a frozen dataclass whose annotated fields declare its operands and attributes.

A field annotated `Value`, `Value | None` or `tuple[Value, ...]` is an operand; every other field is an
attribute. The printer, the parser, equality, hashing and the rewriting facility all work from these declarations, so
an op is defined in one place: its fields, `infer`, `evaluate` and `cost`.
"""

import dataclasses
import functools
import operator
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.types import TensorType, Value

if TYPE_CHECKING:  # builders take ops
    from nemoc.ir.builder import Builder

Operand = Value | None | tuple[Value, ...]
"""What an operand field holds."""

BODY = "body"
"""The attribute of a region that holds its graph (`nemoc.ir.region`)."""


@dataclass(frozen=True)
class Env:
    """What evaluation knows besides the operands.

    Attributes:
        sizes: the integer behind each dimension symbol.
        float64: evaluate every floating-point value in float64, rounding nothing.
    """

    sizes: Mapping[str, int]
    float64: bool = False

    def torch(self, dtype: DType) -> torch.dtype:
        """The torch dtype that values of an element type have in this evaluation."""
        return torch.float64 if self.float64 and dtype.is_float else dtype.torch

    def shape(self, shape: tuple[Dim, ...]) -> list[int]:
        """A shape with its symbols replaced by integers."""
        return [evaluate_dim(d, self.sizes) for d in shape]


@dataclass(frozen=True)
class RowSlice:
    """How a range of a result's first axis comes from ranges of the operands' first axes.

    Attributes:
        op: what to evaluate on the slices; its attributes may be adapted to them.
        operands: for each of `op.operands()` the rows that it has to see, or none for all of it.
        skip: how many rows to drop from the front of what the op then gives; any behind the range
            are dropped too.
    """

    op: "Op"
    operands: tuple[range | None, ...]
    skip: int = 0


@dataclass(frozen=True)
class Op:
    """Base of all ops; see the module docstring for how fields are read."""

    is_view: ClassVar[bool] = False
    """Whether the result only re-describes the operand's elements (a strided view may serve)."""
    is_rowwise: ClassVar[bool] = False
    """Whether rows of the result come from the same rows of every operand; see `slice_rows`."""
    is_elementwise: ClassVar[bool] = False
    """Whether an element of the one result depends on the elements of the operands at its place alone, operands
    broadcast as in numpy: what can be computed wherever its operands are at hand."""
    is_unpacking: ClassVar[bool] = False
    """Whether it makes a packed parameter larger: if its result were stored, what packing saved would be lost."""
    updates: ClassVar[Mapping[int, str]] = {}
    """Results that are the next value of an operand, by its field: meant to be written where that one lies."""

    def __post_init__(self) -> None:
        """Make numbers what their fields declare: `Full(1, dtype)` and `Full(1.0, dtype)` are one op with one text.

        Raises:
            IRError: an attribute is no number of the declared kind.
        """
        for name, convert in _declared(type(self)).numbers.items():
            try:
                number = convert(getattr(self, name))
            except (TypeError, ValueError, OverflowError) as error:
                raise IRError(f"{self.mnemonic()}: {name} does not fit: {error}") from None
            object.__setattr__(self, name, number)

    def infer(self) -> TensorType | tuple[TensorType, ...]:
        """The result types. This is also the op's check.

        Raises:
            IRError: operands or attributes do not fit together.
        """
        raise NotImplementedError

    def evaluate(self, *args: Any) -> Any:
        """The op's meaning, in eager torch: `evaluate(env, *operands)`.

        Operands arrive as tensors in field order; a missing optional one as None, a variadic one as a
        tuple. Returns a tensor, or a tuple of tensors for several results. Never changes an operand.
        """
        raise NotImplementedError

    def expand(self, build: "Builder") -> "Value | tuple[Value, ...] | None":
        """The same results from simpler ops, appended through `build`; none if there is nothing simpler.

        What lets a new op be compiled, and fused, by backends that have never heard of it. It has to mean what
        `evaluate` means, up to rounding.
        """
        return None

    def flops(self) -> Dim:
        """Floating-point operations; 0 for data movement."""
        return 0

    def reads(self) -> tuple[Dim, ...]:
        """Bytes that one execution has to read of each operand, in the order of `operands()`.

        All of it, unless the op says otherwise: one that picks rows reads no others.
        """
        return tuple(0 if self.is_view else v.type.bytes for v in self.operands())

    def writes(self) -> tuple[Dim, ...]:
        """Bytes that one execution has to write of each result: all, unless it updates an operand in place."""
        return tuple(0 if self.is_view else t.bytes for t in self.result_types())

    def cost(self) -> Cost:
        """Arithmetic and traffic of one execution."""
        return Cost(self.flops(), sum(self.reads()), sum(self.writes()))

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        """How rows `start` to `stop` of the result come from rows of the operands; none: not separable.

        Asked of ops with one result of fixed shape and rank ≥ 1, so that weights larger than memory fold in slices
        (`nemoc.ir.folding`). An op may answer only if the slices have the same bits as the whole: functions
        whose vectorised form rounds differently at a tensor's end (exp and its like) are not separable.
        """
        if not self.is_rowwise:
            return None
        return RowSlice(self, (range(start, stop),) * len(self.operands()))

    @classmethod
    def mnemonic(cls) -> str:
        """The op's name in IR text: its class name in snake_case."""
        return _snake_case(cls.__name__)

    def result_types(self) -> tuple[TensorType, ...]:
        """`infer`'s answer as a tuple."""
        return self._result_types

    @functools.cached_property
    def _result_types(self) -> tuple[TensorType, ...]:
        types = self.infer()
        return types if isinstance(types, tuple) else (types,)

    def operands(self) -> tuple[Value, ...]:
        """All operand values in field order, absent optional ones left out."""
        return self._operands

    @functools.cached_property
    def _operands(self) -> tuple[Value, ...]:
        return tuple(_flatten(getattr(self, f) for f in operand_fields(type(self))))

    @functools.cached_property
    def distinct_operands(self) -> tuple[Value, ...]:
        """The operand values, each once."""
        return tuple(dict.fromkeys(self._operands))

    def map_operands(self, replace: Callable[[Value], Value]) -> Self:
        """The same op on other operands; returns itself when none changes."""
        changes: dict[str, Operand] = {}
        for field in operand_fields(type(self)):
            old: Operand = getattr(self, field)
            new: Operand
            if isinstance(old, tuple):
                new = tuple(replace(v) for v in old)
                changed = any(a is not b for a, b in zip(old, new, strict=True))
            else:
                new = None if old is None else replace(old)
                changed = new is not old
            if changed:
                changes[field] = new
        return dataclasses.replace(self, **changes) if changes else self

    def attributes(self) -> dict[str, Any]:
        """Attribute fields and their values, in declaration order."""
        return {f: getattr(self, f) for f in attribute_fields(type(self))}


@functools.cache
def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _flatten(items: Iterator[Operand]) -> Iterator[Value]:
    for item in items:
        if isinstance(item, tuple):
            yield from item
        elif item is not None:
            yield item


@dataclass(frozen=True)
class _Declaration:
    """What an op class declares."""

    types: dict[str, Any]
    operands: tuple[str, ...]
    attributes: tuple[str, ...]
    defaults: dict[str, Any]
    numbers: dict[str, Callable[[Any], Any]]


_OPERAND_TYPES = (Value, Value | None, tuple[Value, ...])

_NUMBERS: dict[Any, Callable[[Any], Any]] = {
    float: float,
    int: operator.index,
    tuple[int, ...]: lambda items: tuple(map(operator.index, items)),
    tuple[float, ...]: lambda items: tuple(map(float, items)),
}
"""The conversions of attributes that are numbers, by declared type."""


@functools.cache
def _declaration(op: Any) -> _Declaration:
    hints = typing.get_type_hints(op)
    fields = dataclasses.fields(op)
    types = {f.name: hints[f.name] for f in fields}
    attributes = tuple(name for name, hint in types.items() if hint not in _OPERAND_TYPES)
    return _Declaration(
        types,
        tuple(name for name, hint in types.items() if hint in _OPERAND_TYPES),
        attributes,
        {
            f.name: f.default
            for f in fields
            if f.name in attributes and f.default is not dataclasses.MISSING
        },
        {name: _NUMBERS[hint] for name, hint in types.items() if hint in _NUMBERS},
    )


def _declared(op: type[Op]) -> _Declaration:
    key: Any = op  # mypy does not see that classes are hashable
    return _declaration(key)


def field_types(op: type[Op]) -> dict[str, Any]:
    """Every field of an op class with its resolved annotation, in declaration order."""
    return _declared(op).types


def operand_fields(op: type[Op]) -> tuple[str, ...]:
    """Names of the operand fields of an op class."""
    return _declared(op).operands


def attribute_fields(op: type[Op]) -> tuple[str, ...]:
    """Names of the attribute fields of an op class."""
    return _declared(op).attributes


def attribute_defaults(op: type[Op]) -> dict[str, Any]:
    """Attribute fields that may be left out, with their default values."""
    return _declared(op).defaults
