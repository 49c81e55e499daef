"""What passes that quantize the weights of matrix products share."""

from collections.abc import Callable

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, GroupedLinear, Linear
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


def weights_in(graph: Graph, scope: str) -> set[Value]:
    """The parameters that a scope means."""
    begins = read_scope(scope)
    return {p for p in graph.params if begins.match(p.name)}


def rewrite_products(
    graph: Graph,
    ctx: PassContext,
    pass_name: str,
    format_name: str,
    apply: Callable[[Linear | GroupedLinear, Rewriter], Replacement],
) -> Graph:
    """Rewrite products whose weights are as on disk, with a remark for each that says its weight's new format."""

    def of_plain_rows(op: Op, rewriter: Rewriter) -> Replacement:
        assert isinstance(op, Linear | GroupedLinear)
        return apply(op, rewriter) if op.interleave == 1 else None

    return rewrite(
        graph,
        (Rule("quantize-weight", (Linear, GroupedLinear), of_plain_rows),),
        on_apply=lambda _, node: ctx.allows(
            Remark(
                pass_name,
                f"{graph.name}/%{node.results[0].name}",
                f"{node.op.w.name} in {format_name}",  # type: ignore[attr-defined]
            )
        ),
    )


def beside(x: Value, decoded: Value, rewriter: Rewriter) -> Value:
    """A decoded weight of a type that a product with x takes."""
    if decoded.dtype.bytes <= x.dtype.bytes:
        return decoded
    return rewriter(Cast(decoded, x.dtype), f"{decoded.name}.{x.dtype}")
