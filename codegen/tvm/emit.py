"""The emitters of the CPU backend: for each op class, the function that plans its kernels."""

from collections.abc import Callable

from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.tvm.elementwise import FORMULAS, emit_elementwise
from nemoc.codegen.tvm.linear import emit_grouped_linear, emit_linear
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.errors import NemocError
from nemoc.ir.op import Op
from nemoc.ir.ops.linear import GroupedLinear, Linear

Emitter = Callable[[Site, CpuTarget], Plan]

EMITTERS: dict[type[Op], Emitter] = {
    **dict.fromkeys(FORMULAS, emit_elementwise),
    Linear: emit_linear,
    GroupedLinear: emit_grouped_linear,
}
"""Every op that the CPU backend has kernels for."""


def emit(site: Site, target: CpuTarget) -> Plan:
    """The plan of an op on tensors of given layouts.

    Raises:
        NemocError: the backend has no kernel for the op, or none for these element types.
    """
    emitter = EMITTERS.get(type(site.op))
    if emitter is None:
        known = ", ".join(sorted(op.mnemonic() for op in EMITTERS))
        raise NemocError(f"the cpu target has no kernel for {site.op.mnemonic()}; it has {known}")
    return emitter(site, target)
