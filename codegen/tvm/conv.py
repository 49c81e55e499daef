"""The causal convolution over time, vectorised over channels.

`Convolution` writes elements of a `CausalConv` wherever a kernel wants them. A task first copies the taps of its
channels into a tile with one row per tap, so that they load as vectors. The first K − 1 tokens look back into the
state: windows are read from state and x joined, or, for the tokens behind them, from x alone.

By itself the convolution runs in tasks of a block of channels. With L > 1 tokens are blocked too and the new state is
written by a second launch, after every task has read the old one; with L = 1 one launch does both, for the task of a
channel owns its state, in all rows of the batch. Old and new state are one pointer in the kernels: LLVM is told that
different ones do not alias, and moves loads behind stores.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nemoc.codegen.plan import Arg, Plan, Site, Stage
from nemoc.codegen.regions import alone, body_of
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import Body, Rows, Source, ramp, rows_view
from nemoc.codegen.tvm.loops import each_vector
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, product
from nemoc.ir.ops.mamba import CausalConv

CHANNELS = 256
"""Channels of one task: 1 KB of each row."""

_TOKENS = Tunable("tokens", 64, (16, 32, 64, 128, 256))
"""Tokens of one task."""


def emit_causal_conv(site: Site, target: CpuTarget) -> Plan:
    """The plan of a `CausalConv`, which updates its state in place."""
    region = alone(site)
    (node,) = body_of(region).nodes
    assert isinstance(node.op, CausalConv)
    if node.op.x.shape[1] == 1:
        stages: tuple[Stage, ...] = (_one_token(region, target, node.op),)
    else:
        stages = (_all_tokens(region, target, node.op), shift_state(region, target, node.op))
    return Plan(stages, updates=((1, site.arg("state").index),))


@dataclass(frozen=True)
class Channels:
    """Channels that a task convolves, with their taps in a tile.

    Attributes:
        first: the first one's number, int32.
        count: how many: an integer, or an int32 expression.
        room: columns of the tile.
        tile: the tile's name, [K, room].
        bias: the name of a tile for the bias, [room]; empty for none.
    """

    first: str
    count: int | str
    room: int
    tile: str
    bias: str

    def convolve(self, window: list[str], channel: str, lanes: int) -> str:
        """bias + Σ taps · window for the channels from one on, as an expression."""
        at = f"{channel} - {self.first}"
        terms = [
            f"{self.tile}[{ramp(f'{j * self.room} + {at}', lanes)}] * {x}"
            for j, x in enumerate(window)
        ]
        return " + ".join([f"{self.bias}[{ramp(at, lanes)}]", *terms] if self.bias else terms)


class Convolution:
    """Writes elements of a body's `CausalConv`, and its next state, into a kernel.

    Args:
        writer: the kernel, at its beginning.
        body: the body; what x, the taps and the bias are made from is declared in it.
        op: the convolution; its state is an operand of the region.

    Attributes:
        taps: K.
        x: x by its rows, one for each token.
        lanes: channels that can be written at once: a full vector, or 1.
    """

    def __init__(self, writer: KernelWriter, body: Body, op: CausalConv) -> None:
        self._writer = writer
        self._body = body
        self._length = op.x.shape[1]
        self.taps = int(op.w.shape[1])
        self.x = Rows.of(op.x)
        self._w = Rows(op.w, (), 2)
        self._bias = None if op.bias is None else Rows(op.bias, ())
        self._valid = Rows(op.valid, op.valid.shape, 0)
        body.declare(self.x, self._w, self._valid, *([self._bias] if self._bias else ()))
        state = body.view(op.state)
        self._state = writer.buffer("history", body.arg(op.state), state)
        self.lanes = body.lanes(self.x) if state.strides[-1] == 1 else 1

    def channels(self, first: str, count: int | str, room: int) -> Channels:
        """Copy the taps and the bias of some channels into tiles."""
        w, body = self._writer, self._body
        tile = w.local("taps", self.taps * room)
        bias = w.local("bias", room) if self._bias else ""
        with w.loop("c", count) as c:
            for j in range(self.taps):
                tap = body.at(self._w, "0", f"({first} + {c}) * {self.taps} + {j}", 1)
                w.line(f"{tile}[{j * room} + {c}] = {tap}")
            if self._bias:
                w.line(f"{bias}[{c}] = {body.at(self._bias, '0', f'{first} + {c}', 1)}")
        return Channels(first, count, room, tile, bias)

    def source(self, channels: Channels, n: str, early: bool) -> Source:
        """Elements of the result, to be bound to its value.

        Args:
            channels: those that will be asked for.
            n: the row of the batch, to which all tokens belong that will be asked for.
            early: whether they may be among the first K − 1 tokens; otherwise none of them is.
        """
        back = self.taps - 1

        def convolved(row: str, column: str, lanes: int) -> str:
            w = self._writer
            row, d = w.let("row", row), w.let("d", column)
            if self._length == 1:
                window = self._one_window(n, d, lanes)
            elif early:
                t = w.let("t", f"{row} - {n} * {size_text(self._length)}")
                window = [self._joined(n, f"{t} + {j}", d, lanes) for j in range(back)]
                window.append(self._body.at(self.x, row, d, lanes))
            else:
                window = [
                    self._body.at(self.x, f"{row} - {back - j}", d, lanes) for j in range(self.taps)
                ]
            return channels.convolve(window, d, lanes)

        return convolved

    def for_each_token(self, first: str, count: str, write: Callable[[str, bool], None]) -> None:
        """Loops over a block of tokens, `write(token of the block, early)` being the body.

        Args:
            first: the number of the block's first token in its row of the batch, int32.
            count: how many tokens the block has, int32.
            write: writes the statements for a token; `early` as `source` takes it.
        """
        w = self._writer
        early = w.let("early", f"T.max(T.min({self.taps - 1} - ({first}), {count}), 0)")
        with w.loop("t", early) as t:
            write(t, True)
        with w.loop("k", f"{count} - {early}") as k:
            write(w.let("t", f"{early} + {k}"), False)

    def shift(self, first: str, count: int | str, n: str) -> None:
        """Write the next state of some channels: rows valid to valid + K − 2 of state and x joined.

        Args:
            first: the first channel's number, int32.
            count: how many: an integer, or the name of an int32.
            n: the row of the batch.
        """
        w, back = self._writer, self.taps - 1
        live = w.value("live", self._body.at(self._valid, n, "0", 1), dtype="int32")

        def write(at: str, lanes: int) -> None:
            d = w.let("d", f"{first} + {at}")
            if self._length == 1:
                window = self._one_window(n, d, lanes)
                moved = [f"T.Select({live} > 0, {window[r + 1]}, {window[r]})" for r in range(back)]
            else:
                moved = [self._joined(n, f"{live} + {r}", d, lanes) for r in range(back)]
            for r, value in enumerate(moved):
                w.store(self._state, f"{n}, {r}, {d}", value, lanes)

        each_vector(w, count, self.lanes, write)

    def _one_window(self, n: str, d: str, lanes: int) -> list[str]:
        """State and x of the one token."""
        w = self._writer
        rows = range(self.taps - 1)
        window = [w.value("v", w.load(self._state, f"{n}, {r}, {d}", lanes), lanes) for r in rows]
        return [*window, self._body.at(self.x, n, d, lanes)]

    def _joined(self, n: str, index: str, d: str, lanes: int) -> str:
        """A row of state and x joined; both are read where they exist."""
        w, back = self._writer, self.taps - 1
        index = w.let("index", index)
        old = w.load(self._state, f"{n}, T.min({index}, {back - 1}), {d}", lanes)
        row = f"{n} * {size_text(self._length)} + T.max({index} - {back}, 0)"
        new = self._body.at(self.x, row, d, lanes)
        return w.value("v", f"T.Select({index} < {back}, {old}, {new})", lanes)


def shift_state(site: Site, target: CpuTarget, op: CausalConv) -> Stage:
    """The launch that writes the next state of all channels of a region's convolution."""
    task = _ChannelTask("conv_state", site, target, op)
    task.conv.shift(task.first, task.count, task.row)
    return task.finish(op.x.shape[0])


def _one_token(site: Site, target: CpuTarget, op: CausalConv) -> Stage:
    """y and the new state for L = 1."""
    task = _ChannelTask("conv", site, target, op)
    task.load_taps()
    with task.writer.loop("b", size_text(op.x.shape[0])) as b:
        task.convolve(b, b, early=True)
        task.conv.shift(task.first, task.count, b)
    return task.finish(1)


def _all_tokens(site: Site, target: CpuTarget, op: CausalConv) -> Stage:
    """y of a block of tokens."""
    batch, length = op.x.shape[:2]
    task = _ChannelTask("conv", site, target, op)
    w = task.writer
    tokens = w.pick(_TOKENS)
    blocks = ceil_div(length, tokens)
    b = w.let("b", f"{task.row} // {size_text(blocks)}")
    first = w.let("first", f"{task.row} % {size_text(blocks)} * {tokens}")
    count = w.let("count", f"T.min({tokens}, {size_text(length)} - {first})")
    task.load_taps()
    start = f"{b} * {size_text(length)} + {first}"
    task.conv.for_each_token(
        first, count, lambda t, early: task.convolve(b, f"{start} + {t}", early)
    )
    return task.finish(product((batch, blocks)))


class _ChannelTask:
    """A kernel whose tasks are blocks of channels.

    Attributes:
        writer: the kernel.
        conv: the convolution.
        row: the task's number without the channel block.
        first: the first channel of the block.
        count: how many channels it has.
    """

    def __init__(self, stem: str, site: Site, target: CpuTarget, op: CausalConv) -> None:
        self.writer = w = KernelWriter(stem, site.choices)
        self._site = site
        self._body = Body(w, site, target)
        self._y = self._body.graph.outputs[0]
        self.conv = Convolution(w, self._body, op)
        width = op.x.shape[2]
        assert isinstance(width, int)
        self._blocks = -(-width // CHANNELS)
        self.row = w.let("row", f"task // {self._blocks}")
        self.first = w.let("channel", f"task % {self._blocks} * {CHANNELS}")
        self.count: int | str = min(CHANNELS, width)
        if width > CHANNELS and width % CHANNELS:
            self.count = w.let("count", f"T.min({CHANNELS}, {width} - {self.first})")

    def load_taps(self) -> None:
        """Get ready to convolve."""
        self._channels = self.conv.channels(self.first, self.count, CHANNELS)
        rows = Rows.of(self._y)
        view = self._site.results[0]
        self._store = self.writer.buffer("y", Arg("result", 0), rows_view(view, rows))
        self._lanes = self.conv.lanes if view.strides[-1] == 1 else 1

    def convolve(self, n: str, row: str, early: bool) -> None:
        """Write the result for one token, of row n of the batch."""
        source = self.conv.source(self._channels, n, early)

        def write(at: str, lanes: int) -> None:
            d = self.writer.let("d", f"{self.first} + {at}")
            self.writer.store(self._store, f"{row}, {d}", source(row, d, lanes), lanes)

        each_vector(self.writer, self.count, self._lanes, write)

    def finish(self, rows: Dim) -> Stage:
        """The stage, with a task for each of `rows` values of `row` and each channel block."""
        return self.writer.finish(product((rows, self._blocks)))
