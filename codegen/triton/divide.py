"""Regions divided into what one launch can do.

A fusion pass says which ops belong together; how many launches that takes is a matter of the target. On a GPU programs
do not see what others of the same launch have made, so a value has to go through memory where something needs it from
elsewhere: a row of scores to choose experts from, a normalised row that many programs read. Such a value is cut: one
part of the region makes it, another reads it. The parts are regions again, so everything else treats them as such.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from nemoc.ir.dims import Dim, product, symbols_of
from nemoc.ir.fusion import fuse, inline
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    Attention,
    CacheWrite,
    Fp8Scale,
    GroupBy,
    GroupedLinear,
    GroupLimit,
    Linear,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    QuantizeFp8,
    QuantizeNvfp4,
    Reshape,
    RmsNorm,
    SsdScan,
    SsdUpdate,
    TakeRows,
    TopK,
)
from nemoc.ir.region import Fused
from nemoc.ir.rewrite import rebuild
from nemoc.ir.types import Value

_ANCHORS = (Linear, GroupedLinear, GroupBy, Attention)
_WHOLE = (SsdScan, SsdUpdate)
"""Anchors whose skeletons divide regions themselves."""

_WHOLE_ROWS = (RmsNorm, TopK, GroupLimit, Nvfp4GlobalScale, Fp8Scale)

FEW = 64
"""Rows that are few enough for every program to prepare them by itself."""


def divide(graph: Graph) -> Graph:
    """The graph with regions divided into parts that one launch can do; the same object where all are such."""
    divided: dict[Node, Node] = {}
    for node in graph.nodes:
        if isinstance(node.op, Fused):
            body = divide_body(node.op.body)
            if body is not node.op.body:
                op = dataclasses.replace(node.op, body=body)
                divided[node] = Node(op, node.results, node.location)
    if not divided:
        return graph
    nodes = tuple(divided.get(node, node) for node in graph.nodes)
    wanted = set(divided.values())
    return _once(inline(dataclasses.replace(graph, nodes=nodes), wanted.__contains__))


def _once(graph: Graph) -> Graph:
    """The graph with equal parts of several regions computed once: the norm that each of them began with."""
    first: dict[tuple[tuple[Value, ...], str], Node] = {}
    moved: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        op = node.op.map_operands(lambda v: moved.get(v, v))
        current = node if op is node.op else Node(op, node.results, node.location)
        if isinstance(op, Fused):
            # As text, since 0.0 == -0.0.
            known = first.setdefault((op.args, op.body.canonical_text), current)
            if known is not current:
                moved.update(zip(node.results, known.results, strict=True))
                continue
        nodes.append(current)
    return rebuild(graph, nodes, moved) if moved else graph


def divide_body(body: Graph) -> Graph:
    """The body of a region as parts, which are regions or views; the body itself if it is one part."""
    if any(isinstance(node.op, _WHOLE) for node in body.nodes):
        return body
    parts = _Cuts(body).parts()
    if len(parts) <= 1:
        return body
    graph = body
    for part in parts:
        graph = fuse(graph, part.nodes, part.kind, part.copied)
    return _without_unread(graph)


@dataclass(frozen=True)
class _Part:
    """Nodes that one launch carries out, and nodes whose work it repeats."""

    nodes: tuple[Node, ...]
    copied: tuple[Node, ...]
    kind: str


class _Cuts:
    """Which values of a body go through memory, and which part makes which.

    A part is an anchor, or several whose tiles are added to each other, with what is computed from their tiles. Values
    that need no anchor are free: each part computes them by itself, unless they go through memory anyway.

    Args:
        body: the body.
    """

    def __init__(self, body: Graph) -> None:
        self._body = body
        self._stored = set(body.outputs) - set(body.inputs)
        self._cut: set[Value] = set()
        self._tile: dict[Value, frozenset[Node]] = {v: frozenset() for v in body.inputs}
        self._needs: dict[Node, frozenset[Node]] = {}
        self._groups: dict[Node, set[Node]] = {}
        for node in body.nodes:
            self._visit(node)
        self._stored |= self._cut

    def parts(self) -> list[_Part]:
        """The parts; together they make every result."""
        parts = []
        for anchors in {id(g): g for g in self._groups.values()}.values():
            own = [n for n in self._body.nodes if not anchors.isdisjoint(self._tile_of(n))]
            parts.append(_Part(tuple(own), self._behind(own), _kind(own)))
        rows: dict[tuple[int, Dim], list[Node]] = {}
        for node in self._body.nodes:
            if not self._tile_of(node) and self._is_stored(node) and not self._is_view(node):
                rows.setdefault((self._level(node), _count(node)), []).append(node)
        for own in rows.values():
            behind = self._behind(own)
            parts.append(_Part(tuple(own), tuple(n for n in behind if n not in own), "rows"))
        return parts

    def _visit(self, node: Node) -> None:
        op = node.op
        made = [self._body.producers[v] for v in op.operands() if v in self._body.producers]
        self._needs[node] = frozenset[Node]().union(*(self._needs[m] | {m} for m in made))
        if isinstance(op, _ANCHORS):
            for value in op.operands():
                self._separate(value)
            self._cut_dear(op)
            self._groups[node] = {node}
            tile = frozenset([node])
        else:
            tile = self._common_tile(node)
            for value in op.operands():
                if not self._at_hand(value) <= tile:
                    self._separate(value)
        self._tile.update(dict.fromkeys(node.results, tile))

    def _common_tile(self, node: Node) -> frozenset[Node]:
        """The anchors whose tile a node is computed from: of some that cannot be one part, the last."""
        tiles = [self._at_hand(v) for v in node.op.operands()]
        tile = frozenset[Node]().union(*tiles)
        if not tile or not _is_tilewise(node.op):
            return frozenset()
        return tile if self._join(tile) else max(tiles, key=self._latest)

    def _latest(self, anchors: frozenset[Node]) -> int:
        return max((self._body.places[a] for a in anchors), default=-1)

    def _join(self, anchors: frozenset[Node]) -> bool:
        """Make one part of anchors, if their tiles are alike and none needs another's result."""
        if len(anchors) == 1:
            return True
        everyone = set[Node]().union(*(self._groups[a] for a in anchors))
        sizes = {_size(a.op) for a in everyone}
        if len(sizes) > 1 or None in sizes or any(self._needs[a] & everyone for a in everyone):
            return False
        self._groups.update(dict.fromkeys(everyone, everyone))
        return True

    def _separate(self, value: Value) -> None:
        """Cut a value that is part of a tile: others read it from memory."""
        if self._at_hand(value):
            self._cut.add(value)

    def _at_hand(self, value: Value) -> frozenset[Node]:
        """The anchors whose tile a value is read from; none if it is free or in memory."""
        return frozenset() if value in self._cut else self._tile[value]

    def _cut_dear(self, op: Op) -> None:
        """Cut what an anchor reads if it is too dear for every program to compute: whole rows, of many."""
        if isinstance(op, GroupBy):
            values = [op.index]
        elif isinstance(op, Linear | GroupedLinear):
            values = [self._before_gather(op.x)]
        else:
            values = [v for v in op.operands() if v in self._body.producers]
        for value in values:
            whole = [n for n in self._free_behind(value) if isinstance(n.op, _WHOLE_ROWS)]
            shared = any(v in self._stored | self._cut for n in whole for v in self._reach(n))
            few = _is_few(product(value.shape[:-1])) and isinstance(op, Linear)
            if whole and (shared or not few or any(map(_is_grouped, whole))):
                self._cut.add(value)

    def _reach(self, node: Node) -> set[Value]:
        """What is computed from a node element by element: it is stored if one of these is."""
        found = set(node.results)
        for other in self._body.nodes:
            if (other.op.is_elementwise or other.op.is_view) and not found.isdisjoint(
                other.op.operands()
            ):
                found.update(other.results)
        return found

    def _before_gather(self, value: Value) -> Value:
        """The table that rows are gathered from, where that is computed here."""
        node = self._body.producers.get(value)
        if node is not None and isinstance(node.op, TakeRows):
            return node.op.table
        return value

    def _free_behind(self, value: Value) -> list[Node]:
        """The free nodes that make a value, as far as nothing is cut."""
        node = self._body.producers.get(value)
        if node is None or value in self._cut or self._tile[value]:
            return []
        return [node, *(n for v in node.op.operands() for n in self._free_behind(v))]

    def _behind(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The free nodes whose work nodes have to repeat: nothing of it is in memory."""
        found: set[Node] = set()
        waiting = [v for node in nodes for v in node.op.operands()]
        while waiting:
            value = waiting.pop()
            node = self._body.producers.get(value)
            if node is None or node in found or self._tile[value] or value in self._stored:
                continue
            found.add(node)
            waiting.extend(node.op.operands())
        return tuple(n for n in self._body.nodes if n in found)

    def _tile_of(self, node: Node) -> frozenset[Node]:
        return self._tile[node.results[0]]

    def _is_stored(self, node: Node) -> bool:
        return not self._stored.isdisjoint(node.results)

    def _is_view(self, node: Node) -> bool:
        """Whether a stored value only shows another one."""
        return node.op.is_view and all(
            v in self._stored or v in self._body.inputs for v in node.op.operands()
        )

    def _level(self, node: Node) -> int:
        """How many parts one after the other a node waits for; parts of one level and count are one."""
        levels = [0]
        for value in node.op.operands():
            maker = self._body.producers.get(value)
            if maker is None:
                continue
            apart = bool(self._tile[value])
            if value in self._stored and not self._is_view(maker):
                apart = apart or _count(maker) != _count(node)
            levels.append(self._level(maker) + apart)
        return max(levels)


def _is_tilewise(op: Op) -> bool:
    """Whether an op's result at a tile needs its operands at that tile alone; tiles are whole blocks of NVFP4."""
    quantizers = Nvfp4BlockScales | QuantizeNvfp4 | QuantizeFp8
    return op.is_elementwise or isinstance(op, Reshape | CacheWrite | quantizers)


def _size(op: Op) -> tuple[Dim, Dim] | None:
    """Rows and features of a dense product, whose tiles may be added to those of equal ones."""
    return (product(op.x.shape[:-1]), op.width) if isinstance(op, Linear) else None


def _is_grouped(node: Node) -> bool:
    """Whether a node looks at parts of rows as wholes, which are not the rows that a product reads."""
    return isinstance(node.op, RmsNorm) and node.op.groups > 1


def _is_few(rows: Dim) -> bool:
    return rows <= FEW if isinstance(rows, int) else symbols_of(rows) <= {"B"}


def _count(node: Node) -> Dim:
    """How many rows a node makes; a scale of a matrix is a row of one element."""
    shape = node.results[0].shape
    return product(shape if isinstance(node.op, Nvfp4GlobalScale | Fp8Scale) else shape[:-1])


def _kind(nodes: Iterable[Node]) -> str:
    """A word for a part."""
    return next(node.op.mnemonic() for node in nodes if isinstance(node.op, _ANCHORS))


def _without_unread(graph: Graph) -> Graph:
    """The graph without nodes that nobody reads: every part has its own copy."""
    read: set[Value] = set(graph.results)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not read.isdisjoint(node.results):
            kept.append(node)
            read.update(node.op.operands())
    return dataclasses.replace(graph, nodes=tuple(reversed(kept)))
