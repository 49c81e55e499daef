"""The causal convolution over time, vectorised over channels.

A task owns a block of channels, whose taps it first copies into a tile with one row per tap, so that they load as
vectors. With L > 1 tokens are blocked too and the new state is written by a second launch, after every task has read
the old one; with L = 1 one launch does both, for the task of a channel owns its state, in all rows of the batch.
Old and new state are one pointer in the kernels: LLVM is told that different ones do not alias, and moves loads
behind stores.
"""

from collections.abc import Callable, Sequence

from nemoc.codegen.plan import Arg, Plan, Site, Stage
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, product
from nemoc.ir.ops.mamba import CausalConv

CHANNELS = 256
"""Channels of one task: 1 KB of each row."""

TOKENS = 64
"""Tokens of one task."""

_Y = Arg("result", 0)


def emit_causal_conv(site: Site, target: CpuTarget) -> Plan:
    """The plan of a `CausalConv`, which updates its state in place."""
    assert isinstance(site.op, CausalConv)
    if site.view(_Y).shape[1] == 1:
        stages: tuple[Stage, ...] = (_one_token(site, target),)
    else:
        stages = (_all_tokens(site, target), _shift_state(site, target))
    return Plan(stages, updates=((1, site.arg("state").index),))


def _one_token(site: Site, target: CpuTarget) -> Stage:
    """y and the new state for L = 1: the window moves by one where the token is valid."""
    writer = KernelWriter("conv")
    block = _ChannelBlock(writer, site, target)
    x, state, y, valid = block.buffers("x", "state", _Y, "valid")
    block.load_taps()

    def write(d: str, lanes: int) -> None:
        window = [block.load(state, f"{b}, {r}, {d}", lanes) for r in range(block.taps - 1)]
        window.append(block.load(x, f"{b}, 0, {d}", lanes))
        writer.store(y, f"{b}, 0, {d}", block.convolve(window, d, lanes), lanes)
        for r in range(block.taps - 1):
            moved = f"T.Select({valid}[{b}] > 0, {window[r + 1]}, {window[r]})"
            writer.store(state, f"{b}, {r}, {d}", moved, lanes)

    with writer.loop("b", size_text(site.view(_Y).shape[0])) as b:
        block.for_each_vector(write)
    return block.finish(1)


def _all_tokens(site: Site, target: CpuTarget) -> Stage:
    """y of a block of tokens; the first K − 1 tokens look back into the state."""
    writer = KernelWriter("conv")
    block = _ChannelBlock(writer, site, target)
    batch, length = site.view(_Y).shape[:2]
    blocks = ceil_div(length, TOKENS)
    b = writer.let("b", f"{block.row} // {size_text(blocks)}")
    first = writer.let("first", f"{block.row} % {size_text(blocks)} * {TOKENS}")
    end = writer.let("end", f"T.min({first} + {TOKENS}, {size_text(length)})")
    x, state, y = block.buffers("x", "state", _Y)
    block.load_taps()
    back = block.taps - 1

    def write_at(t: str, rows: Sequence[tuple[str, str]]) -> None:
        def write(d: str, lanes: int) -> None:
            window = [block.load(source, f"{b}, {row}, {d}", lanes) for source, row in rows]
            writer.store(y, f"{b}, {t}, {d}", block.convolve(window, d, lanes), lanes)

        block.for_each_vector(write)

    with writer.block(f"if {first} == 0:"):
        joined = [(state, str(r)) for r in range(back)] + [(x, str(r)) for r in range(back)]
        for early in range(back):
            with writer.block(f"if {early} < {end}:"):
                write_at(str(early), joined[early : early + block.taps])
    start = writer.let("start", f"T.max({first}, {back})")
    with writer.loop("k", f"{end} - {start}") as k:
        t = writer.let("t", f"{start} + {k}")
        write_at(t, [(x, f"{t} - {back - j}") for j in range(block.taps)])
    return block.finish(product((batch, blocks)))


def _shift_state(site: Site, target: CpuTarget) -> Stage:
    """The new state: rows valid to valid + K − 2 of state and x joined."""
    writer = KernelWriter("conv_state")
    block = _ChannelBlock(writer, site, target)
    x, state, valid = block.buffers("x", "state", "valid")
    b = block.row
    back = block.taps - 1
    sources = [writer.let("source", f"{valid}[{b}] + {r}") for r in range(back)]

    def write(d: str, lanes: int) -> None:
        kept = [writer.load(state, f"{b}, {row}, {d}", lanes) for row in sources]
        new = [writer.load(x, f"{b}, {row} - {back}, {d}", lanes) for row in sources]
        window = [
            writer.value("v", f"T.if_then_else({row} < {back}, {old}, {fresh})", lanes)
            for row, old, fresh in zip(sources, kept, new, strict=True)
        ]
        for r, value in enumerate(window):
            writer.store(state, f"{b}, {r}, {d}", value, lanes)

    block.for_each_vector(write)
    return block.finish(site.view(_Y).shape[0])


class _ChannelBlock:
    """The channels of one task.

    Attributes:
        row: the task's number without the channel block.
        taps: K.
    """

    def __init__(self, writer: KernelWriter, site: Site, target: CpuTarget) -> None:
        self._writer = writer
        self._site = site
        width, self.taps = (int(n) for n in site.view(site.arg("w")).shape)
        self._width = width
        self._blocks = ceil_div(width, CHANNELS)
        streams = [site.view(a) for a in (site.arg("x"), site.arg("state"), _Y)]
        self._lanes = target.lanes if all(v.strides[-1] == 1 for v in streams) else 1
        self.row = writer.let("row", f"task // {self._blocks}")
        self._first = writer.let("channel", f"task % {self._blocks} * {CHANNELS}")
        self._count = writer.let("count", f"T.min({CHANNELS}, {width} - {self._first})")
        self._tile = self._bias = ""

    def buffers(self, *which: str | Arg) -> list[str]:
        """Declare operands, by name, and results."""
        args = [self._site.arg(a) if isinstance(a, str) else a for a in which]
        return [self._writer.buffer(str(a), a, self._site.view(a)) for a in args]

    def load_taps(self) -> None:
        """Copy the taps of the task's channels into a tile [K, CHANNELS], and the bias into another."""
        writer = self._writer
        (w,) = self.buffers("w")
        self._tile = writer.local("taps", self.taps * CHANNELS)
        if self._site.has("bias"):
            (bias,) = self.buffers("bias")
            self._bias = writer.local("bias", CHANNELS)
        with writer.loop("c", self._count) as c:
            for j in range(self.taps):
                writer.line(f"{self._tile}[{j * CHANNELS} + {c}] = {w}[{self._first} + {c}, {j}]")
            if self._bias:
                writer.line(f"{self._bias}[{c}] = {bias}[{self._first} + {c}]")

    def for_each_vector(self, write: Callable[[str, int], None]) -> None:
        """Loops over the task's channels, `write(first channel, lanes)` being the body."""
        writer, lanes = self._writer, self._lanes
        with writer.loop("v", f"{self._count} // {lanes}") as v:
            write(writer.let("d", f"{self._first} + {v} * {lanes}"), lanes)
        if self._width % lanes:
            whole = f"{self._count} // {lanes} * {lanes}"
            with writer.loop("v", f"{self._count} % {lanes}") as v:
                write(writer.let("d", f"{self._first} + {whole} + {v}"), 1)

    def load(self, buffer: str, index: str, lanes: int) -> str:
        """Load a vector into a variable."""
        return self._writer.value("v", self._writer.load(buffer, index, lanes), lanes)

    def convolve(self, window: Sequence[str], d: str, lanes: int) -> str:
        """bias + Σ taps · window for the channels from d on, as an expression."""

        def tile(name: str, row: int) -> str:
            at = f"{row * CHANNELS} + {d} - {self._first}"
            return f"{name}[{at if lanes == 1 else f'T.Ramp({at}, 1, {lanes})'}]"

        terms = [f"{tile(self._tile, j)} * {x}" for j, x in enumerate(window)]
        return " + ".join([tile(self._bias, 0), *terms] if self._bias else terms)

    def finish(self, rows: Dim) -> Stage:
        """The stage, with a task for each of `rows` values of `row` and each channel block."""
        return self._writer.finish(product((rows, self._blocks)))
