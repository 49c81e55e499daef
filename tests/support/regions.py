"""Regions for tests, from graph text.

op = region("input %x: f32[B, 8]\n %y = silu(%x) : f32[B, 8]\n return %y")
SUITE.add(Site.dense(op), emit_rows).check(SIZES, *operands(op, SIZES), tolerance=1e-6)
"""

from collections.abc import Mapping

import torch

from nemoc.ir.fusion import fuse
from nemoc.ir.op import Op
from nemoc.ir.parser import parse
from nemoc.ir.region import Fused
from nemoc.ir.sample_inputs import sample_arguments


def region(text: str, extra: tuple[type[Op], ...] = ()) -> Fused:
    """All nodes of a graph, given as the text of its arguments, nodes and results, as one region.

    Its operands are those arguments that the nodes read, in the order in which they read them.
    """
    graph = parse(f"graph @g {{\n{text}\n}}", extra_ops=extra)
    (node,) = fuse(graph, graph.nodes, "test").nodes
    assert isinstance(node.op, Fused)
    return node.op


def operands(op: Fused, sizes: Mapping[str, int], seed: int = 0) -> list[torch.Tensor]:
    """Random operands of a region, integers within their bounds."""
    return list(sample_arguments(op.body, sizes, seed).values())
