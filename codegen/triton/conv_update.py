"""One token of a state-space recurrence with what is around it: the state streams through once.

A program takes some rows of the states of one group's heads, convolves the channels that these read, updates the rows
in place and computes their elements of y and of results. b and c are convolved by every program of a group: a few loads
from the cache, against the states from memory. The old history is read by all of them, so that the next one is written
by a second launch, unless a program takes a whole group.
"""

from dataclasses import dataclass, replace

from nemoc.codegen.mixer import Mixer, take_apart
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.regions import as_region
from nemoc.codegen.triton.conv import shift_history
from nemoc.codegen.triton.scan_parts import Recurrence, Results, stages_behind
from nemoc.codegen.triton.seen import Place, store_tile
from nemoc.codegen.triton.spaces import update_schedule
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.tokens import Tokens
from nemoc.codegen.triton.work import Work
from nemoc.codegen.triton.writer import power_of_two
from nemoc.ir.dims import dim
from nemoc.ir.dtypes import DType

_TILE = 1 << 13
"""Elements of a state that a program takes at most: 64 registers of each of 128 threads."""


@dataclass(frozen=True)
class UpdateSchedule:
    """How the states of a group are cut into programs.

    Attributes:
        rows: rows of N elements that a program takes; a power of two. Rows of several heads lie one behind the other.
        warps: of a program.
    """

    rows: int
    warps: int


def default_update_schedule(mixer: Mixer, target: GpuTarget) -> UpdateSchedule:
    """A head for each program, or half of one where the heads of one sequence would leave multiprocessors idle.

    The fewer rows a program has, the more often b and c are convolved; which size is best is to be measured.
    """
    together = mixer.heads // mixer.groups * mixer.width
    if target.is_interpreter:
        return UpdateSchedule(power_of_two(together), 4)
    rows = power_of_two(mixer.width)
    if mixer.heads < target.multiprocessors and rows >= 32:
        rows //= 2
    return UpdateSchedule(min(rows, max(1, _TILE // power_of_two(mixer.columns))), 4)


def emit_conv_update(site: Site, target: GpuTarget, schedule: UpdateSchedule | None = None) -> Plan:
    """The plan of a region whose anchor is an `SsdUpdate`; it updates its states in place.

    Raises:
        RegionError: the region has more in it than such kernels can do; the message says what.
    """
    site = as_region(site)
    mixer = take_apart(site)
    results = Results.of(mixer)
    if schedule is None:
        default = default_update_schedule(mixer, target)
        schedule = update_schedule(site.choices, default, mixer, target)
    owned = schedule.rows >= mixer.heads // mixer.groups * mixer.width and mixer.owns_history(
        mixer.heads // mixer.groups
    )
    update = _Update(site, mixer, results, schedule)
    update.write(owned)
    tasks = dim(mixer.batch * mixer.groups * update.parts)
    stages = [update.kernel.writer.finish(tasks, schedule.warps, work=update.work)]
    stages += stages_behind(site, target, mixer, results, owned)
    return Plan(tuple(stages), results.scratch(mixer), updates=mixer.updates)


class _Update:
    """Writes the kernel.

    Attributes:
        kernel: it.
        parts: programs of a group.
    """

    def __init__(
        self, site: Site, mixer: Mixer, results: Results, schedule: UpdateSchedule
    ) -> None:
        self.kernel = Recurrence("conv_update", site, mixer, results)
        self._mixer, self._schedule = mixer, schedule
        self._together = mixer.heads // mixer.groups * mixer.width
        self.parts = -(-self._together // schedule.rows)

    @property
    def work(self) -> Work:
        """What a program does: its rows of the state, and the channels of b and c with their history."""
        mixer = self._mixer
        taps = 1 if mixer.conv is None else mixer.conv.w.shape[1]
        return Work(loaded=dim((self._schedule.rows + 2 * taps) * mixer.columns * DType.F32.bytes))

    def write(self, owned: bool) -> None:
        """Everything; `owned`: the next history too."""
        kernel, mixer = self.kernel, self._mixer
        writer, rows = kernel.writer, self._schedule.rows
        pid = writer.let("pid", "tl.program_id(0)")
        n = writer.let("n", f"{pid} // {mixer.groups * self.parts}")
        group = writer.let("group", f"{pid} // {self.parts} % {mixer.groups}")
        start = writer.let("start", f"{group} * {self._together} + {pid} % {self.parts} * {rows}")
        kernel.take(Tokens(n, n))
        one = Place(n, "0", 1, 1)
        mine = self._rows(one, start, group)
        heads = self._heads(mine, start)
        across = kernel.across(
            one, writer.let("first", f"{group} * {mixer.columns}"), mixer.columns
        )
        x = kernel.part("x", mine)
        b, c = (kernel.part(name, across) for name in ("b", "c"))
        y = self._advance(mine, heads, x, b, c)
        kernel.store(y, mine)
        if owned and mixer.conv is not None:
            for name, place in (("x", mine), ("b", across), ("c", across)):
                column = writer.let("channel", f"{mixer.channels[name]} + {place.column}")
                shift_history(kernel.body, mixer.conv, n, replace(place, column=column))

    def _rows(self, one: Place, start: str, group: str) -> Place:
        """The program's rows of the state, as columns of x and y: a tile [rows, 1]."""
        writer, rows = self.kernel.writer, self._schedule.rows
        column = writer.let("column", f"{start} + tl.arange(0, {rows})[:, None]")
        mask = ""
        if self._together % rows:
            end = f"({group} + 1) * {self._together}"
            mask = writer.let("inside", f"{column} < {end}")
            column = writer.let("column", f"tl.minimum({column}, {end} - 1)")
        return replace(one, column=column, mask=mask)

    def _heads(self, mine: Place, start: str) -> Place:
        """The heads that these rows belong to, as columns of dt: a number where they are one."""
        width = self._mixer.width
        first = start if width % self._schedule.rows == 0 else mine.column
        head = self.kernel.writer.let("head", f"{first} // {width}")
        return replace(mine, column=head, mask="")

    def _advance(self, mine: Place, heads: Place, x: str, b: str, c: str) -> str:
        """S ← exp(dt·a)·S + (dt·x) ⊗ b; returns S·c + d·x."""
        kernel, mixer = self.kernel, self._mixer
        writer = kernel.writer
        each = mixer.heads * mixer.width
        row = writer.let("row", f"tl.cast({mine.row}, tl.int64) * {each} + {mine.column}")
        state = kernel.across(
            Place(row, "0", self._schedule.rows, 1, exists=mine.mask), "0", mixer.columns
        )
        pointer = kernel.state_pointer(state)
        masks = f", mask={state.mask}, other=0.0" if state.mask else ""
        old = writer.let("old", f"tl.load({pointer}{masks})")
        dt = kernel.dt(heads)
        decay = writer.let("decay", f"tl.exp({dt} * {kernel.rate(heads)})")
        driven = writer.let("driven", f"{dt} * {x}")
        new = writer.let("new", f"{old} * {decay} + {driven} * {b}")
        if mixer.stores_state:
            writer.barrier()
            store_tile(writer, pointer, new, state)
        skip = kernel.skip(heads)
        skipped = f" + {skip} * {x}" if skip else ""
        return writer.let("y", f"tl.sum({new} * {c}, axis=1, keep_dims=True){skipped}")
