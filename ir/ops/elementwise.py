"""Element-wise ops.

Arithmetic is defined on f32 and f64 only (and sums on integers): a narrower float has to be widened by an explicit
`cast`, and rounding back is another, so that every rounding is visible in the graph. Binary operands
broadcast as in numpy.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import torch
import torch.nn.functional as F

from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError, expect
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.types import TensorType, Value

ARITHMETIC = (DType.F32, DType.F64)


@dataclass(frozen=True)
class Cast(Op):
    """Convert to another element type, rounding to nearest even where it is narrower."""

    is_rowwise: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    x: Value
    dtype: DType

    def infer(self) -> TensorType:
        return self.x.type.with_dtype(self.dtype)

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.to(env.torch(self.dtype))


@dataclass(frozen=True)
class Unary(Op):
    """Base of the functions of one element."""

    is_elementwise: ClassVar[bool] = True

    x: Value

    def infer(self) -> TensorType:
        expect(
            self.x.dtype in ARITHMETIC,
            f"{self.mnemonic()}: x is {self.x.dtype}, expected f32 or f64 (cast it first)",
        )
        return self.x.type

    def flops(self) -> Dim:
        return self.x.type.elements


@dataclass(frozen=True)
class Exp(Unary):
    """eˣ."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


@dataclass(frozen=True)
class Relu(Unary):
    """max(x, 0)."""

    is_rowwise: ClassVar[bool] = True

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


@dataclass(frozen=True)
class Square(Unary):
    """x²."""

    is_rowwise: ClassVar[bool] = True

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x * x


@dataclass(frozen=True)
class Sigmoid(Unary):
    """1 / (1 + e⁻ˣ)."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()


@dataclass(frozen=True)
class Silu(Unary):
    """x · sigmoid(x)."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


@dataclass(frozen=True)
class Tanh(Unary):
    """tanh x."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


@dataclass(frozen=True)
class Gelu(Unary):
    """x · Φ(x): with the error function, or its tanh approximation when `tanh` is set."""

    tanh: bool = False

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh" if self.tanh else "none")


@dataclass(frozen=True)
class Softplus(Unary):
    """ln(1 + eˣ), computed as max(x, 0) + log1p(e⁻|ˣ|), which neither overflows nor truncates."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.relu() + torch.log1p(torch.exp(-x.abs()))


@dataclass(frozen=True)
class Scale(Unary):
    """x · factor."""

    is_rowwise: ClassVar[bool] = True

    factor: float

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@dataclass(frozen=True)
class Shift(Unary):
    """x + amount."""

    is_rowwise: ClassVar[bool] = True

    amount: float

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x + self.amount


def broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...], what: str) -> tuple[Dim, ...]:
    """The shape that two shapes broadcast to, as in numpy.

    Raises:
        IRError: they do not broadcast; `what` names the op.
    """
    out: list[Dim] = []
    for m, n in zip_longest(reversed(a), reversed(b), fillvalue=1):
        if not (m == n or m == 1 or n == 1):
            raise IRError(f"{what}: shapes {list(a)} and {list(b)} do not broadcast")
        out.append(n if m == 1 else m)
    return tuple(reversed(out))


@dataclass(frozen=True)
class Binary(Op):
    """Base of the functions of two elements; operands share their element type and broadcast."""

    is_elementwise: ClassVar[bool] = True

    a: Value
    b: Value

    def infer(self) -> TensorType:
        name = self.mnemonic()
        expect(self.a.dtype == self.b.dtype, f"{name}: a is {self.a.dtype} but b is {self.b.dtype}")
        expect(
            self.a.dtype in (*ARITHMETIC, DType.I32, DType.I64),
            f"{name}: operands are {self.a.dtype}, expected f32, f64, i32 or i64 (cast them first)",
        )
        return TensorType(self.a.dtype, broadcast(self.a.shape, self.b.shape, name))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        shape = self.infer().shape

        def rows(operand: Value) -> range | None:
            is_broadcast = operand.type.rank < len(shape) or operand.shape[0] != shape[0]
            return None if is_broadcast else range(start, stop)

        return RowSlice(self, (rows(self.a), rows(self.b)))

    def flops(self) -> Dim:
        return self.infer().elements if self.a.dtype.is_float else 0


@dataclass(frozen=True)
class Add(Binary):
    """a + b."""

    def evaluate(self, env: Env, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


@dataclass(frozen=True)
class Sub(Binary):
    """a − b."""

    def evaluate(self, env: Env, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b


@dataclass(frozen=True)
class Mul(Binary):
    """a · b."""

    def evaluate(self, env: Env, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


@dataclass(frozen=True)
class Div(Binary):
    """a / b; floating point only."""

    def infer(self) -> TensorType:
        expect(self.a.dtype in ARITHMETIC, f"div: operands are {self.a.dtype}, expected f32 or f64")
        return super().infer()

    def evaluate(self, env: Env, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a / b


@dataclass(frozen=True)
class FloorDiv(Op):
    """⌊x / divisor⌋ of integers i32 or i64, divisor positive; what turns a slot number into its row's."""

    is_rowwise: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    x: Value
    divisor: int

    def infer(self) -> TensorType:
        expect(
            self.x.dtype in (DType.I32, DType.I64),
            f"floor_div: x is {self.x.dtype}, expected i32 or i64",
        )
        expect(self.divisor >= 1, f"floor_div: divisor is {self.divisor}, expected at least 1")
        return self.x.type

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return torch.div(x, self.divisor, rounding_mode="floor")
