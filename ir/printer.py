"""The text form of graphs. `nemoc.ir.parser` reads it back to an equal graph.

    graph @step {
      input %tokens: i64[B, L] < 256
      param %embed: bf16[256, 64]
      state %lengths: i32[B] < C

      %h = take_rows(%embed, %tokens) : bf16[B, L, 64]
      %x = cast(%h) {dtype=f32} : f32[B, L, 64]
      return %x
      update %lengths = %lengths
    }

An absent optional operand is `_`, a variadic one is in brackets, attributes at their defaults are left out, and
a region's body follows its types in braces.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import sympy

from nemoc.ir.dims import format_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.op import BODY, Op, Operand, attribute_defaults, operand_fields
from nemoc.ir.types import Value

if TYPE_CHECKING:  # graphs print themselves
    from nemoc.ir.graph import Graph, Node

Namer = Callable[[Value], str]


def print_graph(graph: "Graph") -> str:
    """The text of a graph."""
    return "\n".join(_graph(graph, lambda value: value.name)) + "\n"


def print_canonical(graph: "Graph") -> str:
    """The text with local values numbered, so that equal structures give equal text."""
    return "\n".join(_graph(graph, _numbering(graph)))


def print_op(op: Op) -> str:
    """An op's mnemonic and attributes without its operands."""
    return op.mnemonic() + _attributes(op)


def format_attribute(value: Any) -> str:
    """The text of an attribute's value; the parser reads it by the field's declared type."""
    match value:
        case bool():
            return "true" if value else "false"
        case None:
            return "none"
        case DType():
            return value.value
        case sympy.Expr():
            return format_dim(value)
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value)
        case tuple():
            return "[" + ", ".join(format_attribute(v) for v in value) + "]"
    raise TypeError(f"an attribute of type {type(value).__name__} has no text form")


def _numbering(graph: "Graph") -> Namer:
    names = {value: value.name for value in graph.arguments}
    count = 0
    for node in graph.nodes:
        for value in node.results:
            names[value] = f"#{count}"
            count += 1
    return lambda value: names[value]


def _graph(graph: "Graph", name: Namer) -> Iterator[str]:
    yield f"graph @{graph.name} {{"
    for line in _content(graph, name):
        yield f"  {line}" if line else ""
    yield "}"


def _content(graph: "Graph", name: Namer) -> Iterator[str]:
    for kind, values in (
        ("input", graph.inputs),
        ("param", graph.params),
        ("state", graph.states),
    ):
        for value in values:
            bound = "" if value.bound is None else f" < {format_dim(value.bound)}"
            yield f"{kind} %{name(value)}: {value.type}{bound}"
    if graph.arguments and graph.nodes:
        yield ""
    for node in graph.nodes:
        yield from _node(node, name)
    yield "return " + ", ".join(f"%{name(v)}" for v in graph.outputs)
    for state, following in zip(graph.states, graph.next_states, strict=True):
        yield f"update %{name(state)} = %{name(following)}"


def _node(node: "Node", name: Namer) -> Iterator[str]:
    op = node.op
    results = ", ".join(f"%{name(v)}" for v in node.results)
    operands = ", ".join(_operand(getattr(op, f), name) for f in operand_fields(type(op)))
    types = ", ".join(str(v.type) for v in node.results)
    line = f"{results} = {op.mnemonic()}({operands}){_attributes(op)} : {types}"
    body: Graph | None = getattr(op, BODY, None)
    if body is None:
        yield line
        return
    yield line + " {"
    inner = name if _is_plain(name, node) else _numbering(body)
    for inside in _content(body, inner):
        yield f"  {inside}" if inside else ""
    yield "}"


def _is_plain(name: Namer, node: "Node") -> bool:
    """Whether the namer gives values their own names (and so does not number this node's)."""
    return all(name(v) == v.name for v in node.results)


def _operand(operand: Operand, name: Namer) -> str:
    if operand is None:
        return "_"
    if isinstance(operand, tuple):
        return "[" + ", ".join(f"%{name(v)}" for v in operand) + "]"
    return f"%{name(operand)}"


def _attributes(op: Op) -> str:
    defaults = attribute_defaults(type(op))
    texts = {key: format_attribute(value) for key, value in op.attributes().items() if key != BODY}
    # Defaults are left out by their text: -0.0 equals 0.0 but is another value.
    shown = [
        f"{key}={text}"
        for key, text in texts.items()
        if key not in defaults or format_attribute(defaults[key]) != text
    ]
    return f" {{{', '.join(shown)}}}" if shown else ""
