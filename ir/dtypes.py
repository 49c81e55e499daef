"""Element types: their names in IR text, their sizes and their torch counterparts."""

import enum
from typing import Self

import torch

from nemoc.ir.errors import IRError


class DType(enum.Enum):
    """An element type; the value is its name in IR text."""

    F64 = "f64"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    F8E4M3 = "f8e4m3"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The type of that name.

        Raises:
            IRError: no type has that name.
        """
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(t.value for t in cls)
            raise IRError(f"unknown element type {text!r}, expected one of {known}") from None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "DType":
        """The element type of a torch tensor.

        Raises:
            IRError: the IR has no such element type.
        """
        for dtype, torch_dtype in _TORCH.items():
            if torch_dtype == tensor.dtype:
                return dtype
        raise IRError(f"tensors of {tensor.dtype} have no IR element type")

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of the same width and meaning."""
        return _TORCH[self]

    @property
    def bytes(self) -> int:
        """Bytes per element in memory."""
        return _TORCH[self].itemsize

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point type."""
        return _TORCH[self].is_floating_point

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return f"DType.{self.name}"


_TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}
