"""What the kernels of the state-space recurrence share: what a task reads, and how it writes results.

A task owns some heads of one group in one row of the batch. Where x, b and c come from a convolution within the
region, it convolves their channels itself; b and c belong to the whole group, so the more of its heads a task owns the
less is done twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nemoc.codegen.mixer import PARTS, Mixer
from nemoc.codegen.plan import Arg, RegionError, Site, Stage, View
from nemoc.codegen.tvm.body import Body, Rows, Source, ramp, rows_view
from nemoc.codegen.tvm.conv import Channels, Convolution
from nemoc.codegen.tvm.loops import each_vector, sum_elements
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import prefetch
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import product
from nemoc.ir.ops import RmsNorm, SsdScan
from nemoc.ir.types import Value

Y = Arg("scratch", 0)
"""The recurrence's result in the plan's scratch."""

SHORTEST = 4
"""Lanes of the shortest vectors in use."""

TASKS = 2
"""Tasks of each row of the batch below which groups are divided: as many as the smallest machines have threads."""


def heads_per_task(mixer: Mixer, room: int) -> int:
    """How many heads a task owns: a divisor of those of a group, at most `room` of them.

    Without a convolution nothing is done twice, and every head is a task.
    """
    if mixer.conv is None:
        return 1
    together = mixer.heads // mixer.groups
    fits = [
        n
        for n in range(1, together + 1)
        if together % n == 0 and n <= room and mixer.heads // n >= TASKS
    ]
    return max(fits, default=1)


@dataclass(frozen=True)
class Part:
    """The columns of x, b or c that a task needs.

    Attributes:
        rows: the operand, by tokens.
        first: the first column, int32.
        count: how many.
        lanes: how many of them can be read at once, from a multiple of them on: a full vector, or 1.
        channels: the channels that they are made from, if they come from the convolution.
        stream: the memory that they come from, by rows of tokens; empty where that is no operand of the region.
    """

    rows: Rows
    first: str
    count: int
    lanes: int
    channels: Channels | None
    stream: str


class MixerTask:
    """A kernel around a recurrence.

    Args:
        stem: a word for the kernel's name.
        site: the region.
        target: the CPU.
        mixer: the region taken apart.
        heads: how many heads a task owns.
        scratch: whether y itself goes into the plan's scratch, for results that need whole rows.

    Attributes:
        writer: the kernel.
        body: the region's body.
        n: the task's row of the batch.
        head: its first head.
        heads: how many heads it owns.
        first: the first of its columns of x and y.
        row: the number of its row's first token.
        parts: what it reads of x, b and c.
    """

    def __init__(
        self,
        stem: str,
        site: Site,
        target: CpuTarget,
        mixer: Mixer,
        heads: int,
        scratch: bool = False,
    ) -> None:
        self.writer = w = KernelWriter(stem, site.choices)
        self.body = Body(w, site, target)
        self._site = site
        self._target = target
        self._mixer = mixer
        self.heads = heads
        parts = mixer.heads // heads
        self.n = w.let("n", f"task // {parts}")
        self.head = w.let("head", f"task % {parts} * {heads}")
        self._group = w.let("group", f"{self.head} // {mixer.heads // mixer.groups}")
        self.row = w.let("row", f"{self.n} * {size_text(mixer.length)}")
        self._conv = None if mixer.conv is None else Convolution(w, self.body, mixer.conv)
        self._by_column = {
            Arg("result", i): rows
            for i, rows in mixer.rows.items()
            if mixer.by_column(rows, heads * mixer.width)
        }
        if scratch:
            self._by_column[Y] = mixer.y
        found = (v for rows in self._by_column.values() for v in mixer.norms(rows))
        self._norms = tuple(dict.fromkeys(found))
        self._declare()
        self._buffers = {
            arg: w.buffer("out", arg, rows_view(self._stored(arg), rows))
            for arg, rows in self._by_column.items()
        }
        self.parts = {name: self._part(name) for name in PARTS}
        self.first = self.parts["x"].first

    @property
    def columns(self) -> int:
        """Columns of y that a task writes."""
        return self.heads * self._mixer.width

    def scalar(self, name: str, row: str, column: str) -> str:
        """An element of the operand dt, a, d or valid."""
        return self.body.at(self._facts[name], row, column, 1)

    def steps(self, row: str, into: str, start: str) -> None:
        """Copy dt of the task's heads for one token into a local array."""
        w = self.writer
        rows = self._facts["dt"]
        lanes = math.gcd(self.heads, self.body.lanes(rows))
        if lanes < SHORTEST:
            lanes = 1
        with w.loop("v", self.heads // lanes) as v:
            at = f"{v} * {lanes}"
            dt = self.body.at(rows, row, f"{self.head} + {at}", lanes)
            w.line(f"{into}[{ramp(f'{start} + {at}', lanes)}] = {dt}")

    def for_each_token(self, first: str, count: str, write: Callable[[str, bool], None]) -> None:
        """Loops over a block of tokens as `Convolution.for_each_token` does."""
        if self._conv is None:
            with self.writer.loop("t", count) as t:
                write(t, False)
        else:
            self._conv.for_each_token(first, count, write)

    def copy(self, name: str, row: str, into: str, start: str, early: bool, ahead: int = 0) -> None:
        """Copy the task's columns of x, b or c of one token into a local array.

        Args:
            name: x, b or c.
            row: the token's row.
            into: the array.
            start: where in it.
            early: as for `Convolution.source`.
            ahead: how many tokens ahead to ask for memory; 0 for not at all.
        """

        def write(at: str, lanes: int) -> None:
            found = self.read(name, row, at, lanes, early)
            self.writer.line(f"{into}[{ramp(f'{start} + {at}', lanes)}] = {found}")
            if ahead and not early:
                self.fetch(name, f"{row} + {ahead}", at)

        each_vector(self.writer, self.parts[name].count, self.parts[name].lanes, write)

    def read(self, name: str, row: str, at: str, lanes: int, early: bool) -> str:
        """Elements of x, b or c from a column on, of those that the task needs."""
        part = self.parts[name]
        with self.body.bindings():
            if self._conv is not None and self._mixer.convolved is not None and part.channels:
                source = self._conv.source(part.channels, self.n, early)
                self.body.bind(self._mixer.convolved, source)
            return self.body.at(part.rows, row, f"{part.first} + {at}", lanes)

    def fetch(self, name: str, row: str, at: str) -> None:
        """Ask for the memory that `read` will want, of a token that need not exist."""
        part = self.parts[name]
        if part.stream:
            first = part.channels.first if part.channels else part.first
            prefetch(self.writer, part.stream, f"{row}, {first} + {at}")

    def shift_history(self) -> None:
        """Write the convolution's next state of the task's channels, which no other task may read."""
        for part in self.parts.values():
            if self._conv is not None and part.channels:
                self._conv.shift(part.channels.first, part.count, self.n)

    def store(self, row: str, y: Source, lanes: int) -> None:
        """Write the task's columns of one token's results.

        Args:
            row: the token's row.
            y: elements of the recurrence's result in the task's columns.
            lanes: how many of them `y` can give at once at most.
        """
        if self._mixer.width % lanes:  # vectors would begin anywhere
            lanes = 1
        w, first = self.writer, self.first
        with self.body.bindings():
            self.body.bind(self._mixer.y.value, y)
            for value in self._norms:
                self._normalize(value, row, lanes)
            for arg, rows in self._by_column.items():

                def write(at: str, n: int, arg: Arg = arg, rows: Rows = rows) -> None:
                    column = w.let("column", f"{first} + {at}")
                    found = self.body.at(rows, row, column, n)
                    w.store(self._buffers[arg], f"{row}, {column}", found, n)

                most = lanes if self._stored(arg).strides[-1] == 1 else 1
                each_vector(w, self.columns, min(most, self.body.lanes(rows)), write)

    def finish(self) -> Stage:
        """The stage."""
        return self.writer.finish(product((self._mixer.batch, self._mixer.heads // self.heads)))

    def _declare(self) -> None:
        """Declare what all of the kernel needs, and see how wide it can be read."""
        mixer, body = self._mixer, self.body
        op = mixer.op
        self._facts = {"dt": mixer.read(op.dt), "a": Rows(op.a, ())}
        if op.d is not None:
            self._facts["d"] = Rows(op.d, ())
        if isinstance(op, SsdScan):
            self._facts["valid"] = Rows(op.valid, op.valid.shape, 0)
        read = [mixer.read(getattr(op, name)) for name in PARTS]
        with body.bindings():
            for value in (mixer.y.value, mixer.convolved):
                if value is not None:
                    body.bind(value, _later)
            body.declare(*read, *self._facts.values(), *self._by_column.values())
            for value in self._norms:
                body.declare(*self._normalized(value))
            self._lanes = {n: body.lanes(rows) for n, rows in zip(PARTS, read, strict=True)}

    def _part(self, name: str) -> Part:
        mixer, conv = self._mixer, self._conv
        rows = mixer.read(getattr(mixer.op, name))
        if name == "x":
            first, each, count = f"{self.head} * {mixer.width}", mixer.width, self.columns
        else:
            first, each, count = f"{self._group} * {mixer.columns}", mixer.columns, mixer.columns
        first, shift = self.writer.let("first", first), mixer.channels.get(name, 0)
        lanes = self._lanes[name] if conv is None else min(self._lanes[name], conv.lanes)
        if each % lanes or shift % lanes:  # vectors would begin anywhere
            lanes = 1
        channels, source = None, rows
        if conv is not None:
            at = self.writer.let("channel", f"{first} + {shift}")
            channels, source = conv.channels(at, count, count), conv.x
        stream = ""
        if self.body.is_operand(source.value):
            view = rows_view(self.body.view(source.value), source)
            stream = self.writer.buffer("ahead", self.body.arg(source.value), view)
        return Part(rows, first, count, lanes, channels, stream)

    def _stored(self, arg: Arg) -> View:
        return View.dense(self._mixer.y.value.type) if arg == Y else self._site.view(arg)

    def _normalized(self, value: Value) -> tuple[Rows, Rows]:
        """The operands of a norm, by rows."""
        op = self.body.graph.producers[value].op
        assert isinstance(op, RmsNorm)
        return Rows.of(op.x), Rows(op.weight, ())

    def _normalize(self, value: Value, row: str, lanes: int) -> None:
        """Compute the task's columns of a norm's operand, and bind the norm to what it makes of them."""
        w, body, start = self.writer, self.body, self.first
        op = body.graph.producers[value].op
        assert isinstance(op, RmsNorm)
        x, weight = self._normalized(value)
        width = x.width // op.groups
        held = w.local("held", self.columns)
        scales = w.local("scales", self.columns // width)
        with w.loop("g", self.columns // width) as group:

            def square(at: str, n: int) -> str:
                here = w.let("here", f"{group} * {width} + {at}")
                v = w.value("v", body.at(x, row, f"{start} + {here}", n), n)
                w.line(f"{held}[{ramp(here, n)}] = {v}")
                return f"{v} * {v}"

            total = sum_elements(w, width, min(lanes, body.lanes(x)), x.value.dtype, square)
            mean = f"{total} / T.float32({width}) + T.float32({op.eps!r})"
            w.line(f"{scales}[{group}] = T.float32(1) / T.sqrt({mean})")

        def normalized(_: str, column: str, n: int) -> str:
            here = w.let("here", f"{column} - {start}")
            scale = f"{scales}[{here} // {width}]"
            if n > 1:
                scale = f"T.Broadcast({scale}, {n})"
            return f"{held}[{ramp(here, n)}] * {scale} * {body.at(weight, '0', column, n)}"

        body.bind(value, normalized)


def _later(_row: str, _column: str, _lanes: int) -> str:
    """Elements of a value that is bound while its users are declared, and to something else when they are written."""
    raise RegionError("a value was read before it was computed")
