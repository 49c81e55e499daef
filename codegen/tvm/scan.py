"""Prefill of the state-space recurrence, vectorised over the head dimension P.

The chunked dual form (Dao and Gu, arXiv 2405.21060, section 6) exists to feed matrix units: for each token and state
element it costs 4 flops, and the scores come on top. On vector units the recurrence itself takes 3 instructions for
the same (decay, outer product, dot with c), which is no more time, needs neither scores nor masks, ends anywhere and
has the numerics of the definition. It only has to keep the state in registers:

    task: some heads of a group, of one row; the state of each is held as strips of `lanes` of the P rows, transposed:
          [strips, N, lanes]
    for each block of tokens:
        b and c of the group into tiles, and dt of the heads
        for each head:
            decays into a tile
            for each strip: dt·x and d·x into tiles
                for each `columns` of the N columns: these columns into registers
                    for each token: S ← S · decay + (dt·x) · b[n];  y ← y + S · c[n]  (b[n], c[n] broadcast from tiles)
        for each token: what the results make of y

What comes from a convolution is convolved where it is read: it exists for one block of tokens. x, b and c are narrow
columns of wide rows, so every token lies on other pages, where no hardware prefetcher follows: each step asks for the
piece of the next block that it has just read of this one.
"""

from nemoc.codegen.mixer import Mixer, take_apart
from nemoc.codegen.plan import Plan, Site, Stage
from nemoc.codegen.regions import alone
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.body import ramp
from nemoc.codegen.tvm.mixer_task import MixerTask
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import size_text
from nemoc.ir.ops.mamba import SsdScan

_TOKENS = Tunable("tokens", 32, (16, 32, 64), keeps_bits=False)
"""Tokens of a block, a multiple of any vector width; what decays lose by rounding is paid back block by block."""

_EXPM1 = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0)
"""(eᶻ − 1) / z for −¼ < z ≤ 0, highest power first: the Taylor series."""


def emit_ssd_scan(site: Site, target: CpuTarget) -> Plan:
    """The plan of an `SsdScan`: one launch, which updates the state in place."""
    assert isinstance(site.op, SsdScan)
    region = alone(site)
    mixer = take_apart(region)
    task = MixerTask("ssd_scan", region, target, mixer, heads=1)
    return Plan((write_scan(task, target, mixer),), updates=mixer.updates)


def write_scan(task: MixerTask, target: CpuTarget, mixer: Mixer) -> Stage:
    """The launch that takes the state through all tokens."""
    return _Scan(task, target, mixer).write()


class _Scan:
    """Writes the kernel; attributes hold the names of what one part writes and another uses."""

    def __init__(self, task: MixerTask, target: CpuTarget, mixer: Mixer) -> None:
        self._task = task
        self._mixer = mixer
        self._lanes = lanes = target.lanes
        half = target.registers // 2
        columns = Tunable("columns", half, (half // 2, half, half * 3 // 2), keeps_bits=False)
        self._unroll = task.writer.pick(columns)
        self._tokens = task.writer.pick(_TOKENS)
        self._rows, self._columns = mixer.width, mixer.columns
        self._strips = -(-self._rows // lanes)
        self._padded = task.heads * self._strips * lanes
        self._writer = w = task.writer
        self._state = w.buffer(
            "state", task.body.arg(mixer.op.state), task.body.view(mixer.op.state)
        )
        self._s = w.local("s", self._padded * self._columns)
        self._b, self._c = (w.local(t, self._tokens * self._columns) for t in ("b", "c"))
        self._raw = w.local("dt", self._tokens * task.heads)
        self._decays, self._steps = w.local("decays", self._tokens), w.local("steps", self._tokens)
        self._owed = w.local("owed", task.heads)
        self._driven = w.local("driven", self._tokens * lanes)
        self._y = w.local("y", self._tokens * self._padded)

    def write(self) -> Stage:
        """The stage."""
        w, task = self._writer, self._task
        live = w.let("live", task.scalar("valid", task.n, "0"))
        with w.loop("j", task.heads) as j:
            w.line(f"{self._owed}[{j}] = T.float32(0)")
            self._copy_state(j, inward=True)
        length = size_text(self._mixer.length)
        with w.loop("block", f"({length} + {self._tokens - 1}) // {self._tokens}") as block:
            first = w.let("first", f"{block} * {self._tokens}")
            count = w.let("count", f"T.min({self._tokens}, {length} - {first})")
            self._prepare_block(first, count)
            with w.loop("j", task.heads) as j:
                h = w.let("h", f"{task.head} + {j}")
                self._prepare_decays(first, live, j, h)
                with w.loop("strip", self._strips) as strip:
                    self._prepare_inputs(first, count, j, h, strip)
                    whole = self._columns // self._unroll * self._unroll
                    with w.loop("m", whole // self._unroll) as m:
                        self._advance(count, j, strip, f"{m} * {self._unroll}", self._unroll)
                    if self._columns > whole:
                        self._advance(count, j, strip, str(whole), self._columns - whole)
            with w.loop("t", count) as t:
                self._store_results(first, t)
        if self._mixer.stores_state:
            with w.loop("j", task.heads) as j:
                self._copy_state(j, inward=False)
        if self._mixer.owns_history(task.heads):
            task.shift_history()
        return task.finish()

    def _copy_state(self, j: str, inward: bool) -> None:
        """Copy a head's state into its strips, rows past P as zeros, or back."""
        w, lanes = self._writer, self._lanes
        with w.loop("strip", self._strips) as strip, w.loop("k", self._columns) as k:
            p = w.let("p", f"{strip} * {lanes}")
            at = w.let(
                "at", f"(({j} * {self._strips} + {strip}) * {self._columns} + {k}) * {lanes}"
            )
            with w.loop("i", self._in_strip(p)) as i:
                inside = f"{self._s}[{at} + {i}]"
                outside = f"{self._state}[{self._task.n}, {self._task.head} + {j}, {p} + {i}, {k}]"
                w.line(f"{inside} = {outside}" if inward else f"{outside} = {inside}")
            if inward and self._rows % lanes:
                with w.loop("i", f"{lanes} - {self._in_strip(p)}") as i:
                    w.line(f"{self._s}[{at} + {self._in_strip(p)} + {i}] = T.float32(0)")

    def _prepare_block(self, first: str, count: str) -> None:
        """b, c and dt of a block's tokens."""
        w, task = self._writer, self._task

        def copy(t: str, early: bool) -> None:
            row = w.let("row", f"{task.row} + {first} + {t}")
            for name, tile in (("b", self._b), ("c", self._c)):
                task.copy(name, row, tile, f"{t} * {self._columns}", early, ahead=self._tokens)
            task.steps(row, self._raw, f"{t} * {task.heads}")

        task.for_each_token(first, count, copy)

    def _prepare_decays(self, first: str, live: str, j: str, h: str) -> None:
        """dt and exp(dt · a) of the block's tokens; dt is 0 from `live` on.

        A decay close to 1 is rounded to a multiple of 2⁻²⁴, always in the same direction when dt hardly changes; over
        thousands of tokens that adds up. So a block's relative errors are summed, and the next block's first decay
        pays them back.
        """
        w, lanes = self._writer, self._lanes
        math = VectorMath(w, lanes)
        rate, owed = self._task.scalar("a", "0", h), f"{self._owed}[{j}]"
        with w.loop("t", self._tokens) as t:
            dt = f"{self._raw}[{t} * {self._task.heads} + {j}]"
            step = f"T.if_then_else({first} + {t} < {live}, {dt}, T.float32(0))"
            w.line(f"{self._steps}[{t}] = {step}")
            w.line(f"{self._decays}[{t}] = {self._steps}[{t}] * {rate}")
        with w.block(f"if {first} < {live}:"):
            w.line(f"{self._decays}[0] = {self._decays}[0] + {owed}")
        w.line(f"{owed} = T.float32(0)")
        with w.loop("v", self._tokens // lanes) as v:
            at = f"T.Ramp({v} * {lanes}, 1, {lanes})"
            z = w.value("z", f"{self._decays}[{at}]", lanes)
            decay = math.exp(z)
            w.line(f"{self._decays}[{at}] = {decay}")
            exact = w.value("exact", f"{z} * {math.polynomial(z, _EXPM1)}", lanes)
            one, zero = math.const(1.0), math.const(0.0)
            lost = f"T.Select({z} > {math.const(-0.25)}, {exact} - ({decay} - {one}), {zero})"
            w.line(f"{owed} = {owed} + {math.total(w.value('lost', lost, lanes))}")

    def _prepare_inputs(self, first: str, count: str, j: str, h: str, strip: str) -> None:
        """dt·x and d·x (or 0) of the block's tokens and a strip of a head's rows; rows past P count as 0."""
        w, task, lanes = self._writer, self._task, self._lanes
        skip = task.scalar("d", "0", h) if self._mixer.op.d is not None else ""
        p = w.let("p", f"{strip} * {lanes}")
        column = w.let("column", f"{j} * {self._rows} + {p}")

        def prepare(t: str, early: bool) -> None:
            row = w.let("row", f"{task.row} + {first} + {t}")
            at = f"T.Ramp({t} * {lanes}, 1, {lanes})"
            if task.parts["x"].lanes == lanes:
                x = task.read("x", row, column, lanes, early)
            else:
                with w.loop("i", lanes) as i:
                    w.line(f"{self._driven}[{t} * {lanes} + {i}] = T.float32(0)")
                with w.loop("i", self._in_strip(p)) as i:
                    one = task.read("x", row, f"{column} + {i}", 1, early)
                    w.line(f"{self._driven}[{t} * {lanes} + {i}] = {one}")
                x = w.value("v", f"{self._driven}[{at}]", lanes)
            if not early:
                task.fetch("x", f"{row} + {self._tokens}", column)
            y = f"{x} * T.Broadcast({skip}, {lanes})" if skip else VectorMath(w, lanes).const(0.0)
            w.line(f"{self._y}[{self._in_y(t, j, strip)}] = {y}")
            w.line(f"{self._driven}[{at}] = {x} * T.Broadcast({self._steps}[{t}], {lanes})")

        task.for_each_token(first, count, prepare)

    def _advance(self, count: str, j: str, strip: str, column: str, columns: int) -> None:
        """Take `columns` columns of a strip of a head's state through the block's tokens, in registers."""
        w, lanes = self._writer, self._lanes
        s = w.local("r", columns, lanes)
        first = w.let(
            "first", f"(({j} * {self._strips} + {strip}) * {self._columns} + {column}) * {lanes}"
        )
        at = f"T.Ramp({first} + {{}} * {lanes}, 1, {lanes})"
        with w.loop("k", columns, "T.unroll") as k:
            w.line(f"{s}[{k}] = {self._s}[{at.format(k)}]")
        with w.loop("t", count) as t:
            decay = w.value("decay", f"T.Broadcast({self._decays}[{t}], {lanes})", lanes)
            x = w.value("x", f"{self._driven}[T.Ramp({t} * {lanes}, 1, {lanes})]", lanes)
            y = w.local("sums", 2, lanes)
            w.line(f"{y}[0] = {self._y}[{self._in_y(t, j, strip)}]")
            w.line(f"{y}[1] = {VectorMath(w, lanes).const(0.0)}")
            with w.loop("k", columns, "T.unroll") as k:
                b, c = (
                    f"T.Broadcast({tile}[{t} * {self._columns} + {column} + {k}], {lanes})"
                    for tile in (self._b, self._c)
                )
                w.line(f"{s}[{k}] = {s}[{k}] * {decay} + {x} * {b}")
                w.line(f"{y}[{k} % 2] = {y}[{k} % 2] + {s}[{k}] * {c}")
            w.line(f"{self._y}[{self._in_y(t, j, strip)}] = {y}[0] + {y}[1]")
        with w.loop("k", columns, "T.unroll") as k:
            w.line(f"{self._s}[{at.format(k)}] = {s}[{k}]")

    def _in_y(self, t: str, j: str, strip: str) -> str:
        """Where y of a token lies in the tile [tokens, heads, strips · lanes]: a strip."""
        at = f"{t} * {self._padded} + ({j} * {self._strips} + {strip}) * {self._lanes}"
        return f"T.Ramp({at}, 1, {self._lanes})"

    def _store_results(self, first: str, t: str) -> None:
        """What the results make of one token's y."""
        task, whole = self._task, self._rows % self._lanes == 0

        def computed(_: str, column: str, lanes: int) -> str:
            here = self._writer.let("here", f"{column} - {task.first}")
            if not whole:
                head, p = f"{here} // {self._rows}", f"{here} % {self._rows}"
                here = f"{head} * {self._strips * self._lanes} + {p}"
            return f"{self._y}[{ramp(f'{t} * {self._padded} + {here}', lanes)}]"

        row = self._writer.let("row", f"{task.row} + {first} + {t}")
        task.store(row, computed, self._lanes)

    def _in_strip(self, p: str) -> str:
        """How many rows the strip from row p on has."""
        whole = self._rows % self._lanes == 0
        return str(self._lanes) if whole else f"T.min({self._lanes}, {self._rows} - {p})"
