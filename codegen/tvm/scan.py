"""Prefill of the state-space recurrence, vectorised over the head dimension P.

The chunked dual form (Dao and Gu, arXiv 2405.21060, section 6) exists to feed matrix units: for each token and state
element it costs 4 flops, and the scores come on top. On vector units the recurrence itself takes 3 instructions for
the same (decay, outer product, dot with c), which is no more time, needs neither scores nor masks, ends anywhere and
has the numerics of the definition. It only has to keep the state in registers:

    task: one head of one row; its state is held as strips of `lanes` of the P rows, transposed: [strips, N, lanes]
    for each block of TOKENS tokens, whose b and c stay in L1:
        decays into a tile
        for each strip: dt·x and d·x into tiles
            for each `columns` of the N columns: these columns into registers
                for each token: S ← S · decay + (dt·x) · b[n];  y ← y + S · c[n]      (b[n], c[n] broadcast from memory)

b and c are narrow columns of wide rows, so every token lies on other pages, where no hardware prefetcher follows: each
step asks for the piece of the next block that it has just read of this one.
"""

from nemoc.codegen.plan import Arg, Plan, Site, Stage
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.update import state_in_place
from nemoc.codegen.tvm.vectors import prefetch
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import product
from nemoc.ir.ops.mamba import SsdScan

TOKENS = 32
"""Tokens of a block; a multiple of any vector width."""

_EXPM1 = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0)
"""(eᶻ − 1) / z for −¼ < z ≤ 0, highest power first: the Taylor series."""

_Y = Arg("result", 0)
_NEXT = Arg("result", 1)


def emit_ssd_scan(site: Site, target: CpuTarget) -> Plan:
    """The plan of an `SsdScan`: one launch; the new state may take the old one's place."""
    assert isinstance(site.op, SsdScan)
    return Plan((_Scan(site, target).write(),), in_place=state_in_place(site))


class _Scan:
    """Writes the kernel; attributes hold the names of what one part writes and another uses."""

    def __init__(self, site: Site, target: CpuTarget) -> None:
        self._site = site
        self._lanes = target.lanes
        self._unroll = target.registers // 2
        self._heads, self._rows = (int(n) for n in site.view(_Y).shape[2:])
        self._groups, self._columns = (int(n) for n in site.view(site.arg("b")).shape[2:])
        self._strips = -(-self._rows // self._lanes)
        self._writer = w = KernelWriter("ssd_scan")
        self._x, self._dt, self._a, self._b, self._c, self._valid = (
            self._buffer(site.arg(name)) for name in ("x", "dt", "a", "b", "c", "valid")
        )
        self._skip = self._buffer(site.arg("d")) if site.has("d") else ""
        self._y = self._buffer(_Y)
        self._batch = w.let("n", f"task // {self._heads}")
        self._head = w.let("h", f"task % {self._heads}")
        self._group = w.let("g", f"{self._head} // {self._heads // self._groups}")
        self._s = w.local("s", self._strips * self._columns * self._lanes)
        self._decays, self._steps = w.local("decays", TOKENS), w.local("steps", TOKENS)
        self._driven, self._sums = (w.local(t, TOKENS * self._lanes) for t in ("driven", "sums"))

    def write(self) -> Stage:
        """The stage."""
        w = self._writer
        batch, length = self._site.view(_Y).shape[:2]
        live = w.let("live", f"{self._valid}[{self._batch}]")
        owed = w.value("owed", "T.float32(0)")
        self._copy_state(self._buffer(self._site.arg("state")), inward=True)
        with w.loop("block", f"({size_text(length)} + {TOKENS - 1}) // {TOKENS}") as block:
            first = w.let("first", f"{block} * {TOKENS}")
            count = w.let("count", f"T.min({TOKENS}, {size_text(length)} - {first})")
            self._prepare_decays(first, live, owed)
            with w.loop("strip", self._strips) as strip:
                p = w.let("p", f"{strip} * {self._lanes}")
                self._prepare_inputs(first, count, p)
                whole = self._columns // self._unroll * self._unroll
                with w.loop("m", whole // self._unroll) as m:
                    self._advance(first, count, strip, f"{m} * {self._unroll}", self._unroll)
                if self._columns > whole:
                    self._advance(first, count, strip, str(whole), self._columns - whole)
                self._store_outputs(first, count, p)
        self._copy_state(self._buffer(_NEXT), inward=False)
        return w.finish(product((batch, self._heads)))

    def _copy_state(self, buffer: str, inward: bool) -> None:
        """Copy the head's state into the strips, rows past P as zeros, or back."""
        w, lanes = self._writer, self._lanes
        with w.loop("strip", self._strips) as strip, w.loop("j", self._columns) as j:
            p = w.let("p", f"{strip} * {lanes}")
            with w.loop("i", self._in_strip(p)) as i:
                inside = f"{self._s}[({strip} * {self._columns} + {j}) * {lanes} + {i}]"
                outside = f"{buffer}[{self._batch}, {self._head}, {p} + {i}, {j}]"
                w.line(f"{inside} = {outside}" if inward else f"{outside} = {inside}")
        past = self._strips * lanes - self._rows
        if inward and past:
            with w.loop("j", self._columns) as j, w.loop("i", past) as i:
                row = f"({(self._strips - 1) * self._columns} + {j}) * {lanes}"
                w.line(f"{self._s}[{row} + {lanes - past} + {i}] = T.float32(0)")

    def _prepare_decays(self, first: str, live: str, owed: str) -> None:
        """dt and exp(dt · a) of the block's tokens; dt is 0 from `live` on.

        A decay close to 1 is rounded to a multiple of 2⁻²⁴, always in the same direction when dt hardly changes; over
        thousands of tokens that adds up. So a block's relative errors are summed, and the next block's first decay
        pays them back.
        """
        w, lanes = self._writer, self._lanes
        math = VectorMath(w, lanes)
        rate = w.value("rate", f"{self._a}[{self._head}]")
        with w.loop("t", TOKENS) as t:
            dt = f"{self._dt}[{self._batch}, {first} + {t}, {self._head}]"
            step = f"T.if_then_else({first} + {t} < {live}, {dt}, T.float32(0))"
            w.line(f"{self._steps}[{t}] = {step}")
            w.line(f"{self._decays}[{t}] = {self._steps}[{t}] * {rate}")
        with w.block(f"if {first} < {live}:"):
            w.line(f"{self._decays}[0] = {self._decays}[0] + {owed}")
        w.line(f"{owed} = T.float32(0)")
        with w.loop("v", TOKENS // lanes) as v:
            at = f"T.Ramp({v} * {lanes}, 1, {lanes})"
            z = w.value("z", f"{self._decays}[{at}]", lanes)
            decay = math.exp(z)
            w.line(f"{self._decays}[{at}] = {decay}")
            exact = w.value("exact", f"{z} * {math.polynomial(z, _EXPM1)}", lanes)
            one, zero = math.const(1.0), math.const(0.0)
            lost = f"T.Select({z} > {math.const(-0.25)}, {exact} - ({decay} - {one}), {zero})"
            w.line(f"{owed} = {owed} + {math.total(w.value('lost', lost, lanes))}")

    def _prepare_inputs(self, first: str, count: str, p: str) -> None:
        """dt·x and d·x (or 0) of the block's tokens and the strip from row p on; rows past P count as 0."""
        w, lanes = self._writer, self._lanes
        skip = w.value("skip", f"{self._skip}[{self._head}]") if self._skip else ""
        with w.loop("t", count) as t:
            lead = f"{self._batch}, {first} + {t}, {self._head}"
            at = f"T.Ramp({t} * {lanes}, 1, {lanes})"
            if self._vectors(self._site.arg("x")):
                x = w.value("v", w.load(self._x, f"{lead}, {p}", lanes), lanes)
            else:
                with w.loop("i", lanes) as i:
                    element = f"{self._x}[{lead}, {p} + {i}]"
                    guarded = f"T.if_then_else({p} + {i} < {self._rows}, {element}, T.float32(0))"
                    w.line(f"{self._sums}[{t} * {lanes} + {i}] = {guarded}")
                x = w.value("v", f"{self._sums}[{at}]", lanes)
            w.line(f"{self._driven}[{at}] = {x} * T.Broadcast({self._steps}[{t}], {lanes})")
            y = f"{x} * T.Broadcast({skip}, {lanes})" if skip else VectorMath(w, lanes).const(0.0)
            w.line(f"{self._sums}[{at}] = {y}")

    def _advance(self, first: str, count: str, strip: str, column: str, columns: int) -> None:
        """Take `columns` columns of a strip of the state through the block's tokens, in registers."""
        w, lanes = self._writer, self._lanes
        s = w.local("r", columns, lanes)
        at = f"T.Ramp(({strip} * {self._columns} + {column} + {{}}) * {lanes}, 1, {lanes})"
        with w.loop("j", columns, "T.unroll") as j:
            w.line(f"{s}[{j}] = {self._s}[{at.format(j)}]")
        with w.loop("t", count) as t:
            here = f"T.Ramp({t} * {lanes}, 1, {lanes})"
            decay = w.value("decay", f"T.Broadcast({self._decays}[{t}], {lanes})", lanes)
            x = w.value("x", f"{self._driven}[{here}]", lanes)
            y = w.local("y", 2, lanes)
            w.line(f"{y}[0] = {self._sums}[{here}]")
            w.line(f"{y}[1] = {VectorMath(w, lanes).const(0.0)}")
            for name in (self._b, self._c):
                prefetch(
                    w, name, f"{self._batch}, {first} + {TOKENS} + {t}, {self._group}, {column}"
                )
            with w.loop("j", columns, "T.unroll") as j:
                source = f"[{self._batch}, {first} + {t}, {self._group}, {column} + {j}]"
                b, c = (f"T.Broadcast({name}{source}, {lanes})" for name in (self._b, self._c))
                w.line(f"{s}[{j}] = {s}[{j}] * {decay} + {x} * {b}")
                w.line(f"{y}[{j} % 2] = {y}[{j} % 2] + {s}[{j}] * {c}")
            w.line(f"{self._sums}[{here}] = {y}[0] + {y}[1]")
        with w.loop("j", columns, "T.unroll") as j:
            w.line(f"{self._s}[{at.format(j)}] = {s}[{j}]")

    def _store_outputs(self, first: str, count: str, p: str) -> None:
        w, lanes = self._writer, self._lanes
        with w.loop("t", count) as t:
            lead = f"{self._batch}, {first} + {t}, {self._head}"
            if self._vectors(_Y):
                vector = f"{self._sums}[T.Ramp({t} * {lanes}, 1, {lanes})]"
                w.store(self._y, f"{lead}, {p}", vector, lanes)
            else:
                with w.loop("i", self._in_strip(p)) as i:
                    w.line(f"{self._y}[{lead}, {p} + {i}] = {self._sums}[{t} * {lanes} + {i}]")

    def _in_strip(self, p: str) -> str:
        """How many rows the strip from row p on has."""
        whole = self._rows % self._lanes == 0
        return str(self._lanes) if whole else f"T.min({self._lanes}, {self._rows} - {p})"

    def _vectors(self, arg: Arg) -> bool:
        """Whether the strips of a tensor are whole vectors in memory."""
        return self._rows % self._lanes == 0 and self._site.view(arg).strides[-1] == 1

    def _buffer(self, arg: Arg) -> str:
        return self._writer.buffer(str(arg), arg, self._site.view(arg))
