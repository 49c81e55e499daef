"""The mixer of a Mamba-2 layer as one region."""

from dataclasses import dataclass

from nemoc.ir.dims import Dim, dim
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import CausalConv, RmsNorm, SsdScan, SsdUpdate
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.growth import Facts, Growth, elements, is_elementwise, make_region


@dataclass(frozen=True)
class FuseConvScan(Pass):
    """Fuse a state-space recurrence with the convolution before it and the gate and norm behind it.

    From the projection's output to the recurrence's: what the convolution makes of x, B and C, and the step sizes,
    stay inside, so that they never reach memory. The gate costs nothing behind the recurrence. The norm
    comes along (`norm`) if the states of the heads in one of its groups fit the target's on-chip memory, since
    whoever computes a group then has all of it; elsewhere it is left to the next product.

    Before::

        %convolved, %conv.next = causal_conv(%xbc, %w, %bias, %conv, %valid) : f32[B, L, 64], f32[B, 3, 64]
        %mixed = silu(%convolved) : f32[B, L, 64]
        %x = slice(%mixed) {axis=2, start=0, stop=32} : f32[B, L, 32]
        ...
        %y, %ssm.next = ssd_scan(%x.heads, %dt.step, %a, %b.groups, %c.groups, %d, %ssm, %valid) : ...
        %y.flat = reshape(%y) {shape=[B, L, 32]} : f32[B, L, 32]
        %gate = silu(%z) : f32[B, L, 32]
        %gated = mul(%y.flat, %gate) : f32[B, L, 32]

    After::

        %conv.next, %ssm.next, %gated = fused([%xbc, %w, ...]) {kind="conv-scan"} : ... {
          ...
        }
    """

    norm: bool = True

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        facts = Facts.of(graph)
        for node in graph.nodes:
            if isinstance(node.op, SsdScan | SsdUpdate):
                graph = self._fuse(graph, facts, node, ctx)
        return graph

    def _fuse(self, graph: Graph, facts: Facts, scan: Node, ctx: PassContext) -> Graph:
        op = scan.op
        assert isinstance(op, SsdScan | SsdUpdate)
        growth = Growth(graph, facts, [scan])
        conv = self._convolution(growth, op)

        def inside(node: Node) -> bool:
            return is_elementwise(node) and not growth.is_epilogue(node)

        for value in op.operands():
            growth.absorb_producers(
                value, lambda n: n is conv or inside(n), shared=lambda n: n is conv
            )
        if conv is not None and conv not in growth:
            site = f"{graph.name}/%{conv.results[0].name}"
            reason = "what it leads to is read by others than the recurrence"
            ctx.refuses(
                Remark(self.name, site, f"causal_conv stays outside of conv-scan: {reason}")
            )
        size = elements(scan.results[0])

        def behind(node: Node) -> bool:
            if elements(node.results[0]) != size:
                return False
            return is_elementwise(node) or (
                isinstance(node.op, RmsNorm) and self._takes(node, op, graph, ctx)
            )

        growth.absorb_consumers(scan.results[0], behind)
        growth.absorb_sides(inside)
        return make_region(growth, ctx, self.name, "conv-scan")

    def _convolution(self, growth: Growth, op: SsdScan | SsdUpdate) -> Node | None:
        """The convolution that x, b and c all come from by way of views and element-wise ops."""
        found = {growth.origin(v) for v in (op.x, op.b, op.c)}
        (node,) = found if len(found) == 1 else (None,)
        if node is None or not isinstance(node.op, CausalConv) or not growth.is_free(node):
            return None
        return node

    def _takes(self, node: Node, op: SsdScan | SsdUpdate, graph: Graph, ctx: PassContext) -> bool:
        """Whether the region takes a norm along."""
        assert isinstance(node.op, RmsNorm)
        site = f"{graph.name}/%{node.results[0].name}"
        if not self.norm:
            ctx.refuses(Remark(self.name, site, "rms_norm stays outside of conv-scan: norm=false"))
            return False
        group: Dim = dim(op.state.type.bytes / op.x.shape[0] / node.op.groups)
        room = ctx.target.on_chip_memory
        if not isinstance(group, int) or group > room:
            message = (
                f"rms_norm stays outside of conv-scan: the heads of a group have {group} bytes of "
                f"state, the target keeps {room} near"
            )
            ctx.refuses(Remark(self.name, site, message))
            return False
        return True
