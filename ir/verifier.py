"""What every graph must satisfy. Checked:

1. names are unique within a graph and match `NAME`, and the graph's own does;
2. every operand, output and next state is defined, and before its use; there is an output;
3. the types of a node's results are those its op infers;
4. each state's next value has the state's type;
5. bounds are on integers only;
6. every symbol in a type is a whole dimension of some input or state, so that a call determines it;
7. bodies of regions satisfy all this, their symbols being those of the graph around them, and take nothing else from
   outside (checked with the region's own inference).

Not checked: that indices stay within their tables (the runtime holds inputs to their bounds).
"""

from nemoc.ir.dims import symbols_of
from nemoc.ir.errors import IRError, expect
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import BODY
from nemoc.ir.types import NAME, TensorType, Value


def verify(graph: Graph) -> None:
    """Check a graph.

    Raises:
        IRError: a rule is broken; the location is the text's line, or `graph/%value`.
    """
    _verify(graph, frozenset())


def _verify(graph: Graph, known: frozenset[str]) -> None:
    """Check a graph in whose surroundings some symbols are known."""
    _check_name(graph.name)
    defined: set[Value] = set()
    names: set[str] = set()
    bound = _bound_symbols(graph) | known
    for value in graph.arguments:
        _define(graph, value, defined, names)
        try:
            _verify_argument(value, bound)
        except IRError as error:
            raise error.at(f"{graph.name}/%{value.name}") from None
    for node in graph.nodes:
        try:
            _verify_node(node, defined, bound)
        except IRError as error:
            raise error.at(_location(graph, node)) from None
        for value in node.results:
            _define(graph, value, defined, names)
    _verify_results(graph, defined)


def _check_name(name: str, location: str = "") -> None:
    if not NAME.fullmatch(name):
        expected = "ASCII letters, digits, '_', '.' and '-'"
        raise IRError(f"the name {name!r} cannot be written, expected {expected}", location)


def _location(graph: Graph, node: Node) -> str:
    return node.location or f"{graph.name}/%{node.results[0].name}"


def _define(graph: Graph, value: Value, defined: set[Value], names: set[str]) -> None:
    _check_name(value.name, graph.name)
    if value.name in names:
        raise IRError(f"%{value.name} is defined twice", f"{graph.name}/%{value.name}")
    names.add(value.name)
    defined.add(value)


def _bound_symbols(graph: Graph) -> frozenset[str]:
    """Symbols that stand alone as a dimension of an input or a state."""
    alone = [
        symbols_of(d)
        for value in (*graph.inputs, *graph.states)
        for d in value.shape
        if not isinstance(d, int) and d.is_Symbol
    ]
    return frozenset().union(*alone)


def _verify_argument(value: Value, bound: frozenset[str]) -> None:
    expect(value.bound is None or not value.dtype.is_float, "a bound on floating-point elements")
    _expect_determined(value.type, bound)


def _expect_determined(type_: TensorType, bound: frozenset[str]) -> None:
    free = sorted(type_.symbols - bound)
    expect(not free, f"{type_} uses {', '.join(free)}, which no input or state determines")


def _verify_node(node: Node, defined: set[Value], bound: frozenset[str]) -> None:
    for value in node.op.operands():
        expect(
            value in defined, f"{node.op.mnemonic()} reads %{value.name}, which is not defined yet"
        )
    body = getattr(node.op, BODY, None)
    if isinstance(body, Graph):
        _verify(body, bound)
    inferred = node.op.result_types()
    types = tuple(v.type for v in node.results)
    expect(
        types == inferred,
        f"{node.op.mnemonic()} gives {', '.join(map(str, inferred))}, but its values are "
        f"{', '.join(map(str, types))}",
    )
    for type_ in types:
        _expect_determined(type_, bound)


def _verify_results(graph: Graph, defined: set[Value]) -> None:
    where = graph.name
    expect(len(graph.outputs) > 0, f"{where}: returns nothing, expected an output")
    for value in graph.results:
        expect(value in defined, f"{where}: returns %{value.name}, which is not defined")
    expect(
        len(graph.states) == len(graph.next_states),
        f"{where}: {len(graph.next_states)} next states for {len(graph.states)} states",
    )
    for state, following in zip(graph.states, graph.next_states, strict=True):
        expect(
            state.type == following.type,
            f"{where}: state %{state.name} is {state.type}, its next value {following.type}",
        )
