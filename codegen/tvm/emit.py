"""The emitters of the CPU backend: for each op class, the function that plans its kernels."""

from collections.abc import Callable, Mapping

from nemoc.codegen.expand import expand_ops
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.regions import alone
from nemoc.codegen.tvm.attention import emit_attention
from nemoc.codegen.tvm.cache import emit_cache_write
from nemoc.codegen.tvm.conv import emit_causal_conv
from nemoc.codegen.tvm.elementwise import FORMULAS, emit_elementwise
from nemoc.codegen.tvm.fused import emit_fused
from nemoc.codegen.tvm.gather import emit_take_along, emit_take_last, emit_take_rows
from nemoc.codegen.tvm.linear import emit_linear
from nemoc.codegen.tvm.norm import emit_rms_norm
from nemoc.codegen.tvm.nvfp4 import emit_dequantize_nvfp4
from nemoc.codegen.tvm.routing import emit_group_by, emit_group_limit, emit_top_k
from nemoc.codegen.tvm.rows import emit_rows
from nemoc.codegen.tvm.scan import emit_ssd_scan
from nemoc.codegen.tvm.shape import emit_concat, emit_full, emit_sum, emit_view
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.update import emit_ssd_update
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops.attention import Attention, CacheWrite
from nemoc.ir.ops.fp8 import Fp8Scale, QuantizeFp8
from nemoc.ir.ops.int8 import RoundToInt8
from nemoc.ir.ops.linear import GroupedLinear, Linear
from nemoc.ir.ops.mamba import CausalConv, SsdScan, SsdUpdate
from nemoc.ir.ops.norm import RmsNorm
from nemoc.ir.ops.nvfp4 import (
    DequantizeNvfp4,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    QuantizeNvfp4,
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
from nemoc.ir.region import Fused

Emitter = Callable[[Site, CpuTarget], Plan]

EMITTERS: dict[type[Op], Emitter] = {
    **dict.fromkeys(FORMULAS, emit_elementwise),
    Full: emit_full,
    Reshape: emit_view,
    Permute: emit_view,
    Slice: emit_view,
    Concat: emit_concat,
    Sum: emit_sum,
    TakeRows: emit_take_rows,
    TakeAlong: emit_take_along,
    TakeLast: emit_take_last,
    RmsNorm: emit_rms_norm,
    RoundToInt8: lambda site, target: emit_rows(alone(site), target),
    GroupLimit: emit_group_limit,
    TopK: emit_top_k,
    GroupBy: emit_group_by,
    Linear: emit_linear,
    GroupedLinear: emit_linear,
    DequantizeNvfp4: emit_dequantize_nvfp4,
    CausalConv: emit_causal_conv,
    SsdScan: emit_ssd_scan,
    SsdUpdate: emit_ssd_update,
    CacheWrite: emit_cache_write,
    Attention: emit_attention,
    Fused: emit_fused,
}
"""Every op that the CPU backend has kernels for."""

_ROUNDS_ACTIVATIONS = (
    Fp8Scale,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    QuantizeFp8,
    QuantizeNvfp4,
)
"""What weights go through when an artifact is built, but activations in every step."""


def emit(site: Site, target: CpuTarget) -> Plan:
    """The plan of an op on tensors of given layouts.

    Raises:
        NemocError: the backend has no kernel for the op, or none for these element types.
        LayoutError: none for these views.
        RegionError: none for a region as a whole.
    """
    emitter = EMITTERS.get(type(site.op))
    if emitter is None:
        if isinstance(site.op, _ROUNDS_ACTIVATIONS):
            raise NemocError(
                f"the cpu target has no kernel for {site.op.mnemonic()}: of weights the pass fold-constants does it, "
                "and activations in FP8 or NVFP4 are for GPUs and the reference target (in int8, nvfp4-w4a8, for CPUs)"
            )
        known = ", ".join(sorted(op.mnemonic() for op in EMITTERS))
        raise NemocError(f"the cpu target has no kernel for {site.op.mnemonic()}; it has {known}")
    return emitter(site, target)


def expanded(graphs: Mapping[str, Graph]) -> dict[str, Graph]:
    """Graphs in terms of the ops that have emitters, as far as ops can be expanded."""
    return {name: expand_ops(graph, EMITTERS) for name, graph in graphs.items()}
