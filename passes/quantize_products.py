"""What passes that quantize the operands of matrix products share."""

import math
from collections.abc import Callable
from dataclasses import replace

from nemoc.ir.dims import L, product, symbols_of
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, GroupedLinear, Linear, Reshape, TakeRows
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
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


def fp8_round_trip(
    x: Value, stem: str, last: str, rewriter: Rewriter, static_scale: float = 0.0
) -> Value:
    """What FP8 numbers of matrices [..., N, K] stand for; names of values begin with a stem."""
    encoding = iter(("scale", "codes"))
    numbers, scale = quantized_fp8(
        lambda op: rewriter(op, f"{stem}.{next(encoding)}"), x, static_scale
    )
    return fp8_decoded(numbers, scale, stem, last, rewriter)


def fp8_decoded(numbers: Value, scale: Value, stem: str, last: str, rewriter: Rewriter) -> Value:
    """What FP8 numbers stand for; names of values begin with a stem."""
    names = iter((*(("scale.view",) if scale.type.rank else ()), "wide", last))
    return dequantized_fp8(lambda op: rewriter(op, f"{stem}.{next(names)}"), numbers, scale)


def rows_in_fp8(x: Value, rewriter: Rewriter, static_scale: float = 0.0) -> Value:
    """Activations [..., K] as matrices of one row each, quantized to FP8 and decoded.

    Args:
        x: the activations.
        rewriter: where ops are added.
        static_scale: of all rows; 0 gives each its own.
    """
    return row_by_row(
        x,
        rewriter,
        "fp8",
        lambda rows, stem: fp8_round_trip(rows, stem, "decoded", rewriter, static_scale),
    )


_MANY_ROWS = 64
"""The most rows of a product, where their number is known, that count as few: those of a tile of matrix units."""


def has_many_rows(x: Value) -> bool:
    """Whether activations [..., K] have a row for each token of a prompt, or as many."""
    rows = product(x.shape[:-1])
    return rows > _MANY_ROWS if isinstance(rows, int) else L.name in symbols_of(rows)
