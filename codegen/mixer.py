"""What a region around a state-space recurrence consists of.

A recurrence's x, b and c may come from a causal convolution by way of element-wise ops and slices, so that each of
their columns is made from one channel. dt, a and d may be computed too. Results are the next states, and whatever is
computed row by row from y.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.regions import body_of
from nemoc.codegen.rows import Rows
from nemoc.ir.dims import Dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.ops import CausalConv, Full, Reshape, RmsNorm, Slice, SsdScan, SsdUpdate
from nemoc.ir.types import Value

PARTS = ("x", "b", "c")
"""The operands of a recurrence that come from the convolution."""


@dataclass(frozen=True)
class Mixer:
    """A region taken apart.

    Attributes:
        graph: the body.
        op: the recurrence.
        y: its first result.
        conv: the convolution that x, b and c come from, or none where they come from outside.
        convolved: the convolution's first result, if there is one.
        channels: for each of x, b and c the channel that its first column is made from, if there is a convolution.
        updates: pairs (result of the region, operand of the region) for the next states among the results.
        stores_history: whether the convolution's next state is among the results.
        stores_state: whether the recurrence's next state is.
        rows: the other results by their numbers, as rows that count tokens.
    """

    graph: Graph
    op: SsdScan | SsdUpdate
    y: Rows
    conv: CausalConv | None
    convolved: Value | None
    channels: dict[str, int]
    updates: tuple[tuple[int, int], ...]
    stores_history: bool
    stores_state: bool
    rows: dict[int, Rows]

    @property
    def heads(self) -> int:
        """H."""
        return _int(self.y.row[0])

    @property
    def width(self) -> int:
        """P, the rows of a head's state."""
        return _int(self.y.row[1])

    @property
    def groups(self) -> int:
        """G."""
        return _int(self.op.b.shape[-2])

    @property
    def columns(self) -> int:
        """N, the columns of a head's state."""
        return _int(self.op.b.shape[-1])

    @property
    def batch(self) -> Dim:
        """B."""
        return self.op.x.shape[0]

    @property
    def length(self) -> Dim:
        """L."""
        return self.op.x.shape[1] if isinstance(self.op, SsdScan) else 1

    def owns_history(self, heads: int) -> bool:
        """Whether tasks of `heads` heads can write the convolution's next state: each channel is one task's."""
        if not self.stores_history or self.conv is None or heads * self.groups != self.heads:
            return False
        end = 0
        for first, part in sorted((first, part) for part, first in self.channels.items()):
            if first != end:
                return False
            end += self.y.width if part == "x" else self.groups * self.columns
        return end == self.conv.x.shape[2]

    def read(self, value: Value) -> Rows:
        """An operand of the recurrence with an element for each token and column, as rows that count tokens.

        Reshapes that keep tokens apart are looked through.
        """
        tokens = product(self.y.own)
        rows = token_rows(value, tokens)
        while value in self.graph.producers:
            op = self.graph.producers[value].op
            if not isinstance(op, Reshape) or (before := token_rows(op.x, tokens)) is None:
                break
            value, rows = op.x, before
        assert rows is not None
        return rows

    def norms(self, rows: Rows) -> list[Value]:
        """The norms of what depends on y behind a result, in the order in which they need each other."""
        behind = _behind(self.graph, rows.value, {self.y.value})
        made = _dependents(self.graph, self.y.value)
        return [
            v
            for node in self.graph.nodes
            for v in node.results
            if v in behind and v in made and isinstance(node.op, RmsNorm)
        ]

    def by_column(self, rows: Rows, columns: int) -> bool:
        """Whether `columns` columns of a result, from a multiple of them on, need y in these columns alone.

        Norms count if their groups lie within such columns.
        """
        made = _dependents(self.graph, self.y.value)
        for value, op in _behind(self.graph, rows.value, {self.y.value}).items():
            if value not in made:
                if not _is_pointwise(op):
                    return False
                continue
            seen = token_rows(value, product(self.y.own))
            if seen is None or seen.width != self.y.width:
                return False
            if isinstance(op, RmsNorm):
                if (
                    op.x.dtype != DType.F32
                    or seen.trail != 1
                    or columns % (seen.width // op.groups)
                ):
                    return False
            elif isinstance(op, Slice) or not _is_pointwise(op):
                return False
        return rows.width == self.y.width


def take_apart(site: Site) -> Mixer:
    """What a region consists of.

    Raises:
        RegionError: it is not made of one recurrence and what belongs to it.
    """
    graph = body_of(site)
    (op, (y, following)) = _only(graph, (SsdScan, SsdUpdate))
    assert isinstance(op, SsdScan | SsdUpdate)
    rows = Rows.of(y, 2)
    tokens = product(rows.own)
    conv = convolved = history = None
    states = {following: op.state}
    channels: dict[str, int] = {}
    if any(isinstance(node.op, CausalConv) for node in graph.nodes):
        found, (convolved, history) = _only(graph, (CausalConv,))
        assert isinstance(found, CausalConv)
        conv, states[history] = found, found.state
        known = _channels(graph, convolved, tokens)
        for part in PARTS:
            if getattr(op, part) not in known:
                raise RegionError(f"{part} is not made from the convolution channel by channel")
            channels[part] = known[getattr(op, part)]
        _expect_pointwise(graph, [conv.x, conv.w, conv.bias, conv.valid], set())
    ends = set() if convolved is None else {convolved}
    _expect_pointwise(graph, [op.x, op.b, op.c], ends)
    _expect_pointwise(graph, [op.dt, op.a, op.d, getattr(op, "valid", None)], set())
    results = list(enumerate(graph.outputs))
    updates = tuple((i, _operand(graph, states[value])) for i, value in results if value in states)
    if len({operand for _, operand in updates}) != len(updates):
        raise RegionError("a state is updated for several results")
    others = {i: token_rows(value, tokens) for i, value in results if value not in states}
    for i, result in others.items():
        if result is None:
            raise RegionError(f"result {i} has no row for each token")
    return Mixer(
        graph=graph,
        op=op,
        y=rows,
        conv=conv,
        convolved=convolved,
        channels=channels,
        updates=updates,
        stores_history=history is not None and history in graph.outputs,
        stores_state=following in graph.outputs,
        rows={i: result for i, result in others.items() if result is not None},
    )


def token_rows(value: Value, tokens: Dim) -> Rows | None:
    """A value as rows that count tokens, with as few axes in a row as can be; none if it has no such rows."""
    for cut in reversed(range(value.type.rank)):
        if product(value.shape[:cut]) == tokens:
            rows = Rows.of(value, value.type.rank - cut)
            return rows if isinstance(product(rows.row), int) else None
    return None


def _only(graph: Graph, kinds: tuple[type[Op], ...]) -> tuple[Op, tuple[Value, ...]]:
    """The one op of these kinds, and its results."""
    found = [node for node in graph.nodes if isinstance(node.op, kinds)]
    if len(found) != 1:
        names = " or ".join(kind.mnemonic() for kind in kinds)
        raise RegionError(f"the region has {len(found)} ops {names}, expected one")
    return found[0].op, found[0].results


def _operand(graph: Graph, state: Value) -> int:
    if state not in graph.inputs:
        raise RegionError(f"%{state.name} is made within the region, expected an old state")
    return graph.inputs.index(state)


def _is_pointwise(op: Op) -> bool:
    """Whether an element needs nothing of a whole row."""
    return op.is_elementwise or isinstance(op, Full | Reshape | Slice)


def _expect_pointwise(graph: Graph, values: Iterable[Value | None], ends: set[Value]) -> None:
    for value in values:
        for op in _behind(graph, value, ends).values() if value is not None else ():
            if not _is_pointwise(op):
                raise RegionError(f"what the recurrence reads comes from {op.mnemonic()}")


def _behind(graph: Graph, value: Value, ends: set[Value]) -> dict[Value, Op]:
    """What a value is made from, itself included, as far back as `ends`, with the ops that make it."""
    found: dict[Value, Op] = {}
    waiting = [value]
    while waiting:
        v = waiting.pop()
        if v not in ends and v not in found and v in graph.producers:
            found[v] = graph.producers[v].op
            waiting.extend(found[v].operands())
    return found


def _dependents(graph: Graph, value: Value) -> set[Value]:
    """A value and all that is made from it."""
    found = {value}
    for node in graph.nodes:
        if not found.isdisjoint(node.op.operands()):
            found.update(node.results)
    return found


def _channels(graph: Graph, convolved: Value, tokens: Dim) -> dict[Value, int]:
    """The values each column of which is made from one channel, neighbours from neighbours: the first one's channel."""
    found = {convolved: 0}
    for node in graph.nodes:
        made_from = [v for v in node.op.operands() if v in found]
        if not made_from or not _is_pointwise(node.op):
            continue
        (result,) = node.results
        rows = token_rows(result, tokens)
        sources = [token_rows(v, tokens) for v in made_from]
        if rows is None or None in sources or len({found[v] for v in made_from}) > 1:
            continue
        first = found[made_from[0]]
        if isinstance(node.op, Slice):
            lead, rest = result.shape[: node.op.axis], result.shape[node.op.axis + 1 :]
            if product(lead) == tokens:
                found[result] = first + node.op.start * _int(product(rest))
        elif all(s is not None and s.width == rows.width for s in sources):
            found[result] = first
    return found


def _int(size: Dim) -> int:
    assert isinstance(size, int)
    return size
