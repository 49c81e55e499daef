"""A state-space recurrence over many tokens with what is around it, in chunks.

There are two forms, and a plan has both; which one has any programs depends on B and L when it is launched.

- Chunked: three launches with a program for every chunk and some heads of a group. The first makes what each chunk adds
  to the state. The second goes through the chunks one by one and puts the state at each one's start where what it adds
  was. The third makes y and results. Convolved channels never reach memory: the first and the third launch convolve
  what they need. States go through it, in f32.
- Single: one launch with a program for some heads of a group, which keeps their states and goes through all chunks. It
  convolves b and c once for each program, and leaves multiprocessors idle unless there are many heads and sequences.
"""

from dataclasses import dataclass

import sympy

from nemoc.codegen.mixer import Mixer, take_apart
from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.regions import as_region
from nemoc.codegen.triton.chunks import Chunk, Steps
from nemoc.codegen.triton.scan_parts import Recurrence, Results, is_narrow, padded, stages_behind
from nemoc.codegen.triton.seen import Place, Seen, pointer_to, store_tile
from nemoc.codegen.triton.spaces import scan_schedule
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.tokens import Tokens
from nemoc.codegen.triton.work import Work
from nemoc.codegen.triton.writer import power_of_two, size_text
from nemoc.ir.dims import Dim, ceil_div, dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import SsdScan

_LINES = 8
"""Chunks whose step sizes a program of the single form computes at a time."""

_TILES: dict[int | str, tuple[tuple[int, int, int, int, int], ...]] = {
    80: ((64, 32, 8, 32, 64), (32, 16, 8, 32, 32)),
    90: ((128, 64, 4, 128, 128), (64, 16, 8, 32, 32)),
    100: ((128, 64, 4, 128, 128), (64, 16, 8, 64, 64)),
    120: ((64, 32, 8, 32, 64), (32, 16, 8, 32, 32)),
    "gfx942": ((128, 64, 4, 128, 128), (64, 16, 8, 32, 32)),
    "gfx950": ((128, 64, 4, 128, 128), (64, 16, 8, 32, 32)),
}
"""By architecture, where x, b and c are bf16 and where they are not: tokens of a chunk; of the single form tokens of a
chunk, and warps; and `part` and `depth`.

They are as large as registers allow with P = 64 and N = 128. Products of f32 cut both sides in two, and those of 80 and
120 read both sides from registers. On 100 sums lie in tensor memory, of which a program has 512 columns: a product of
f32 takes as much as three.
"""


@dataclass(frozen=True)
class Programs:
    """How the heads of a chunk are shared out.

    Attributes:
        heads: heads of a program; they divide those of a group.
        warps: warps of a program.
    """

    heads: int
    warps: int


@dataclass(frozen=True)
class ScanSchedule:
    """How the two forms are cut into programs, and which is taken.

    Attributes:
        chunk: tokens of a chunk of the chunked form; a power of two, at least 16.
        adding, output: programs of its first and its third launch.
        single_chunk, single: the same for the single form.
        part, depth: tokens of a chunk and columns of a state that a tile has, see `Chunk`; powers of two, at least 16.
        shortest: tokens from which on the chunked form is taken.
        crowd: sequences from which on the single form is taken, however long they are.
        passed: elements of a state that a program of the second launch takes; a power of two.
        ahead: chunks that it loads at a time.
    """

    chunk: int
    adding: Programs
    output: Programs
    single_chunk: int
    single: Programs
    part: int
    depth: int
    shortest: int
    crowd: int
    passed: int = 512
    ahead: int = 4

    def chunked(self, batch: Dim, length: Dim) -> Dim:
        """1 where the chunked form is taken, else 0."""
        return dim(_reaches(length, self.shortest) * (1 - _reaches(batch, self.crowd)))


def _reaches(size: Dim, bound: int) -> Dim:
    """1 if a size is at least a bound, else 0."""
    if isinstance(size, int):
        return int(size >= bound)
    return sympy.Min(1, sympy.floor(size / sympy.Integer(bound)))


def default_scan_schedule(mixer: Mixer, target: GpuTarget) -> ScanSchedule:
    """The schedule that is taken where nothing was tuned.

    The single form is taken for sequences of at most five chunks, where an H100 has them break even, and for so many
    that their heads fill the multiprocessors several times over.
    """
    together = mixer.heads // mixer.groups
    if target.is_interpreter:
        every = Programs(together, 4)
        return ScanSchedule(
            64, every, every, 64, every, 64, 1 << 10, 129, 1 << 20, passed=1 << 14, ahead=1
        )
    some = Programs(_divisor(together, 8), 8)
    narrow = all(is_narrow(mixer.graph, v) for v in (mixer.op.x, mixer.op.b, mixer.op.c))
    chunk, single_chunk, warps, part, depth = _TILES[target.arch][0 if narrow else 1]
    wider = max(1, padded(mixer.width) // 64)  # such heads leave less room for tokens
    chunk, single_chunk = (max(16, tokens // wider) for tokens in (chunk, single_chunk))
    crowd = max(2, -(-4 * target.multiprocessors // mixer.heads))
    # Smaller states are spread over more threads, or what is beside them does not fit.
    one = Programs(1, warps if padded(mixer.columns) >= 128 else 8)
    return ScanSchedule(chunk, some, some, single_chunk, one, part, depth, 5 * chunk + 1, crowd)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of a number up to a bound."""
    return max(n for n in range(1, most + 1) if count % n == 0)


def emit_conv_scan(site: Site, target: GpuTarget, schedule: ScanSchedule | None = None) -> Plan:
    """The plan of a region whose anchor is an `SsdScan`; it updates its states in place.

    Raises:
        RegionError: the region has more in it than such kernels can do; the message says what.
    """
    site = as_region(site)
    mixer = take_apart(site)
    results = Results.of(mixer)
    if schedule is None:
        schedule = scan_schedule(site.choices, default_scan_schedule(mixer, target), mixer)
    scratch = results.scratch(mixer)
    forms = _Forms(site, mixer, results, schedule, len(scratch))
    scratch += (forms.steps,)
    chunked = schedule.chunked(mixer.batch, mixer.length)
    stages: list[Stage] = []
    if chunked != 1:
        stages.append(forms.single(dim(1 - chunked)))
    if chunked != 0:
        stages += [forms.additions(chunked), forms.passing(chunked), forms.outputs(chunked)]
        scratch += (forms.states,)
    stages += stages_behind(site, target, mixer, results, owned=False)
    return Plan(tuple(stages), scratch, updates=mixer.updates)


class _Forms:
    """Writes the launches of both forms.

    Args:
        site, mixer, results, schedule: what is emitted.
        scratch: how many tensors of scratch there are besides.
    """

    def __init__(
        self, site: Site, mixer: Mixer, results: Results, schedule: ScanSchedule, scratch: int
    ) -> None:
        self._site, self._mixer, self._results, self._schedule = site, mixer, results, schedule
        self._steps, self._states = Arg("scratch", scratch), Arg("scratch", scratch + 1)
        self._length = size_text(mixer.length)

    @property
    def steps(self) -> View:
        """dt and g of every token in chunks of either form, see `Steps`."""
        mixer, schedule = self._mixer, self._schedule
        size = max(schedule.chunk, schedule.single_chunk)
        chunks = ceil_div(mixer.length, size)
        return _dense(product((mixer.batch, chunks, mixer.heads)), 2 * size)

    @property
    def states(self) -> View:
        """For each sequence, chunk and head a state; only sequences too few for the single form are in chunks."""
        mixer, schedule = self._mixer, self._schedule
        batch, most = mixer.batch, schedule.crowd - 1
        batch = min(batch, most) if isinstance(batch, int) else sympy.Min(batch, most)
        chunks = ceil_div(mixer.length, schedule.chunk)
        return _dense(product((batch, chunks, mixer.heads, mixer.width)), mixer.columns)

    def single(self, taken: Dim) -> Stage:
        """The launch of the single form; `taken` is 1 if it runs, else 0."""
        mixer, schedule = self._mixer, self._schedule
        kernel = Recurrence("conv_scan", self._site, mixer, self._results)
        writer, size = kernel.writer, schedule.single_chunk
        parts = mixer.heads // schedule.single.heads
        pid = writer.let("pid", "tl.program_id(0)")
        n = writer.let("n", f"{pid} // {parts}")
        first = writer.let("first_head", f"{pid} % {parts} * {schedule.single.heads}")
        group = self._group(kernel, first)
        heads = [writer.let("head", f"{first} + {j}") for j in range(schedule.single.heads)]
        steps = Steps(kernel, mixer, self._steps, size)
        count = writer.let("chunks", _chunks(self._length, size))
        for head in heads:
            self._write_steps(kernel, steps, n, head, count)
        steps.wait()
        places = [self._places(kernel, f"{n} * {mixer.heads} + {head}") for head in heads]
        pointers = [[kernel.state_pointer(at) for at in blocks] for blocks in places]
        states = [
            [writer.fresh("state", load) for load in map(_load, *both)]
            for both in zip(pointers, places, strict=True)
        ]
        with kernel.lean_loop("k", count, self._live(kernel, n)) as k:
            start = writer.let("start", f"{k} * {size}")
            tokens = Tokens.block(writer, n, start, size, mixer.length)
            chunk = self._chunk(kernel, tokens, steps)
            shared = chunk.shared(group, states)
            for head, state, carried in zip(heads, states, shared.carried, strict=True):
                made = chunk.head(head, self._slot(kernel, f"{n} * {count} + {k}", head))
                chunk.store_results(made, shared.scores, carried)
                decay = writer.let("decay", f"tl.exp({steps.total(made.slot)})")
                kept = [f"{block} * {decay}" for block in state]
                for block, new in zip(state, chunk.added(made, shared.b, kept), strict=True):
                    writer.line(f"{block} = {new}")
        if mixer.stores_state:
            writer.barrier()
            for parts_of in zip(pointers, states, places, strict=True):
                for pointer, block, place in zip(*parts_of, strict=True):
                    store_tile(writer, pointer, block, place)
        heads_of, chunks = schedule.single.heads, ceil_div(mixer.length, size)
        work = self._work(size, heads_of, chunks, outputs=True, additions=True)
        tasks = dim(mixer.batch * parts * taken)
        return writer.finish(tasks, schedule.single.warps, 1, work)

    def additions(self, taken: Dim) -> Stage:
        """The launch that makes what each chunk adds to the states, and dt and g for itself and the others."""
        mixer, heads = self._mixer, self._schedule.adding.heads
        kernel = Recurrence("chunk_states", self._site, mixer, self._results)
        writer = kernel.writer
        steps, tokens, number, first = self._chunk_of_program(kernel, heads)
        lines = power_of_two(heads)
        line = writer.let("line", f"tl.arange(0, {lines})[:, None]")
        exists = "" if lines == heads else writer.let("exists", f"{line} < {heads}")
        mine = writer.let("mine", f"{first} + tl.minimum({line}, {heads - 1})")
        slot = self._slot(kernel, number, mine)
        steps.write(tokens.n, tokens.first, mine, slot, self._live(kernel, tokens.n), exists)
        steps.wait()
        chunk = self._chunk(kernel, tokens, steps)
        b = chunk.b(self._group(kernel, first))
        with kernel.lean_loop("j", str(heads), self._live(kernel, tokens.n)) as j:
            head = writer.let("head", f"{first} + {j}")
            slot = self._slot(kernel, number, head)
            places = self._places(kernel, slot)
            zeros = [f"tl.zeros([{at.rows}, {at.columns}], tl.float32)" for at in places]
            added = chunk.added(chunk.head(head, slot), b, zeros)
            for at, block in zip(places, added, strict=True):
                store_tile(writer, self._kept(kernel, at), block, at)
        work = self._work(self._schedule.chunk, heads, 1, outputs=False, additions=True)
        return writer.finish(self._tasks(heads, taken), self._schedule.adding.warps, 1, work)

    def passing(self, taken: Dim) -> Stage:
        """The launch that goes through the chunks: what each adds gives way to the state at its start.

        Some chunks are loaded at a time, before any of them is written, for a load must not wait for the last one.
        """
        mixer, schedule = self._mixer, self._schedule
        kernel = Recurrence("pass_states", self._site, mixer, self._results)
        writer, size = kernel.writer, mixer.width * mixer.columns
        parts = -(-size // schedule.passed)
        pid = writer.let("pid", "tl.program_id(0)")
        row = writer.let("row", f"{pid} // {parts}")
        n, head = (
            writer.let(*it)
            for it in (("n", f"{row} // {mixer.heads}"), ("head", f"{row} % {mixer.heads}"))
        )
        start = "0" if parts == 1 else writer.let("start", f"{pid} % {parts} * {schedule.passed}")
        place = kernel.body.span(start, schedule.passed, size, Place(row, "0", 1, 1))
        old = Seen(mixer.op.state, size)
        final = pointer_to(
            writer, kernel.body.arg(old.value), kernel.body.view(old.value), size, place
        )
        state = writer.fresh("state", kernel.body.tile(old, place))
        steps = Steps(kernel, mixer, self._steps, schedule.chunk)
        base = writer.pointer(self._states, DType.F32)
        count = writer.let("chunks", _chunks(self._length, schedule.chunk))
        masks = f" & {place.mask}" if place.mask else ""
        with writer.loop("k", count, step=schedule.ahead) as k:
            loaded = []
            for ahead in range(schedule.ahead):
                there = writer.let("there", f"{k} + {ahead} < {count}")
                slot = self._slot(kernel, f"{n} * {count} + {k} + {ahead}", head)
                at = f"{base} + (tl.cast({slot}, tl.int64) * {size} + {place.column})"
                at, mask = writer.let("at", at), writer.let("mask", f"{there}{masks}")
                added = writer.let("added", f"tl.load({at}, mask={mask}, other=0.0)")
                loaded.append((at, mask, added, steps.total(slot, there)))
            writer.barrier()
            for at, mask, added, total in loaded:
                writer.line(f"tl.store({at}, {state}, mask={mask})")
                writer.line(f"{state} = {state} * tl.exp({total}) + {added}")
        if mixer.stores_state:
            store_tile(writer, final, state, place)
        chunks = ceil_div(mixer.length, schedule.chunk)
        work = Work(
            loaded=dim(chunks * schedule.passed * DType.F32.bytes),
            steps=ceil_div(chunks, schedule.ahead),
        )
        return writer.finish(dim(mixer.batch * mixer.heads * parts * taken), 4, 1, work)

    def outputs(self, taken: Dim) -> Stage:
        """The launch that makes y and results."""
        mixer, heads = self._mixer, self._schedule.output.heads
        kernel = Recurrence("chunk_outputs", self._site, mixer, self._results)
        writer = kernel.writer
        steps, tokens, number, first = self._chunk_of_program(kernel, heads)
        chunk = self._chunk(kernel, tokens, steps)
        shared = chunk.shared(self._group(kernel, first), [])
        with kernel.lean_loop("j", str(heads), self._live(kernel, tokens.n)) as j:
            head = writer.let("head", f"{first} + {j}")
            slot = self._slot(kernel, number, head)
            places = self._places(kernel, slot)
            loads = (_load(self._kept(kernel, at), at) for at in places)
            carried = chunk.carried(shared.c, [writer.fresh("state", load) for load in loads])
            chunk.store_results(chunk.head(head, slot), shared.scores, carried)
        work = self._work(self._schedule.chunk, heads, 1, outputs=True, additions=False)
        return writer.finish(self._tasks(heads, taken), self._schedule.output.warps, 1, work)

    def _chunk_of_program(self, kernel: Recurrence, heads: int) -> tuple[Steps, Tokens, str, str]:
        """The steps, the chunk that a program of some heads works on, its number and the first head."""
        mixer, size = self._mixer, self._schedule.chunk
        writer, parts = kernel.writer, mixer.heads // heads
        pid = writer.let("pid", "tl.program_id(0)")
        number = writer.let("number", f"{pid} // {parts}")
        first = writer.let("first_head", f"{pid} % {parts} * {heads}")
        count = writer.let("chunks", _chunks(self._length, size))
        n = writer.let("n", f"{number} // {count}")
        start = writer.let("start", f"{number} % {count} * {size}")
        tokens = Tokens.block(writer, n, start, size, mixer.length)
        return Steps(kernel, mixer, self._steps, size), tokens, number, first

    def _write_steps(self, kernel: Recurrence, steps: Steps, n: str, head: str, count: str) -> None:
        """dt and g of all chunks of a head, some at a time."""
        writer, lines = kernel.writer, _LINES
        live = self._live(kernel, n)
        with writer.loop("k", count, step=lines) as k:
            number = writer.let("number", f"{k} + tl.arange(0, {lines})[:, None]")
            exists = writer.let("exists", f"{number} < {count}")
            start = writer.let("start", f"{number} * {self._schedule.single_chunk}")
            slot = self._slot(kernel, f"{n} * {count} + {number}", head)
            steps.write(n, start, head, slot, live, exists)

    def _work(self, size: int, heads: int, chunks: Dim, outputs: bool, additions: bool) -> Work:
        """What a program of some heads does for some chunks of so many tokens, see `nemoc.codegen.triton.chunks`."""
        mixer = self._mixer
        rows, columns = padded(mixer.width), padded(mixer.columns)
        head = 2 * size * rows * columns * (outputs + additions) + 2 * size**2 * rows * outputs
        channels = size * (mixer.columns * (1 + outputs) + heads * mixer.width)
        states = heads * rows * columns * outputs
        return Work(
            flops=dim(chunks * (2 * size**2 * columns * outputs + heads * head)),
            loaded=dim((chunks * channels + states) * DType.F32.bytes),
            steps=dim(chunks * (1 + heads)),
            tile=(min(size, 2 * rows), min(rows, columns)),
        )

    def _tasks(self, heads: int, taken: Dim) -> Dim:
        mixer = self._mixer
        chunks = ceil_div(mixer.length, self._schedule.chunk)
        return dim(mixer.batch * chunks * (mixer.heads // heads) * taken)

    def _group(self, kernel: Recurrence, head: str) -> str:
        return kernel.writer.let("group", f"{head} // {self._mixer.heads // self._mixer.groups}")

    def _slot(self, kernel: Recurrence, chunk: str, head: str) -> str:
        """The number of a head of a chunk, of chunks of all sequences."""
        return kernel.writer.let("slot", f"({chunk}) * {self._mixer.heads} + {head}")

    def _live(self, kernel: Recurrence, n: str) -> str:
        """How many tokens of a sequence are valid."""
        op = self._mixer.op
        assert isinstance(op, SsdScan)
        return kernel.body.tile(Seen(op.valid, 1), Place(n, "0", 1, 1))

    def _chunk(self, kernel: Recurrence, tokens: Tokens, steps: Steps) -> Chunk:
        schedule = self._schedule
        return Chunk(kernel, self._mixer, tokens, schedule.part, schedule.depth, steps)

    def _places(self, kernel: Recurrence, slot: str) -> list[Place]:
        """A state among states one behind the other, as rows of N elements: its blocks of columns."""
        writer, width, columns = kernel.writer, self._mixer.width, self._mixer.columns
        rows, depth = padded(width), self._schedule.depth
        inner = writer.let("line", f"tl.arange(0, {rows})[:, None]")
        exists = ""
        if rows != width:
            exists = writer.let("exists", f"{inner} < {width}")
            inner = writer.let("line", f"tl.minimum({inner}, {width - 1})")
        row = writer.let("row", f"tl.cast({slot}, tl.int64) * {width} + {inner}")
        place = Place(row, "0", rows, 1, exists=exists)
        starts = range(0, columns, depth)
        return [kernel.across(place, str(s), min(depth, columns - s)) for s in starts]

    def _kept(self, kernel: Recurrence, place: Place) -> str:
        """Pointers to a block of a state in scratch."""
        columns = self._mixer.columns
        return pointer_to(kernel.writer, self._states, self.states, columns, place)


def _dense(rows: Dim, columns: int) -> View:
    """A tensor of f32 in scratch."""
    return View(DType.F32, (rows, columns), (columns, 1))


def _load(pointer: str, place: Place) -> str:
    """Load f32 at a place whose rows are clamped: 0 in columns that do not exist."""
    return f"tl.load({pointer}{f', mask={place.mask}, other=0.0' if place.mask else ''})"


def _chunks(length: str, size: int) -> str:
    return f"({length} + {size - 1}) // {size}"
