"""Checks that ops share in their type inference; each raises `IRError` naming op, operand, found and expected."""

from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Op
from nemoc.ir.types import TensorType, Value


def expect_shapes(op: Op, dtype: DType, **shapes: tuple[Dim, ...]) -> None:
    """Operands by name have that element type and those shapes, in normal form, or are left out."""
    for operand, shape in shapes.items():
        value: Value | None = getattr(op, operand)
        expected = TensorType(dtype, shape)
        if value is not None:
            expect(
                value.type == expected,
                f"{op.mnemonic()}: {operand} is {value.type}, expected {expected}",
            )


def expect_form(op: Op, operand: str, dtype: DType, rank: int) -> None:
    """An operand has that element type and that many axes."""
    value: Value = getattr(op, operand)
    expect(
        value.dtype is dtype and value.type.rank == rank,
        f"{op.mnemonic()}: {operand} is {value.type}, expected {dtype} of rank {rank}",
    )
