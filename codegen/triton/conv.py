"""The causal convolution over time, and the history that it leaves.

`Convolution` gives a body the convolved channels wherever a kernel wants them: nothing is stored, since whoever needs
an element reads the K inputs that it is made from, which neighbours have brought into the cache already. Only the first
K − 1 tokens of a sequence look back into its history.

The next history is written by a launch of its own behind everyone who reads the old one, or, where a program is the
only reader of its channels, by that program once it has read them.
"""

from dataclasses import replace

from nemoc.codegen.plan import Plan, RegionError, Site, Stage
from nemoc.codegen.regions import as_region, body_of
from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.seen import Place, Seen, pointer_to, store_tile
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.tokens import Tokens
from nemoc.codegen.triton.writer import KernelWriter, power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, product
from nemoc.ir.graph import Graph
from nemoc.ir.ops import Cast, CausalConv
from nemoc.ir.types import Value

_TILE = 4096
"""Elements that a program convolves."""

_CHANNELS = 512
"""Channels of a program at most."""


class Convolution:
    """Writes elements of a body's convolution, of the tokens at hand and of any channels.

    Args:
        body: the body.
        op: its convolution, whose state is an operand of the region.
        convolved: the op's first result.
        tokens: those that will be asked for.
    """

    def __init__(self, body: Body, op: CausalConv, convolved: Value, tokens: Tokens) -> None:
        self._body, self._op, self._tokens = body, op, tokens
        self._back = taps(op) - 1
        self._channels = channels(op)
        body.hold(convolved, self._tile)

    def _tile(self, seen: Seen, place: Place) -> str:
        if seen.width != self._channels or place.row != self._tokens.row:
            raise RegionError(f"%{seen.value.name} is needed elsewhere than where its tokens are")
        return self._body.writer.once(
            f"convolved @{place.row},{place.column}", lambda: self._write(place)
        )

    def _write(self, place: Place) -> str:
        """bias + Σ taps · inputs."""
        body, op, tokens = self._body, self._op, self._tokens
        bias = ""
        if op.bias is not None:
            one = replace(place, row="0", rows=1, exists="")
            bias = f" + {body.tile(Seen(op.bias, self._channels), one)}"
        newest = body.tile(Seen(op.x, self._channels), place)
        terms = [f"{newest} * {self._tap(str(self._back), place)}"]
        if not tokens.t:
            for j in map(str, range(self._back)):
                terms.append(f"{_old(body, op, tokens.n, j, place)} * {self._tap(j, place)}")
        sums = body.writer.fresh("convolved", " + ".join(terms) + bias)
        if tokens.t:
            # A loop, for unrolled its loads would all be in registers at once.
            with body.writer.loop("j", str(self._back)) as j:
                self._add_term(sums, j, place)
        return sums

    def _add_term(self, sums: str, j: str, place: Place) -> None:
        """Add the term of one tap but the last: inputs some tokens earlier, from the history where there are none."""
        body, tokens = self._body, self._tokens
        writer = body.writer
        back = writer.let("back", f"{self._back} - {j}")
        tap = self._tap(j, place)
        writer.line(f"{sums} += {self._before(back, place)} * {tap}")
        with writer.block(f"if {tokens.first} < {self._back}:"):
            there = writer.let("there", f"{tokens.t} < {back}")
            row = writer.let("old", f"tl.minimum({tokens.t} + {j}, {self._back - 1})")
            mask = writer.let("mask", f"{there} & {place.mask}") if place.mask else there
            old = _old(body, self._op, tokens.n, row, replace(place, mask=mask))
            writer.line(f"{sums} += {old} * {tap}")

    def _before(self, back: str, place: Place) -> str:
        """The inputs some tokens earlier; 0 in front of the sequence's first one."""
        body, tokens = self._body, self._tokens
        writer = body.writer
        start = f"{tokens.n} * {size_text(self._op.x.shape[1])}"
        row = writer.let("row", f"tl.maximum({tokens.row} - {back}, {start})")
        within = writer.let("within", f"{tokens.t} >= {back}")
        seen = Seen(self._op.x, self._channels)
        if _shows_operand(body.graph, self._op.x):  # what is not loaded is 0
            mask = writer.let("mask", f"{within} & {place.mask}") if place.mask else within
            return body.tile(seen, replace(place, row=row, mask=mask))
        tile = body.tile(seen, replace(place, row=row))
        return writer.let("x", f"tl.where({within}, {tile}, 0.0)")

    def _tap(self, j: str, place: Place) -> str:
        """The weights of one tap."""
        writer, count = self._body.writer, self._back + 1
        column = writer.let("tap", f"{place.column} * {count} + {j}")
        at = replace(place, row="0", rows=1, column=column, exists="")
        return self._body.tile(Seen(self._op.w, self._channels * count), at)


def taps(op: CausalConv) -> int:
    """K."""
    count = op.w.shape[1]
    assert isinstance(count, int)
    return count


def channels(op: CausalConv) -> int:
    """D.

    Raises:
        RegionError: the number is not fixed.
    """
    width = op.x.shape[2]
    if not isinstance(width, int):
        raise RegionError(f"%{op.x.name} has channels of no fixed number")
    return width


def shift_history(body: Body, op: CausalConv, n: str, place: Place) -> None:
    """Write the next history of a sequence's channels: rows valid to valid + K − 2 of history and x joined.

    All of a program's channels are read before any is written, and nobody else may read them.
    """
    writer, back, width = body.writer, taps(op) - 1, channels(op)
    live = body.tile(Seen(op.valid, 1), Place(n, "0", 1, 1))
    length = op.x.shape[1]
    moved = []
    for r in range(back):
        index = writer.let("index", f"{live} + {r}")
        old = _old(body, op, n, f"tl.minimum({index}, {back - 1})", place)
        row = n
        if length != 1:
            row = f"{n} * {size_text(length)} + tl.maximum({index} - {back}, 0)"
        new = body.tile(Seen(op.x, width), replace(place, row=writer.let("row", row)))
        moved.append(writer.let("moved", f"tl.where({index} < {back}, {old}, {new})"))
    writer.barrier()
    for r, tile in enumerate(moved):
        at = replace(place, row=_old_row(writer, n, str(r), back))
        store_tile(
            writer, pointer_to(writer, body.arg(op.state), body.view(op.state), width, at), tile, at
        )


def history_stage(site: Site, op: CausalConv) -> Stage:
    """The launch that writes the next history of a region's convolution; each channel is one program's."""
    writer = KernelWriter("history")
    body = Body(writer, site)
    width = channels(op)
    columns = min(_CHANNELS, power_of_two(width))
    blocks = -(-width // columns)
    pid = writer.let("pid", "tl.program_id(0)")
    n = writer.let("n", f"{pid} // {blocks}")
    start = "0" if blocks == 1 else writer.let("start", f"{pid} % {blocks} * {columns}")
    shift_history(body, op, n, body.span(start, columns, width, Place(n, "0", 1, 1)))
    return writer.finish(dim(op.x.shape[0] * blocks))


def emit_causal_conv(site: Site, target: GpuTarget) -> Plan:
    """The plan of a `CausalConv`, alone or in a region of what is computed token by token.

    It updates its state in place.

    Raises:
        RegionError: a result is not computed from the tokens at hand.
    """
    site = as_region(site)
    graph = body_of(site)
    found = [node for node in graph.nodes if isinstance(node.op, CausalConv)]
    if len(found) != 1:
        raise RegionError(f"the region has {len(found)} ops causal_conv")
    (node,) = found
    op = node.op
    assert isinstance(op, CausalConv)
    convolved, following = node.results
    if op.state not in graph.inputs:
        raise RegionError(f"%{op.state.name} is made within the region, expected an old state")
    stages: list[Stage] = []
    wanted = [i for i, value in enumerate(graph.outputs) if value is not following]
    if wanted:
        stages.append(_all_tokens(site, op, convolved, wanted))
    updates = [i for i, value in enumerate(graph.outputs) if value is following]
    if len(updates) > 1:
        raise RegionError("a state is updated for several results")
    if updates:
        stages.append(history_stage(site, op))
    return Plan(tuple(stages), updates=tuple((i, graph.inputs.index(op.state)) for i in updates))


def _all_tokens(site: Site, op: CausalConv, convolved: Value, wanted: list[int]) -> Stage:
    """The launch that writes the results: a program takes some tokens and channels."""
    writer = KernelWriter("conv")
    body = Body(writer, site)
    batch, length = op.x.shape[:2]
    seen = {i: Seen.by_count(body.graph.outputs[i], product((batch, length))) for i in wanted}
    width = max((s.width for s in seen.values() if s is not None), default=1)
    columns = min(_CHANNELS, power_of_two(width))
    rows = 1 if length == 1 else max(1, _TILE // columns)
    blocks = -(-width // columns)
    chunks: Dim = ceil_div(length, rows)
    pid = writer.let("pid", "tl.program_id(0)")
    block = writer.let("block", f"{pid} // {blocks}")
    if length == 1:
        tokens = Tokens(block, block)
    else:
        count = writer.let("chunks", f"({size_text(length)} + {rows - 1}) // {rows}")
        n = writer.let("n", f"{block} // {count}")
        first = writer.let("first", f"{block} % {count} * {rows}")
        tokens = Tokens.block(writer, n, first, rows, length)
    Convolution(body, op, convolved, tokens)
    start = "0" if blocks == 1 else writer.let("start", f"{pid} % {blocks} * {columns}")
    for i, result in seen.items():
        if result is None or result.width != width:
            raise RegionError(f"%{body.graph.outputs[i].name} has other rows than the convolution")
        body.store(i, result, body.span(start, columns, width, tokens.place))
    return writer.finish(product((batch, chunks, blocks)))


def _old(body: Body, op: CausalConv, n: str, row: str, place: Place) -> str:
    """A row of a sequence's history."""
    at = replace(place, row=_old_row(body.writer, n, row, taps(op) - 1))
    return body.tile(Seen(op.state, channels(op)), at)


def _old_row(writer: KernelWriter, n: str, row: str, back: int) -> str:
    return writer.let("row", f"{n} * {back} + {row}")


def _shows_operand(graph: Graph, value: Value) -> bool:
    """Whether a value is 0 wherever its elements are not loaded."""
    while value in graph.producers:
        op = graph.producers[value].op
        if not isinstance(op, Cast):
            return False
        value = op.x
    return True
