"""The emitters of the GPU backend: for each op class, the function that plans its kernels."""

from collections.abc import Callable, Mapping

from nemoc.codegen.expand import expand_ops
from nemoc.codegen.plan import Plan, RegionError, Site
from nemoc.codegen.regions import body_of
from nemoc.codegen.triton.attention import emit_attention
from nemoc.codegen.triton.conv import emit_causal_conv
from nemoc.codegen.triton.conv_scan import emit_conv_scan
from nemoc.codegen.triton.conv_update import emit_conv_update
from nemoc.codegen.triton.divide import divide
from nemoc.codegen.triton.formulas import FORMULAS
from nemoc.codegen.triton.products import emit_products
from nemoc.codegen.triton.rows import emit_rows
from nemoc.codegen.triton.sorting import emit_sorting
from nemoc.codegen.triton.target import GpuTarget
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    Attention,
    CacheWrite,
    CausalConv,
    Concat,
    DequantizeNvfp4,
    Fp8Scale,
    Full,
    GroupBy,
    GroupedLinear,
    GroupLimit,
    Linear,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    Permute,
    QuantizeFp8,
    QuantizeNvfp4,
    Reshape,
    RmsNorm,
    Slice,
    SsdScan,
    SsdUpdate,
    Sum,
    TakeAlong,
    TakeLast,
    TakeRows,
    TopK,
)
from nemoc.ir.region import Fused

Emitter = Callable[[Site, GpuTarget], Plan]

EMITTERS: dict[type[Op], Emitter] = {
    **dict.fromkeys(FORMULAS, emit_rows),
    **dict.fromkeys((Full, Reshape, Permute, Slice, Concat, Sum), emit_rows),
    **dict.fromkeys((TakeRows, TakeAlong, TakeLast, RmsNorm), emit_rows),
    **dict.fromkeys((GroupLimit, TopK, CacheWrite, DequantizeNvfp4), emit_rows),
    **dict.fromkeys((Nvfp4GlobalScale, Nvfp4BlockScales, QuantizeNvfp4), emit_rows),
    **dict.fromkeys((Fp8Scale, QuantizeFp8, Nvfp4ToFp8), emit_rows),
    Linear: emit_products,
    GroupedLinear: emit_products,
    GroupBy: emit_sorting,
    Attention: emit_attention,
    CausalConv: emit_causal_conv,
    SsdScan: emit_conv_scan,
    SsdUpdate: emit_conv_update,
}
"""The emitters of single ops, and of regions that such an op is the heaviest of."""


def emit(site: Site, target: GpuTarget) -> Plan:
    """The plan of an op on tensors of given layouts.

    Raises:
        NemocError: the backend has no kernel for the op, or none for these element types.
        LayoutError: none for these views.
        RegionError: none for a region as a whole.
    """
    site.choices.forget()  # what was asked for another target, whose defaults are others
    op = site.op
    if isinstance(op, Fused):
        return _anchor(body_of(site))(site, target)
    if type(op) not in EMITTERS:
        known = ", ".join(sorted(op.mnemonic() for op in EMITTERS))
        raise NemocError(f"GPU targets have no kernel for {op.mnemonic()}; they have {known}")
    try:
        return EMITTERS[type(op)](site, target)
    except RegionError as error:
        raise NemocError(f"GPU targets have no kernel for this {op.mnemonic()}: {error}") from None


def _anchor(body: Graph) -> Emitter:
    """The emitter of a region's heaviest op."""
    found = {EMITTERS[type(node.op)] for node in body.nodes if type(node.op) in EMITTERS}
    for emitter in (
        emit_products,
        emit_sorting,
        emit_attention,
        emit_conv_scan,
        emit_conv_update,
        emit_causal_conv,
    ):
        if emitter in found:
            return emitter
    return emit_rows


def expanded(graphs: Mapping[str, Graph]) -> dict[str, Graph]:
    """Graphs in terms of the ops that have emitters, as far as ops expand, and of regions that one launch can do."""
    return {name: divide(expand_ops(graph, EMITTERS)) for name, graph in graphs.items()}
