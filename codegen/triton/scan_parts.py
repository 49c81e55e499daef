"""What kernels around a state-space recurrence share: how they read its operands, and how they write results.

x, b, c, dt, a and d are made where they are needed, from whatever the region makes them of; where that is a
convolution, of its inputs. Convolved channels never reach memory.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nemoc.codegen.mixer import Mixer
from nemoc.codegen.plan import Arg, Site, Stage, View
from nemoc.codegen.regions import body_of
from nemoc.codegen.rows import Rows
from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.conv import Convolution, history_stage
from nemoc.codegen.triton.rows import emit_rows
from nemoc.codegen.triton.seen import Place, Seen, pointer_to, store_tile
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.tokens import Tokens
from nemoc.codegen.triton.writer import KernelWriter, power_of_two
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph
from nemoc.ir.ops import Cast, Reshape, Slice
from nemoc.ir.region import Fused
from nemoc.ir.types import Value

Y = Arg("scratch", 0)
"""The recurrence's result in the plan's scratch, where a result needs whole rows of it."""


@dataclass(frozen=True)
class Results:
    """How a region's results are made from y.

    Attributes:
        columns: those that need y in the same column alone: they are written where y is made.
        whole: those that need more of a row: they are computed from y in scratch.
    """

    columns: dict[int, Rows]
    whole: dict[int, Rows]

    @classmethod
    def of(cls, mixer: Mixer) -> "Results":
        """The results other than states."""
        columns = {
            i: rows
            for i, rows in mixer.rows.items()
            if not mixer.norms(rows) and mixer.by_column(rows, mixer.width)
        }
        return cls(columns, {i: r for i, r in mixer.rows.items() if i not in columns})

    def scratch(self, mixer: Mixer) -> tuple[View, ...]:
        """y in scratch, if anything needs it there."""
        return (View.dense(mixer.y.value.type),) if self.whole else ()


class Recurrence:
    """Writes what a kernel reads of a recurrence, and results of a region.

    Args:
        stem: a word for the kernel's name.
        site: the region.
        mixer: the region taken apart.
        results: how its results are made.

    Attributes:
        writer: the kernel.
        body: the region's body.
    """

    def __init__(self, stem: str, site: Site, mixer: Mixer, results: Results) -> None:
        self.writer = KernelWriter(stem)
        self.body = Body(self.writer, site)
        self._mixer = mixer
        self._results = results
        op = mixer.op
        inner, shared = mixer.heads * mixer.width, mixer.groups * mixer.columns
        self._seen = {"x": Seen(op.x, inner), "b": Seen(op.b, shared), "c": Seen(op.c, shared)}
        self._narrow = {n: is_narrow(mixer.graph, s.value) for n, s in self._seen.items()}

    def take(self, tokens: Tokens) -> None:
        """Work on these tokens from now on."""
        mixer = self._mixer
        if mixer.conv is not None and mixer.convolved is not None:
            Convolution(self.body, mixer.conv, mixer.convolved, tokens)

    @contextmanager
    def lean_loop(self, prefix: str, stop: str, natural: str) -> Iterator[str]:
        """A loop whose registers are for its tiles; gives the counter.

        Compilers would also keep what is the same in every iteration, and a pointer for each address that advances by
        the same amount: more than there are registers. The first is forbidden; of the second nothing is known if the
        counter is combined with a zero that only running tells.

        Args:
            prefix: of the counter's name.
            stop: the number of iterations.
            natural: a number that is not negative, from memory.
        """
        zero = self.writer.let("zero", f"{natural} >> 31")
        counter = self.writer.name(prefix)
        with self.writer.block(f"for {counter} in tl.range(0, {stop}, disable_licm=True):"):
            yield self.writer.let(prefix, f"{counter} ^ {zero}")

    def across(self, place: Place, first: str, count: int) -> Place:
        """Columns from one on, for the rows of a place: as many as tiles of products can have."""
        columns = padded(count)
        inner = self.writer.let("inner", f"tl.arange(0, {columns})[None, :]")
        mask = "" if columns == count else self.writer.let("inside", f"{inner} < {count}")
        column = self.writer.let("column", inner if first == "0" else f"{first} + {inner}")
        return replace(place, column=column, columns=columns, mask=mask)

    def part(self, name: str, place: Place) -> str:
        """A tile of x, b or c, 0 in columns that do not exist."""
        tile = self.body.tile(self._seen[name], place)
        return self.writer.let(name, f"tl.where({place.mask}, {tile}, 0.0)") if place.mask else tile

    def factor(self, name: str, place: Place) -> "Factor":
        """A tile of x, b or c to be multiplied with."""
        tile = self.part(name, place)
        if not self._narrow[name]:
            return Factor(tile)
        return Factor(self.writer.let(name, f"{tile}.to(tl.bfloat16)"), True)

    def dt(self, place: Place) -> str:
        """A tile of dt; columns are heads."""
        return self.body.tile(Seen(self._mixer.op.dt, self._mixer.heads), place)

    def rate(self, heads: Place) -> str:
        """a of the heads that are a place's columns."""
        at = replace(heads, row="0", rows=1)
        return self.body.tile(Seen(self._mixer.op.a, self._mixer.heads), at)

    def skip(self, heads: Place) -> str:
        """d of the heads that are a place's columns; empty without d."""
        d = self._mixer.op.d
        if d is None:
            return ""
        return self.body.tile(Seen(d, self._mixer.heads), replace(heads, row="0", rows=1))

    def state_pointer(self, place: Place) -> str:
        """Pointers into the state, as rows of N elements."""
        state = self._mixer.op.state
        view = self.body.view(state)
        return pointer_to(self.writer, self.body.arg(state), view, self._mixer.columns, place)

    def store(self, y: str, place: Place) -> None:
        """Write what results need of y at a place."""
        seen = Seen(self._mixer.y.value, self._mixer.heads * self._mixer.width)
        self.body.bind(seen, place, y)
        for i, rows in self._results.columns.items():
            self.body.store(i, Seen(rows.value, seen.width), place)
        if self._results.whole:
            view = View.dense(seen.value.type)
            store_tile(self.writer, pointer_to(self.writer, Y, view, seen.width, place), y, place)


@dataclass(frozen=True)
class Factor:
    """A tile that enters a matrix product.

    Attributes:
        tile: its name, or an expression.
        narrow: whether it is of bf16, else of f32.
    """

    tile: str
    narrow: bool = False

    @property
    def turned(self) -> "Factor":
        """The transposed tile."""
        return Factor(f"tl.trans({self.tile})", self.narrow)

    def times(self, other: "Factor", sums: str) -> str:
        """sums + self · other, as an expression; of f32 against bf16 the f32 side is cut to 16 bits."""
        name = "dot"
        if self.narrow != other.narrow:
            name = "dot_near_right" if self.narrow else "dot_near"
        return f"{name}({self.tile}, {other.tile}, {sums})"


def is_narrow(graph: Graph, value: Value) -> bool:
    """Whether a value of f32 is known to be bf16 in every element, so that nothing is lost in making it that."""
    while value in graph.producers:
        op = graph.producers[value].op
        if isinstance(op, Cast):
            return op.x.dtype == DType.BF16
        if not isinstance(op, Reshape | Slice):
            return False
        value = op.x
    return False


def padded(count: int) -> int:
    """The size of a tile of a product that holds so many rows or columns."""
    return max(16, power_of_two(count))


def stages_behind(
    site: Site, target: GpuTarget, mixer: Mixer, results: Results, owned: bool
) -> list[Stage]:
    """The launches behind those of the recurrence.

    Args:
        site, target, mixer, results: what is emitted.
        owned: whether the recurrence's programs have written the convolution's next history.
    """
    stages: list[Stage] = []
    if results.whole:
        stages.extend(_whole_rows(site, target, mixer, results))
    if mixer.stores_history and mixer.conv is not None and not owned:
        stages.append(history_stage(site, mixer.conv))
    return stages


def _whole_rows(site: Site, target: GpuTarget, mixer: Mixer, results: Results) -> list[Stage]:
    """The launches that compute results from y in scratch: those of a region that has y for an operand."""
    graph, y = body_of(site), mixer.y.value
    numbers = list(results.whole)
    outputs = tuple(graph.outputs[i] for i in numbers)
    read, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if y not in node.results and not read.isdisjoint(node.results):
            kept.append(node)
            read.update(node.op.operands())
    body = dataclasses.replace(
        graph, inputs=(*graph.inputs, y), nodes=tuple(reversed(kept)), outputs=outputs
    )
    operands = (*site.operands, View.dense(y.type))
    wanted = tuple(site.results[i] for i in numbers)
    region = Site(Fused(body.inputs, body), operands, wanted, site.choices)

    def given(arg: Arg) -> Arg:
        if arg.kind == "result":
            return Arg("result", numbers[arg.index])
        return Y if arg == Arg("operand", len(site.operands)) else arg

    return [
        dataclasses.replace(stage, args=tuple(map(given, stage.args)))
        for stage in emit_rows(region, target).stages
    ]
