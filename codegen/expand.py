"""Ops that a backend does not know, in terms of those that it knows."""

import dataclasses
from collections.abc import Collection

from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.region import Fused
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite


def expand_ops(graph: Graph, known: Collection[type[Op]]) -> Graph:
    """The graph with unknown ops replaced by their expansions, in the bodies of regions too, until nothing expands.

    Ops without an expansion stay: what cannot be compiled is for the backend to say.

    Args:
        graph: what to compile.
        known: the ops that the backend has kernels for.

    Returns:
        The same object where every op is known.

    Raises:
        IRError: an expansion has other types than its op, or expands forever.
    """

    def apply(op: Op, build: Rewriter) -> Replacement:
        if isinstance(op, Fused):
            body = expand_ops(op.body, known)
            return None if body is op.body else build.all(dataclasses.replace(op, body=body))
        return None if type(op) in known else op.expand(build)

    return rewrite(graph, [Rule("expand", Op, apply)])
