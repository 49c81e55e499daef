"""The ops of the IR, by theme, and the registry that gives text its meaning."""

from collections.abc import Iterable

from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops.attention import Attention, CacheWrite
from nemoc.ir.ops.elementwise import (
    Add,
    Binary,
    Cast,
    Div,
    Exp,
    FloorDiv,
    Gelu,
    Mul,
    Relu,
    Scale,
    Shift,
    Sigmoid,
    Silu,
    Softplus,
    Square,
    Sub,
    Tanh,
    Unary,
)
from nemoc.ir.ops.fp8 import Fp8Scale, QuantizeFp8
from nemoc.ir.ops.int8 import RoundToInt8
from nemoc.ir.ops.linear import GroupedLinear, Interleave, Linear
from nemoc.ir.ops.mamba import CausalConv, SsdScan, SsdUpdate
from nemoc.ir.ops.norm import RmsNorm
from nemoc.ir.ops.nvfp4 import (
    DequantizeNvfp4,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    QuantizeNvfp4,
    SpreadCodes,
    SwizzleScales,
)
from nemoc.ir.ops.routing import GroupBy, GroupLimit, TopK
from nemoc.ir.ops.shape import (
    Concat,
    Full,
    Permute,
    Reshape,
    Slice,
    Sum,
    TakeAlong,
    TakeLast,
    TakeRows,
)
from nemoc.ir.region import Folded, Fused, Region

OPS: tuple[type[Op], ...] = (
    Cast,
    Exp,
    Relu,
    Square,
    Sigmoid,
    Silu,
    Tanh,
    Gelu,
    Softplus,
    Scale,
    Shift,
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Full,
    Reshape,
    Permute,
    Slice,
    Concat,
    Sum,
    TakeRows,
    TakeAlong,
    TakeLast,
    Linear,
    GroupedLinear,
    Interleave,
    RoundToInt8,
    Nvfp4GlobalScale,
    Nvfp4BlockScales,
    QuantizeNvfp4,
    DequantizeNvfp4,
    Nvfp4ToFp8,
    SpreadCodes,
    SwizzleScales,
    Fp8Scale,
    QuantizeFp8,
    RmsNorm,
    GroupLimit,
    TopK,
    GroupBy,
    CausalConv,
    SsdScan,
    SsdUpdate,
    CacheWrite,
    Attention,
    Folded,
    Fused,
)
"""Every op of the IR. Ops of a user's own are handed to `parse` beside these."""


def by_mnemonic(extra: tuple[type[Op], ...] = ()) -> dict[str, type[Op]]:
    """Op classes by their name in text.

    Raises:
        IRError: two classes have one name.
    """
    table: dict[str, type[Op]] = {}
    for op in (*OPS, *extra):
        if table.setdefault(op.mnemonic(), op) is not op:
            raise IRError(f"two ops are called {op.mnemonic()}")
    return table


def own_ops(graphs: Iterable[Graph]) -> tuple[type[Op], ...]:
    """The op classes in graphs, and in regions in them, that are a user's own."""
    found: dict[type[Op], None] = {}
    for graph in graphs:
        for node in graph.nodes:
            inside = own_ops([node.op.body]) if isinstance(node.op, Region) else ()
            own = () if type(node.op) in OPS else (type(node.op),)
            found |= dict.fromkeys((*own, *inside))
    return tuple(found)


__all__ = [
    "OPS",
    "Add",
    "Attention",
    "Binary",
    "CacheWrite",
    "Cast",
    "CausalConv",
    "Concat",
    "DequantizeNvfp4",
    "Div",
    "Exp",
    "FloorDiv",
    "Folded",
    "Fp8Scale",
    "Full",
    "Fused",
    "Gelu",
    "GroupBy",
    "GroupLimit",
    "GroupedLinear",
    "Interleave",
    "Linear",
    "Mul",
    "Nvfp4BlockScales",
    "Nvfp4GlobalScale",
    "Nvfp4ToFp8",
    "Permute",
    "QuantizeFp8",
    "QuantizeNvfp4",
    "Region",
    "Relu",
    "Reshape",
    "RmsNorm",
    "RoundToInt8",
    "Scale",
    "Shift",
    "Sigmoid",
    "Silu",
    "Slice",
    "Softplus",
    "SpreadCodes",
    "Square",
    "SsdScan",
    "SsdUpdate",
    "Sub",
    "Sum",
    "SwizzleScales",
    "TakeAlong",
    "TakeLast",
    "TakeRows",
    "Tanh",
    "TopK",
    "Unary",
    "by_mnemonic",
]
