"""Making regions out of nodes, and nodes out of regions: what may be fused is decided here, for every pass alike.

A set of nodes can become one region when

- none of it is a constant that the artifact computes (`folded`): a region belongs to the step,
- it is convex: no value leaves it and comes back by way of other nodes, for then neither could run first,
- no old state is read in it beside the op that updates that state: the update happens in place, and the order within
  a region is the code generator's.

What other nodes or the graph's results read of its values becomes the region's results; everything else stays inside
and never has to be stored.

A region may repeat the work of nodes that others need too instead of reading what they stored: copies, which nothing
outside the region sees, and which stay in the graph for the others.
"""

from collections.abc import Callable, Collection, Iterable, Iterator

from nemoc.ir.builder import Builder
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op, operand_fields
from nemoc.ir.region import Folded, Fused, append_to_body
from nemoc.ir.rewrite import rebuild
from nemoc.ir.types import Value


def obstacle(graph: Graph, nodes: Collection[Node], copied: Collection[Node] = ()) -> str | None:
    """Why nodes of a graph cannot become one region, in words that name the op; none when they can.

    Args:
        graph: what the nodes belong to.
        nodes: some of its nodes.
        copied: more of them, whose work the region repeats.
    """
    for node in (*nodes, *copied):
        if isinstance(node.op, Folded):
            return f"%{node.results[0].name} is computed when the artifact is built"
    for node in copied:
        if node.op.updates:
            return f"%{node.results[0].name} is a state, which is updated once"
    return _way_back(graph, set(nodes), set(copied)) or _stale_read((*nodes, *copied))


def fuse(graph: Graph, nodes: Collection[Node], kind: str, copied: Collection[Node] = ()) -> Graph:
    """The graph with nodes replaced by one region, whose results keep the names of the values they were.

    Regions among the nodes are merged into it. Equal nodes on other values give equal bodies.

    Args:
        graph: what the nodes belong to.
        nodes: at least one of its nodes, in any order.
        kind: the region's `kind`.
        copied: nodes whose work the region repeats; nobody needs them any more if only the region did.

    Raises:
        IRError: there is an obstacle, or nobody reads anything of the nodes.
    """
    chosen, repeated = set(nodes), set(copied)
    members = [node for node in graph.nodes if node in chosen or node in repeated]
    unknown = len(members) < len(chosen | repeated)
    reason = "no such node" if unknown else obstacle(graph, nodes, copied)
    results = tuple(
        v for node in members if node in chosen for v in node.results if _escapes(graph, v, chosen)
    )
    if reason is None and not results:
        reason = "nobody reads its results"
    if reason is not None:
        raise IRError(f"{graph.name}: cannot fuse {kind}: {reason}")
    location = next(node.location for node in reversed(members) if node in chosen)
    region = Node(_region(members, results, kind), results, location)
    return rebuild(graph, _sorted(graph, chosen, repeated, region))


def inline(graph: Graph, wanted: Callable[[Node], bool]) -> Graph:
    """The graph with the bodies of regions in their place; the same graph where no region is wanted."""
    if not any(isinstance(node.op, Fused) and wanted(node) for node in graph.nodes):
        return graph
    fresh = Builder(graph.name).fresh
    for value in graph.values():
        fresh(value.name)
    nodes: list[Node] = []
    moved: dict[Value, Value] = {}
    for node in graph.nodes:
        op = node.op.map_operands(lambda v: moved.get(v, v))
        if not (isinstance(op, Fused) and wanted(node)):
            nodes.append(node if op is node.op else Node(op, node.results, node.location))
            continue
        inside = dict(zip(op.body.inputs, op.args, strict=True))
        names = dict(zip(op.body.outputs, node.results, strict=True))
        for inner in op.body.nodes:
            results = tuple(
                names.get(v) or Value(fresh(f"{node.results[0].name}.{v.name}"), v.type)
                for v in inner.results
            )
            nodes.append(Node(inner.op.map_operands(inside.__getitem__), results, node.location))
            inside.update(zip(inner.results, results, strict=True))
        for body_value, result in zip(op.body.outputs, node.results, strict=True):
            if inside[body_value] is not result:  # an operand handed through, or one value twice
                moved[result] = inside[body_value]
    return rebuild(graph, nodes, moved)


def _escapes(graph: Graph, value: Value, chosen: set[Node]) -> bool:
    return value in graph.results or any(user not in chosen for user in graph.uses.get(value, ()))


def _way_back(graph: Graph, chosen: set[Node], copied: set[Node]) -> str | None:
    """A value that leaves the nodes and comes back by way of others.

    What is copied stays in the graph too: others may reach it there, while the region has its own.
    """
    inside = chosen | copied
    places = [graph.places[node] for node in inside]
    tainted: dict[Value, Node] = {}  # what depends on the nodes by way of others, and the first one
    for node in graph.nodes[min(places) : max(places) + 1]:
        ways = [v for v in node.op.operands() if v in tainted]
        if node in inside:
            for value in ways:
                if graph.producers[value] not in inside:
                    way = tainted[value].results[0].name
                    return (
                        f"its {node.op.mnemonic()} depends on %{way}, which depends on the region"
                    )
        if node in chosen:
            continue
        if ways:
            tainted.update(dict.fromkeys(node.results, tainted[ways[0]]))
        elif any(graph.producers.get(v) in chosen for v in node.op.operands()):
            tainted.update(dict.fromkeys(node.results, node))
    return None


def _stale_read(nodes: Collection[Node]) -> str | None:
    """A state that one of the nodes updates and another one reads as it was."""
    for node in nodes:
        for field in node.op.updates.values():
            state: Value = getattr(node.op, field)
            for other in nodes:
                if other is not node and state in other.op.operands():
                    return f"its {other.op.mnemonic()} reads %{state.name} as it was before {node.op.mnemonic()}"
    return None


def _sorted(graph: Graph, chosen: set[Node], copied: set[Node], region: Node) -> Iterator[Node]:
    """The other nodes in their order with the region among them: behind all that it needs, before all that need it.

    Only nodes between the first and the last of the region's are looked at: of graphs of many layers that is a few.
    """
    places = [graph.places[node] for node in chosen | copied]
    first, end = min(places), max(places) + 1
    between = [node for node in graph.nodes[first:end] if node not in chosen]
    needs_region: set[Value] = set(region.results)
    before = list(graph.nodes[:first])
    for node in between:
        if needs_region.isdisjoint(node.op.operands()):
            before.append(node)
        else:
            needs_region.update(node.results)
    wanted = set(region.op.operands())
    cut = len(before)
    while cut and wanted.isdisjoint(before[cut - 1].results):
        cut -= 1
    early = set(before[first:cut])
    yield from before[:cut]
    yield region
    yield from graph.nodes[cut:first]
    yield from (node for node in between if node not in early)
    yield from graph.nodes[end:]


def _region(members: list[Node], results: tuple[Value, ...], kind: str) -> Fused:
    body = Builder("body")
    moved: dict[Value, Value] = {}
    args: list[Value] = []
    names = _Namer()
    produced = {v for node in members for v in node.results}
    for node in members:
        for field, value in _named_operands(node.op):
            if value not in produced and value not in moved:
                moved[value] = body.input(names(field), value.dtype, value.shape, value.bound)
                args.append(value)
    for node in members:
        append_to_body(node, body, moved, Fused)
    return Fused(tuple(args), body.finish(moved[v] for v in results), kind)


class _Namer:
    """Names for a body's inputs: a hint, then the hint with numbers behind it."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def __call__(self, hint: str) -> str:
        count = self._taken.get(hint, 0)
        self._taken[hint] = count + 1
        return f"{hint}.{count}" if count else hint


def _named_operands(op: Op) -> Iterable[tuple[str, Value]]:
    """An op's operands with the names of their fields; a region's with those of its body's inputs."""
    if isinstance(op, Fused):
        for inside, value in zip(op.body.inputs, op.args, strict=True):
            yield inside.name.partition(".")[0], value
        return
    for field in operand_fields(type(op)):
        operand = getattr(op, field)
        for value in operand if isinstance(operand, tuple) else (operand,):
            if value is not None:
                yield field, value
