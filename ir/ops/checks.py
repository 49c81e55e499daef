"""Checks that ops share; each raises `IRError`, in type inference naming op, operand, found and expected."""

import torch

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


def expect_finite(op: Op, x: torch.Tensor) -> torch.Tensor:
    """The elements of w are numbers; they are given back."""
    extremes = torch.stack(x.aminmax())  # both are NaN if an element is
    expect(bool(extremes.isfinite().all()), f"{op.mnemonic()}: w has NaN or infinite elements")
    return x


def matrix_amax(op: Op, w: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each matrix, [..., N, K] -> f32 [...]; its elements are numbers."""
    matrices = w.reshape(-1, w.shape[-2] * w.shape[-1])
    if matrices.shape[1] >= _LONG:
        extremes = torch.stack([torch.stack(matrix.aminmax()) for matrix in matrices], -1)
    else:
        extremes = torch.stack(matrices.aminmax(dim=-1))
    amax = extremes.abs().amax(0).to(torch.float32)
    return expect_finite(op, amax).reshape(w.shape[:-2])


_LONG = 1 << 14
"""Elements from which on a reduction of everything is much faster than one along an axis."""
