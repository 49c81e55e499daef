"""Regions by their anchors: the heaviest op of a body decides which skeletons may carry it out.

The rest of the body becomes what the skeleton does before and behind its anchor. Nothing here or in the skeletons goes
by a region's `kind`.
"""

from collections.abc import Callable

from nemoc.codegen.plan import Plan, RegionError, Site
from nemoc.codegen.regions import body_of
from nemoc.codegen.tvm.conv_scan import emit_conv_scan
from nemoc.codegen.tvm.linear_region import emit_linear_region
from nemoc.codegen.tvm.router import emit_router
from nemoc.codegen.tvm.rows import emit_rows
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.op import Op
from nemoc.ir.ops import GroupedLinear, Linear, SsdScan, SsdUpdate

Skeleton = Callable[[Site, CpuTarget], Plan]

_SKELETONS: tuple[tuple[tuple[type[Op], ...], tuple[Skeleton, ...]], ...] = (
    ((SsdScan, SsdUpdate), (emit_conv_scan,)),
    ((Linear, GroupedLinear), (emit_linear_region, emit_router)),
)
"""Anchors, heaviest first, and the skeletons around them in the order in which they are tried."""


def emit_fused(site: Site, target: CpuTarget) -> Plan:
    """The plan of a region from the first skeleton that takes it.

    Raises:
        RegionError: none does; it has the reason of each.
        LayoutError: an operand's layout is in the way.
    """
    reasons = []
    for skeleton in _skeletons({type(node.op) for node in body_of(site).nodes}):
        try:
            return skeleton(site, target)
        except RegionError as error:
            reasons.append(str(error))
            site.choices.forget()
    raise RegionError("; ".join(reasons))


def _skeletons(ops: set[type[Op]]) -> tuple[Skeleton, ...]:
    for anchors, skeletons in _SKELETONS:
        if not ops.isdisjoint(anchors):
            return skeletons
    return (emit_rows,)
