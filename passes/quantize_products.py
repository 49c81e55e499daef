"""What passes that quantize the weights of matrix products share."""

import math
from collections.abc import Callable
from dataclasses import replace

from nemoc.ir.dims import product
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, GroupedLinear, Linear, Reshape, TakeRows
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.scopes import read_scope
from nemoc.ir.types import Value
from nemoc.passes.context import PassContext, Remark


def check_scope(pass_name: str, scope: str) -> None:
    """Check a pass's option.

    Raises:
        NemocError: it is neither a word nor a regular expression.
    """
    try:
        read_scope(scope)
    except NemocError as error:
        raise NemocError(f"pass {pass_name}: option {error}") from None


def check_input_scale(pass_name: str, scale: float) -> None:
    """Check a pass's option.

    Raises:
        NemocError: it is no static scale.
    """
    if not 0 <= scale < math.inf:
        raise NemocError(
            f"pass {pass_name}: option input-scale is {scale}, expected 0 or a positive number"
        )


def weights_in(graph: Graph, pass_name: str, scope: str) -> set[Value]:
    """The parameters that a pass's scope means.

    Raises:
        NemocError: it means none, and is not `all`.
    """
    begins = read_scope(scope)
    found = {p for p in graph.params if begins.match(p.name)}
    if not found and scope != "all":
        raise NemocError(
            f"pass {pass_name}: option scope is {scope!r}, found no weight that it means"
        )
    return found


def unrounded(w: Value, rewriter: Rewriter) -> Value:
    """A weight before it was rounded to the activations' type."""
    op = rewriter.producer(w)
    return unrounded(op.x, rewriter) if isinstance(op, Cast) else w


def rewrite_products(
    graph: Graph,
    ctx: PassContext,
    pass_name: str,
    format_name: Callable[[Linear | GroupedLinear], str],
    apply: Callable[[Linear | GroupedLinear, Rewriter], Replacement],
) -> Graph:
    """Rewrite products whose weights are as on disk, with a remark for each.

    Args:
        graph, ctx, pass_name: what is rewritten, and for whom.
        format_name: given a product, what remarks say that its weight is in.
        apply: the rewriting of one product.
    """

    def of_plain_rows(op: Op, rewriter: Rewriter) -> Replacement:
        assert isinstance(op, Linear | GroupedLinear)
        return apply(op, rewriter) if op.interleave == 1 else None

    def remark(node: Node) -> Remark:
        op = node.op
        assert isinstance(op, Linear | GroupedLinear)
        site = f"{graph.name}/%{node.results[0].name}"
        return Remark(pass_name, site, f"{op.w.name} in {format_name(op)}")

    return rewrite(
        graph,
        (Rule("quantize-weight", (Linear, GroupedLinear), of_plain_rows),),
        on_apply=lambda _, node: ctx.allows(remark(node)),
    )


def beside(x: Value, decoded: Value, rewriter: Rewriter) -> Value:
    """A decoded weight of a type that a product with x takes."""
    if decoded.dtype.bytes <= x.dtype.bytes:
        return decoded
    return rewriter(Cast(decoded, x.dtype), f"{decoded.name}.{x.dtype}")


def row_by_row(
    x: Value, rewriter: Rewriter, format_name: str, decoded: Callable[[Value, str], Value]
) -> Value:
    """Activations [..., K] quantized and decoded, every row as a matrix of its own, whose scale depends on no other.

    Where a product gathers rows, the table is quantized before.

    Args:
        x: the activations.
        rewriter: where ops are added.
        format_name: a word for names of values.
        decoded: given rows [R, 1, K] and a stem for names, what their codes stand for.
    """
    gather = rewriter.producer(x)
    if isinstance(gather, TakeRows) and gather.table.shape[-1] == x.shape[-1]:
        table = row_by_row(gather.table, rewriter, format_name, decoded)
        return rewriter(replace(gather, table=table), f"{x.name}.{format_name}")
    rows = rewriter(Reshape(x, (product(x.shape[:-1]), 1, x.shape[-1])), f"{x.name}.rows")
    return rewriter(Reshape(decoded(rows, x.name), x.shape), f"{x.name}.{format_name}")
