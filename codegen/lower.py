"""From graphs to launches: which kernels a step runs, on which memory.

Each node becomes a view (no launch), or the stages of its plan; a region that no kernel carries out becomes its ops.
Values lie in arenas: weights and state at the offsets of their layouts, inputs and outputs behind pointers of their
own, everything else in scratch. Once all launches are known they are put into phases, and then scratch is planned.

A state is updated in place: a result that a plan calls an update of an operand takes the operand's memory, unless
someone still reads the old value; then the update happens on a copy. Where the next value of a state, or an
output, does not end up in its place by itself, a copy at the end puts it there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nemoc.codegen.memory import Lifetime, plan_memory
from nemoc.codegen.plan import (
    Address,
    Arg,
    Job,
    Kernel,
    Launch,
    LayoutError,
    Plan,
    RegionError,
    Site,
    StepFunction,
    View,
)
from nemoc.codegen.schedule import Access, schedule
from nemoc.codegen.storage import Layout, state_layout
from nemoc.codegen.views import apply_view
from nemoc.ir.dims import Dim, dim, evaluate_dim
from nemoc.ir.errors import NemocError
from nemoc.ir.fusion import inline
from nemoc.ir.graph import Graph, Node
from nemoc.ir.ops.elementwise import Cast
from nemoc.ir.region import Fused
from nemoc.ir.types import TensorType, Value

Emit = Callable[[Site], Plan]
"""A backend: the plan of an op on tensors of given layouts."""

WEIGHTS, STATE, SCRATCH = "weights", "state", "scratch"
"""The first three arenas of every step function; pointers to inputs and outputs follow."""


@dataclass(frozen=True)
class Program:
    """Everything that a set of step functions runs.

    Attributes:
        functions: the step functions; they share weights, state and scratch.
        graphs: what each of them carries out, op by op: the graph given, without the regions that no kernel takes.
        weights: layout of the weight arena.
        state: layout of the state arena, in B and C.
        scratch_bytes: size of the scratch arena.
    """

    functions: tuple[StepFunction, ...]
    graphs: tuple[Graph, ...]
    weights: Layout
    state: Layout
    scratch_bytes: int

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The distinct kernels in order of first use."""
        return tuple({n.kernel.name: n.kernel for f in self.functions for n in f.launches}.values())


def lower_program(
    graphs: Mapping[str, Graph],
    weights: Layout,
    corners: Sequence[Mapping[str, int]],
    emit: Emit,
) -> Program:
    """Plan the launches and the memory of step functions.

    Args:
        graphs: the graph of each function by exported name; parameters are stored weights, states are the same in all.
        weights: where the weights lie; has every parameter.
        corners: sizes of B, L and C such that no step needs more scratch than at one of them (see `corner_sizes`).
        emit: the backend.

    Raises:
        NemocError: the backend lacks a kernel, a parameter has no place, or the functions' states differ.
    """
    layouts = {name: state_layout(graph) for name, graph in graphs.items()}
    state = next(iter(layouts.values()), Layout((), 0))
    for name, layout in layouts.items():
        if layout != state:
            raise NemocError(
                f"{name}: its states differ from those of the program's other functions"
            )
    plans: dict[object, Plan] = {}

    def emit_once(site: Site) -> Plan:
        if site.key not in plans:
            plans[site.key] = emit(site)
        return plans[site.key]

    lowerings = [
        _Lowering(name, graph, weights, state, corners, emit_once) for name, graph in graphs.items()
    ]
    lowered = [lowering.run() for lowering in lowerings]
    return Program(
        functions=tuple(function for function, _ in lowered),
        graphs=tuple(lowering.graph for lowering in lowerings),
        weights=weights,
        state=state,
        scratch_bytes=max((size for _, size in lowered), default=0),
    )


def corner_sizes(max_batch: int, max_tokens: int, max_context: int) -> tuple[dict[str, int], ...]:
    """Sizes at which scratch is largest, when B ≤ max_batch, B·L ≤ max_tokens and C ≤ max_context.

    A buffer never shrinks when B, L or C grows. Of all B and L within the bounds these are the pairs of which neither
    can grow alone; nothing else is taken for granted, so that sizes may round up.
    """
    corners = []
    batch = 0
    while batch < max_batch:
        length = -(-max_tokens // (batch + 1))
        as_long = max_batch if length == 1 else -(-max_tokens // (length - 1)) - 1
        batch = min(as_long, max_batch)
        corners.append({"B": batch, "L": length, "C": max_context})
    return tuple(corners)


def arena_names(graph: Graph) -> tuple[str, ...]:
    """The pointer parameters of a graph's step function: three arenas, then inputs, then outputs."""
    inputs = (f"in{i}_{_identifier(v.name)}" for i, v in enumerate(graph.inputs))
    outputs = (f"out{i}_{_identifier(v.name)}" for i, v in enumerate(graph.outputs))
    return (WEIGHTS, STATE, SCRATCH, *inputs, *outputs)


def _identifier(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


@dataclass(eq=False)
class _Memory:
    """A piece of memory that values lie in: a range of an arena, or scratch whose offset is not known yet.

    Attributes:
        arena: the arena's name.
        offset: where it begins in the arena; of scratch, set by the memory plan.
        bytes: its size; of scratch only.
        values: the values that lie in it, views included.
    """

    arena: str
    offset: Dim = 0
    bytes: Dim = 0
    values: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a value lies: a view whose first element is `offset` bytes into a piece of memory."""

    memory: _Memory
    offset: Dim
    view: View

    def coincides(self, other: "_Place") -> bool:
        """Whether both are the same elements in the same order."""
        return (self.memory, self.offset, self.view) == (other.memory, other.offset, other.view)


@dataclass(frozen=True)
class _Launch:
    """A launch on memory that is not planned yet.

    Attributes:
        kernel: the kernel.
        places: for each pointer parameter, where it points to.
        written: the memory that it may write: all that its plan writes, since a plan does not say which of its stages
            write what they share.
        job: what it is a part of.
    """

    kernel: Kernel
    places: tuple[_Place, ...]
    written: frozenset[_Memory]
    job: int

    @property
    def memories(self) -> frozenset[_Memory]:
        """All memory that it touches."""
        return frozenset(p.memory for p in self.places)


class _Lowering:
    """The lowering of one graph.

    Attributes:
        graph: what is lowered; a region that no kernel takes gives way to its ops when its turn comes.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        weights: Layout,
        state: Layout,
        corners: Sequence[Mapping[str, int]],
        emit: Emit,
    ) -> None:
        self._name = name
        self.graph = graph
        self._corners = corners
        self._emit = emit
        self._arenas = arena_names(graph)
        self._places: dict[Value, _Place] = {}
        self._launches: list[_Launch] = []
        self._jobs: list[Job] = []
        self._last_use = _last_uses(graph)
        self._slots: dict[Value, _Place] = {}
        self._bind_arguments(weights, state)
        self._outputs = self._output_places()

    def run(self) -> tuple[StepFunction, int]:
        """The step function, and the bytes of scratch that it needs."""
        index = 0
        while index < len(self.graph.nodes):
            node = self.graph.nodes[index]
            try:
                self._lower(index, node)
            except RegionError:
                if not isinstance(node.op, Fused):
                    raise
                self._inline(node)
            else:
                index += 1
        self._finish_results()
        accesses = [Access(n.memories, n.written) for n in self._launches]
        phases: list[list[_Launch]] = []
        for phase, launch in zip(schedule(accesses), self._launches, strict=True):
            phases.extend([] for _ in range(len(phases), phase + 1))
            phases[phase].append(launch)
        size = self._plan_scratch(phases)
        placed = tuple(tuple(map(_placed, launches)) for launches in phases)
        return StepFunction(self._name, self._arenas, placed, tuple(self._jobs)), size

    def _plan_scratch(self, phases: Sequence[Sequence[_Launch]]) -> int:
        """Give scratch its offsets; returns the bytes that it takes."""
        used: dict[_Memory, list[int]] = {}
        for number, launches in enumerate(phases):
            for place in (p for launch in launches for p in launch.places):
                if place.memory.arena == SCRATCH:
                    used.setdefault(place.memory, []).append(number)
        largest = {
            size: max(evaluate_dim(size, sizes) for sizes in self._corners)
            for size in {m.bytes for m in used}
        }
        lifetimes = [Lifetime(largest[m.bytes], at[0], at[-1]) for m, at in used.items()]
        offsets, size = plan_memory(lifetimes)
        for memory, offset in zip(used, offsets, strict=True):
            memory.offset = offset
        return size

    def _inline(self, region: Node) -> None:
        """Put a region's ops into its place; what is lowered already stays as it is."""
        self.graph = inline(self.graph, lambda node: node is region)
        self._last_use = _last_uses(self.graph)

    def _bind_arguments(self, weights: Layout, state: Layout) -> None:
        for value in self.graph.params:
            try:
                slot = weights[value.name]
            except KeyError:
                raise NemocError(
                    f"{self._name}: parameter %{value.name} is no stored weight"
                ) from None
            self._put(value, _Place(_Memory(WEIGHTS, slot.offset), 0, View.dense(value.type)))
        for value in self.graph.states:
            place = _Place(_Memory(STATE, state[value.name].offset), 0, View.dense(value.type))
            self._put(value, place)
            self._slots[value] = place
        for value, arena in zip(self.graph.inputs, self._arenas[3:], strict=False):
            self._put(value, _Place(_Memory(arena), 0, View.dense(value.type)))

    def _output_places(self) -> list[_Place]:
        """For each output, where the caller wants it."""
        names = self._arenas[3 + len(self.graph.inputs) :]
        return [
            _Place(_Memory(name), 0, View.dense(value.type))
            for value, name in zip(self.graph.outputs, names, strict=True)
        ]

    def _put(self, value: Value, place: _Place) -> None:
        self._places[value] = place
        place.memory.values.append(value)

    def _lower(self, index: int, node: Node) -> None:
        if node.op.is_view:
            (x,) = (self._places[v] for v in node.op.operands())
            seen = apply_view(node.op, x.view)
            if seen is not None:
                view, offset = seen
                self._put(node.results[0], _Place(x.memory, dim(x.offset + offset), view))
                return
        results = tuple(View.dense(v.type) for v in node.results)
        plan, operands = self._plan(index, node, results)
        places = {result: operands[operand] for result, operand in plan.updates}
        for result, operand in plan.in_place:
            place = operands[operand]
            if (
                result not in places
                and self._output_place(node.results[result]) is None
                and self._may_overwrite(operands, operand, index)
                and not any(place is p for p in places.values())
            ):
                places[result] = place
        for number, (value, view) in enumerate(zip(node.results, results, strict=True)):
            if number not in places:
                places[number] = self._output_place(value) or _scratch(view)
            self._put(value, places[number])
        self._launch(Job(node.op, self._largest_weight(node)), plan, operands, places)

    def _largest_weight(self, node: Node) -> str:
        """The name of the largest weight that a node reads, empty if it reads none."""
        read = (self._places[v].memory for v in node.op.distinct_operands)
        stored = (memory.values[0] for memory in read if memory.arena == WEIGHTS)
        largest = max(stored, key=lambda param: int(param.type.bytes), default=None)
        return "" if largest is None else largest.name

    def _plan(self, index: int, node: Node, results: tuple[View, ...]) -> tuple[Plan, list[_Place]]:
        """The plan of a node, and its operands' places: a dense copy where the kernels cannot have the operand itself.

        Kernels depend on the views, so that they are planned anew for copies; nothing is copied before a plan stands.
        """
        given = [self._places[v] for v in node.op.operands()]
        operands = given
        while True:
            try:
                views = tuple(p.view for p in operands)
                stored = (i for i, p in enumerate(operands) if p.memory.arena == WEIGHTS)
                site = Site(node.op, views, results, weights=frozenset(stored))
                plan = self._emit(site)
                copied = {i for _, i in plan.updates if not self._may_update(operands, i, index)}
                if not copied:
                    break
            except LayoutError:
                copied = {i for i, p in enumerate(operands) if not p.view.is_dense}
                if not copied:
                    raise
            operands = [_dense_scratch(p) if i in copied else p for i, p in enumerate(operands)]
        for source, place in zip(given, operands, strict=True):
            if place is not source:
                self._copy(source, place)
        return plan, operands

    def _may_update(self, operands: list[_Place], which: int, index: int) -> bool:
        """Whether node `index` may update an operand where it lies: it is dense, like the result."""
        return operands[which].view.is_dense and self._may_overwrite(operands, which, index)

    def _may_overwrite(self, operands: list[_Place], which: int, index: int) -> bool:
        """Whether node `index` may write over an operand: nobody reads the old elements afterwards or otherwise."""
        place = operands[which]
        if place.memory.arena not in (SCRATCH, STATE):
            return False
        others = [p for i, p in enumerate(operands) if i != which and p.memory is place.memory]
        if not all(p.coincides(place) for p in others):
            return False
        return all(self._last_use.get(v, -1) <= index for v in place.memory.values)

    def _output_place(self, value: Value) -> _Place | None:
        """The place of an output, for a kernel to write it there at once."""
        for output, place in zip(self.graph.outputs, self._outputs, strict=True):
            if output is value:
                return place
        return None

    def _copy(self, source: _Place, target: _Place) -> None:
        value = Value("x", TensorType(source.view.dtype, source.view.shape))
        op = Cast(value, source.view.dtype)
        plan = self._emit(Site(op, (source.view,), (target.view,)))
        self._launch(Job(op), plan, [source], {0: target})

    def _launch(
        self, job: Job, plan: Plan, operands: list[_Place], results: Mapping[int, _Place]
    ) -> None:
        scratch = [_scratch(view) for view in plan.scratch]
        written = {p.memory for p in (*results.values(), *scratch)}

        def place(arg: Arg) -> _Place:
            match arg.kind:
                case "operand":
                    return operands[arg.index]
                case "result":
                    return results[arg.index]
            return scratch[arg.index]

        self._jobs.append(job)
        for stage in plan.stages:
            places = tuple(map(place, stage.args))
            writes = frozenset(p.memory for p in places if p.memory in written)
            self._launches.append(_Launch(stage.kernel, places, writes, len(self._jobs) - 1))

    def _finish_results(self) -> None:
        """Copy to their places the outputs and next states that are not there yet.

        Copies into states wait until everything else has been read, and one state's old value that is another's next
        goes through scratch.
        """
        for value, target in zip(self.graph.outputs, self._outputs, strict=True):
            source = self._places[value]
            if not source.coincides(target):
                self._copy(source, target)
        moves = []
        for state, value in zip(self.graph.states, self.graph.next_states, strict=True):
            source, target = self._places[value], self._slots[state]
            if source.coincides(target):
                continue
            if source.memory.arena == STATE:
                copy = _dense_scratch(source)
                self._copy(source, copy)
                source = copy
            moves.append((source, target))
        for source, target in moves:
            self._copy(source, target)


def _scratch(view: View) -> _Place:
    """New scratch for a tensor."""
    return _Place(_Memory(SCRATCH, bytes=view.span), 0, view)


def _dense_scratch(place: _Place) -> _Place:
    """New scratch for a dense copy of a tensor."""
    return _scratch(View.dense(TensorType(place.view.dtype, place.view.shape)))


def _placed(launch: _Launch) -> Launch:
    """A launch by addresses, once memory is planned."""
    places = ((p.memory, p.offset) for p in launch.places)
    buffers = tuple(Address(m.arena, dim(m.offset + o)) for m, o in places)
    return Launch(launch.kernel, buffers, launch.job)


def _last_uses(graph: Graph) -> dict[Value, int]:
    """For each value, the number of the last node that reads it or a view of it; results are read at the end."""
    last: dict[Value, int] = dict.fromkeys(graph.results, len(graph.nodes))
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        until = index
        if node.op.is_view:
            until = max([index, *(last.get(r, -1) for r in node.results)])
        for value in node.op.operands():
            last[value] = max(last.get(value, -1), until)
    return last


def describe(functions: Iterable[StepFunction]) -> str:
    """A table of launches, one line each: kernel, tasks and addresses; for reading and diffing.

    A launch behind `|` is in the same phase as the line above.
    """
    lines = []
    for function in functions:
        arenas = ", ".join(function.arenas)
        counts = f"{len(function.launches)} launches in {len(function.phases)} phases"
        lines.append(f"{function.name}({arenas}, B, L, C): {counts}")
        for phase in function.phases:
            for number, launch in enumerate(phase):
                places = ", ".join(f"{a.arena}+{a.offset}" for a in launch.buffers)
                mark = "|" if number else " "
                lines.append(f"{mark} {launch.kernel.name}[{launch.kernel.tasks}]({places})")
    return "\n".join(lines) + "\n"
