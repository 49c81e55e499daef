"""Growing a region from an anchor, node by node: what the fusion passes share.

A pass names the anchors and says how far a region may reach; how it gets there is the same for all:

- towards producers, what feeds the region is taken in if nobody else reads it. What others read too is left outside,
  or becomes a result of the region (`shared`), or is computed again (`copies`), as the pass allows.
- towards consumers, what reads a value of the region is taken in, and the value itself remains a result as long as
  somebody outside reads it.
- views come along only between ops that do: at the rim of a region they would be nothing but another name for its
  operands or results.
- casts fall so that values cross borders in the narrower type. One that narrows belongs to whoever makes its operand:
  a region that only reads its result leaves it outside. One that widens belongs to whoever reads its result: a region
  takes in those before it, repeating them where others widen the same value, and does not hand out what it widened.

Every step is checked by `nemoc.ir.fusion.obstacle`. What parameters alone determine stays outside: it is computed when
the artifact is built.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.fusion import fuse, obstacle
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops import (
    Attention,
    Cast,
    Fp8Scale,
    Full,
    GroupedLinear,
    GroupLimit,
    Linear,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    QuantizeFp8,
    QuantizeNvfp4,
    RmsNorm,
    RoundToInt8,
    SsdScan,
    SsdUpdate,
    Sum,
    TakeAlong,
    TakeLast,
    TakeRows,
    TopK,
)
from nemoc.ir.region import Fused, Region
from nemoc.ir.types import Value
from nemoc.passes.constants import constant_values
from nemoc.passes.context import PassContext, Remark

Wanted = Callable[[Node], bool]
"""Whether a pass wants a node in a region."""

QUANTIZERS = (Nvfp4GlobalScale, Nvfp4BlockScales, QuantizeNvfp4, Fp8Scale, QuantizeFp8)
"""The ops that quantize activations."""

WHOLE_ROWS = (
    RmsNorm,
    TopK,
    GroupLimit,
    TakeAlong,
    TakeRows,
    TakeLast,
    Sum,
    RoundToInt8,
    *QUANTIZERS,
)
"""The ops besides element-wise ones whose results are made row by row."""

PRODUCTS = (Linear, GroupedLinear)
"""The ops whose operands are another matter than their results: a pass asks for what comes before them by itself."""

ANCHORS = (*PRODUCTS, SsdScan, SsdUpdate, Attention)
"""The ops besides row-wise ones whose regions take in the casts around them, whichever pass makes them."""


def is_elementwise(node: Node) -> bool:
    """Whether a node can be computed wherever its operands' elements are at hand."""
    return node.op.is_elementwise or isinstance(node.op, Full)


def is_rowwise(node: Node) -> bool:
    """Whether a node's rows can be computed wherever its operands' rows are at hand."""
    return is_elementwise(node) or isinstance(node.op, WHOLE_ROWS)


def is_narrowing(node: Node) -> bool:
    """Whether a node is a cast to a narrower type."""
    return isinstance(node.op, Cast) and node.op.dtype.bytes < node.op.x.dtype.bytes


def _is_unpacking_step(node: Node) -> bool:
    """Whether a node may stand between what is packed, or rounded, and the product that reads it."""
    step = node.op.is_unpacking or isinstance(node.op, TakeRows | RoundToInt8)
    return step or is_narrowing(node)


def takes_casts(node: Node) -> bool:
    """Whether casts around a node will be in its region, if it comes to be in one."""
    return is_rowwise(node) or isinstance(node.op, ANCHORS)


def has_rows(value: Value, count: Dim) -> bool:
    """Whether a value's leading axes can be seen as so many rows."""
    shape = value.shape
    return any(product(shape[:cut]) == count for cut in range(len(shape) + 1))


def elements(value: Value) -> Dim:
    """How many elements a value has."""
    return product(value.shape)


@dataclass(frozen=True)
class Facts:
    """What a pass finds out about a graph before it grows regions in it; still true while it does.

    Attributes:
        constant: values that parameters alone determine.
        rounded: the types that the step rounds to, which are those in which it keeps values. Where nothing is rounded,
            what is narrow is a parameter, and is widened once.
    """

    constant: set[Value]
    rounded: set[DType]

    @classmethod
    def of(cls, graph: Graph) -> "Facts":
        """The facts about a graph, some of which may be in regions already."""
        constant = constant_values(graph, packed=True)
        step = [node for node in graph.nodes if not constant.issuperset(node.results)]
        regions = [node.op.body.nodes for node in step if isinstance(node.op, Fused)]
        casts = [n.results[0] for n in chain(step, *regions) if is_narrowing(n)]
        return cls(constant, {v.dtype for v in casts})


@dataclass
class Growth:
    """Nodes of a graph that are to become one region.

    Attributes:
        graph: what they belong to.
        facts: what is known of it.
        members: the nodes that the region takes the place of.
        copied: the nodes whose work it repeats.
        refused: wanted nodes that it could not have, and why.
    """

    graph: Graph
    facts: Facts
    members: list[Node]
    copied: list[Node] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)

    def __contains__(self, node: object) -> bool:
        return node in self.members or node in self.copied

    def is_free(self, node: Node | None) -> bool:
        """Whether a node can be taken in at all: it is in no region, and part of the step."""
        return (
            node is not None
            and not isinstance(node.op, Region)
            and not all(v in self.facts.constant for v in node.results)
        )

    def is_tilewise(self, node: Node, result: Value) -> bool:
        """Whether a node quantizes the elements of a result tile by tile, by a scale that is known already."""
        match op := node.op:
            case Nvfp4BlockScales() | QuantizeNvfp4():
                scale = op.global_scale
            case QuantizeFp8():
                scale = op.scale
            case _:
                return False
        return (
            scale in self.facts.constant
            and elements(op.w) == elements(result)
            and op.w.shape[-1] == result.shape[-1]
        )

    def is_widening(self, node: Node) -> bool:
        """Whether a node is a cast of what the step keeps in a narrower type."""
        op = node.op
        return (
            isinstance(op, Cast)
            and op.x.dtype in self.facts.rounded
            and op.dtype.bytes > op.x.dtype.bytes
        )

    def add(self, *nodes: Node, copy: bool = False) -> bool:
        """Take nodes in if that leaves a region that can be; otherwise they are noted as refused."""
        fresh = [node for node in nodes if node not in self]
        members, copied = self.members, self.copied
        if copy:
            copied = [*copied, *fresh]
        else:
            members = [*members, *fresh]
        reason = obstacle(self.graph, members, copied)
        if reason is not None:
            self.refused.setdefault(nodes[-1], reason)
            return False
        self.members, self.copied = members, copied
        return True

    def absorb_producers(
        self,
        value: Value,
        wanted: Wanted,
        shared: Wanted = lambda _: False,
        copies: Wanted = lambda _: False,
    ) -> None:
        """Take in what a value is made from, as far back as it is wanted, though never what is behind a product.

        Args:
            value: an operand of a node of the region.
            wanted: the nodes to take in; views and widening casts are looked through.
            shared: those to take in even if others read them.
            copies: those to repeat if others read them.
        """
        node = self.graph.producers.get(value)
        if node is None or not self.is_free(node):
            return
        if node not in self:
            seen_through = node.op.is_view or self.is_widening(node)
            if not (seen_through or wanted(node)):
                return
            alone = all(self._is_inside(v) for v in node.results)
            stays = alone or shared(node)
            if not (stays or seen_through or copies(node)):
                return
            views = [view for v in node.results for view in self._inner_views(v)] if stays else []
            if not self.add(*views, node, copy=not stays):
                return
        if isinstance(node.op, PRODUCTS):
            return
        for operand in node.op.operands():
            self.absorb_producers(operand, wanted, shared, copies)

    def absorb_unpacking(self) -> None:
        """Take in what unpacks or rounds the operands of products: only products know how to read what it was."""
        for node in list(self.members):
            if isinstance(node.op, PRODUCTS):
                for value in (node.op.x, node.op.w):
                    if self._is_unpacked(value):
                        self.absorb_producers(value, _is_unpacking_step, copies=_is_unpacking_step)

    def _is_unpacked(self, value: Value) -> bool:
        """Whether a value is what something packed or rounded stands for, if by way of views, casts and gathers."""
        node = self.graph.producers.get(value)
        while node is not None and (node.op.is_view or _is_unpacking_step(node)):
            if node.op.is_unpacking or isinstance(node.op, RoundToInt8):
                return True
            node = self.graph.producers.get(node.op.operands()[0])
        return False

    def _inner_views(self, value: Value) -> Iterator[Node]:
        """The views of a value that only the region reads."""
        for user in self.graph.uses.get(value, ()):
            if user.op.is_view and all(map(self._is_inside, user.results)):
                yield user
                yield from self._inner_views(user.results[0])

    def absorb_consumers(self, value: Value, wanted: Wanted) -> None:
        """Take in what reads a value of the region, and what reads that, as far as it is wanted; through views."""
        for path in self.readers(value):
            if path[-1] in self or (wanted(path[-1]) and self.add(*path)):
                for result in path[-1].results:
                    self.absorb_consumers(result, wanted)

    def origin(self, value: Value) -> Node | None:
        """The node behind views and element-wise ops of one operand."""
        node = self.graph.producers.get(value)
        while node is not None and (node.op.is_view or node.op.is_elementwise):
            variable = [v for v in node.op.operands() if v not in self.facts.constant]
            node = self.graph.producers.get(variable[0]) if len(variable) == 1 else None
        return node

    def is_epilogue(self, node: Node) -> bool:
        """Whether a node works on each element of a product, which takes it even if it grows later."""
        size = elements(node.results[0])
        found: Node | None = node
        while found is not None and (found.op.is_elementwise or found.op.is_view):
            whole = [v for v in found.op.operands() if elements(v) == size]
            found = self.graph.producers.get(whole[0]) if len(whole) == 1 else None
        return found is not None and found is not node and isinstance(found.op, PRODUCTS)

    def readers(self, value: Value) -> Iterator[list[Node]]:
        """The nodes that read a value, with the views in between."""
        for node in self.graph.uses.get(value, ()):
            if not self.is_free(node):
                continue
            if node.op.is_view:
                for path in self.readers(node.results[0]):
                    yield [node, *path]
            else:
                yield [node]

    def absorb_sides(self, wanted: Wanted) -> None:
        """Take in wanted producers of all operands but those of products, as far as nobody else reads them."""
        for node in [n for n in self.members if not isinstance(n.op, PRODUCTS)]:
            for value in node.op.operands():
                self.absorb_producers(value, wanted, copies=lambda n: isinstance(n.op, Full))

    def trimmed(self) -> "Growth":
        """The same without what does not belong inside of its borders.

        That is: views and narrowing casts at its rim, copies that nothing in it reads, and widened results. A copy that
        nobody outside reads any more is none.
        """
        members, copied = list(self.members), list(self.copied)
        while True:
            inside = {*members, *copied}
            rim = {
                node
                for node in inside
                if self._is_before(node, inside)
                or (
                    (node.op.is_view or node in copied)
                    and not self._is_read(node, inside.__contains__)
                )
            }
            own = {n for n in copied if not self._is_read_outside(n, members)}
            widened = {
                n for n in members if self._is_read_outside(n, members) and self._is_left_narrow(n)
            }
            if not (rim or own or widened):
                return Growth(self.graph, self.facts, members, copied, self.refused)
            members = [n for n in (*members, *own) if n not in rim and n not in widened]
            copied = [n for n in (*copied, *widened) if n not in rim and n not in own]

    def _is_before(self, node: Node, inside: Collection[Node]) -> bool:
        """Whether a node belongs to whatever makes its operand, and that is none of the nodes inside."""
        producers = self.graph.producers
        if any(producers.get(v) in inside for v in node.op.operands()):
            return False
        if not is_narrowing(node):
            return node.op.is_view
        value = self._behind_views(node.op.operands()[0])
        maker = producers.get(value)
        return (
            maker is not None
            and takes_casts(maker)
            and elements(value) == elements(node.results[0])
        )

    def _is_left_narrow(self, node: Node) -> bool:
        """Whether a node widens a value, or shows a widened one, for readers that can all do so for themselves."""
        (value, *_) = node.results
        maker = self.graph.producers.get(self._behind_views(value))
        return maker is not None and self.is_widening(maker) and self._can_be_widened(value)

    def _behind_views(self, value: Value) -> Value:
        """What a value shows: itself, unless it is a view."""
        while (node := self.graph.producers.get(value)) is not None and node.op.is_view:
            (value,) = node.op.operands()
        return value

    def _can_be_widened(self, value: Value) -> bool:
        """Whether all that read a value, if by way of views, can be in a region with the cast that makes it."""
        if value in self.graph.results:
            return False
        return all(
            self._can_be_widened(user.results[0]) if user.op.is_view else takes_casts(user)
            for user in self.graph.uses.get(value, ())
        )

    @property
    def is_needed(self) -> bool:
        """Whether anybody outside reads a result of the region."""
        return any(self._is_read_outside(node, self.members) for node in self.members)

    def _is_read_outside(self, node: Node, members: Collection[Node]) -> bool:
        if not set(self.graph.results).isdisjoint(node.results):
            return True
        return self._is_read(node, lambda user: user not in members)

    def _is_read(self, node: Node, by: Wanted) -> bool:
        """Whether a node of some kind reads a node's results."""
        return any(by(user) for v in node.results for user in self.graph.uses.get(v, ()))

    def _is_inside(self, value: Value) -> bool:
        """Whether only nodes of the region read a value, if by way of views."""
        if value in self.graph.results:
            return False
        return all(
            user in self.members
            or (
                (user.op.is_view or user in self.copied) and all(map(self._is_inside, user.results))
            )
            for user in self.graph.uses.get(value, ())
        )


def make_region(growth: Growth, ctx: PassContext, pass_name: str, kind: str) -> Graph:
    """The graph with a grown region, if there is anything to fuse and the context allows it.

    Notes what was fused, with what that saves, and what was refused.
    """
    growth.absorb_unpacking()
    graph, growth = growth.graph, growth.trimmed()
    for node, reason in growth.refused.items():
        if node not in growth:
            message = f"{node.op.mnemonic()} stays outside of {kind}: {reason}"
            ctx.refuses(Remark(pass_name, _site(graph, node), message))
    work = [node for node in (*growth.members, *growth.copied) if not node.op.is_view]
    if len(work) < 2 or not growth.is_needed:
        return graph
    fused = fuse(graph, growth.members, kind, growth.copied)
    region = next(n for n in fused.nodes if isinstance(n.op, Fused) and n not in graph.places)
    members = [node for node in growth.members if not node.op.is_view]
    names = [node.op.mnemonic() for node in sorted(work, key=graph.places.__getitem__)]
    remark = Remark(
        pass_name,
        _site(fused, region),
        f"{kind} of {', '.join(names)}",
        saved=sum((node.op.cost() for node in members), Cost()) - region.op.cost(),
        launches=len(members) - 1,
    )
    return fused if ctx.allows(remark) else graph


def _site(graph: Graph, node: Node) -> str:
    return f"{graph.name}/%{node.results[0].name}"
