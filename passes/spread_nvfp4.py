"""The order of bits in which the target's kernels read weights in NVFP4."""

import dataclasses
from dataclasses import dataclass

from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import DequantizeNvfp4, GroupedLinear, Linear, Reshape, SpreadCodes, TakeRows
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.types import Value
from nemoc.passes.base import Pass
from nemoc.passes.constants import constant_values
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class SpreadNvfp4(Pass):
    """Store NVFP4 codes of weights in an order of bits that takes kernels fewer instructions.

    Only of weights that products alone read, and activations that are not in NVFP4 themselves: matrix units that
    multiply NVFP4 want codes as they are. Nothing is done for targets that do not ask for it, unless `always`.
    `fold-constants` behind this pass moves the change of order out of the step.

    Before::

        %w = dequantize_nvfp4(%codes, %scales, %scale) : f32[256, 64]
        %y = linear(%x, %w) : f32[B, 256]

    After::

        %codes.spread = spread_codes(%codes) : u8[256, 32]
        %w = dequantize_nvfp4(%codes.spread, %scales, %scale) {spread=true} : f32[256, 64]
        %y = linear(%x, %w) : f32[B, 256]
    """

    always: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        if not (self.always or ctx.target.spread_nvfp4):
            return graph
        chosen = constant_values(graph, packed=True) - _read_otherwise(graph)

        def spread(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, DequantizeNvfp4)
            if op.packed not in chosen:
                return None
            codes = rewriter(SpreadCodes(op.packed), f"{op.packed.name}.spread")
            return rewriter(dataclasses.replace(op, packed=codes, spread=True))

        return rewrite(
            graph,
            (Rule("spread-codes", DequantizeNvfp4, spread),),
            on_apply=lambda _, node: ctx.allows(
                Remark(
                    self.name,
                    f"{graph.name}/%{node.results[0].name}",
                    "codes in the order of bits that kernels want",
                )
            ),
        )


def _read_otherwise(graph: Graph) -> set[Value]:
    """Values that are more than codes of weights which products with plain activations multiply."""
    found = set(graph.results)
    for node in graph.nodes:
        op = node.op
        weights = set[Value]()
        if isinstance(op, Linear | GroupedLinear) and not _decoder(graph, op.x):
            weights = {op.w} - {op.x}
        elif isinstance(op, DequantizeNvfp4) and op.interleave == 1 and not op.spread:
            weights = {op.packed}
        found.update(set(op.operands()) - weights)
    codes = {
        node.op.packed
        for node in graph.nodes
        if isinstance(node.op, DequantizeNvfp4) and not found.isdisjoint(node.results)
    }
    return found | codes


def _decoder(graph: Graph, value: Value) -> DequantizeNvfp4 | None:
    """What decodes a value's rows, if they are in NVFP4."""
    node = graph.producers.get(value)
    match node and node.op:
        case DequantizeNvfp4() as op:
            return op
        case Reshape(x=source) | TakeRows(table=source):
            return _decoder(graph, source)
    return None
