"""What each element-wise op does to tiles: expressions of Triton."""

from collections.abc import Callable, Sequence
from typing import Any

from nemoc.codegen.plan import RegionError
from nemoc.codegen.triton.writer import TYPE_NAMES, number_text
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import elementwise as ops

Formula = Callable[[Any, Sequence[str]], str]
"""`(op, operands by name) -> expression`."""


def _cast(op: ops.Cast, x: Sequence[str]) -> str:
    if op.x.dtype == op.dtype:
        return x[0]
    if op.x.dtype == DType.F8E4M3:
        wide = f"from_e4m3({x[0]})"
        return wide if op.dtype == DType.F32 else f"{wide}.to({TYPE_NAMES[op.dtype]})"
    if op.dtype == DType.F8E4M3:
        raise RegionError("rounding to f8e4m3 has no kernel")
    if op.dtype == DType.BOOL:
        return f"{x[0]} != 0"
    return f"{x[0]}.to({TYPE_NAMES[op.dtype]})"


FORMULAS: dict[type[Op], Formula] = {
    ops.Cast: _cast,
    ops.Exp: lambda _, x: f"tl.exp({x[0]})",
    ops.Relu: lambda _, x: f"relu({x[0]})",
    ops.Square: lambda _, x: f"{x[0]} * {x[0]}",
    ops.Sigmoid: lambda _, x: f"sigmoid({x[0]})",
    ops.Silu: lambda _, x: f"silu({x[0]})",
    ops.Tanh: lambda _, x: f"tanh({x[0]})",
    ops.Gelu: lambda op, x: f"gelu_tanh({x[0]})" if op.tanh else f"gelu({x[0]})",
    ops.Softplus: lambda _, x: f"softplus({x[0]})",
    ops.Scale: lambda op, x: f"{x[0]} * {number_text(op.factor)}",
    ops.Shift: lambda op, x: f"{x[0]} + {number_text(op.amount)}",
    ops.Add: lambda _, x: f"{x[0]} + {x[1]}",
    ops.Sub: lambda _, x: f"{x[0]} - {x[1]}",
    ops.Mul: lambda _, x: f"{x[0]} * {x[1]}",
    ops.Div: lambda _, x: f"{x[0]} / {x[1]}",
    ops.FloorDiv: lambda op, x: f"floor_div({x[0]}, {op.divisor})",
}
"""What each op does to its operands' tiles."""
