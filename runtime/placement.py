"""Where the launches of a program work, for steps of given sizes.

A record of launches (`nemoc.runtime.launches`) has dimensions in it. Here each distinct one becomes a function once,
and what came out for the sizes of a step is kept, so that a step that was taken before costs a look into a table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemoc.ir.dims import B, Dim, L, dim
from nemoc.ir.errors import IRError, NemocError
from nemoc.ir.parser import Signature
from nemoc.runtime.dim_function import Sizes, dim_function
from nemoc.runtime.launches import KernelLaunch, LaunchRecord
from nemoc.runtime.program import PREFILL_ALL, Program
from nemoc.runtime.recent import Recent

_MOST_TASKS = 2**31 - 1
"""Programs of a launch along one axis."""

_MOST_KEPT = 32
"""For how many functions and sizes the addresses are kept."""


@dataclass(frozen=True, slots=True)
class PlacedLaunch:
    """A launch at given sizes.

    Attributes:
        number: which of the function's launches.
        binary: which kernel.
        tasks: how many programs, at least 1.
        pointers: for each tensor, its arena and the bytes from the arena's start.
    """

    number: int
    binary: int
    tasks: int
    pointers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PlacedFunction:
    """A function at given sizes.

    Attributes:
        sizes: B, L and C.
        launches: in order; those without tasks are left out.
        hidden: bytes of global scratch, and of scratch for profiling, that the largest launch needs.
    """

    sizes: Sizes
    launches: tuple[PlacedLaunch, ...]
    hidden: tuple[int, int]


class LaunchTable:
    """Places the launches of a program's functions.

    Args:
        record: the launches.
        program: what they carry out.
        signatures: what each function is given.
        weights: bytes of the weights.
        source: what messages call the record.

    Attributes:
        record: the launches.
        inputs: names of each function's inputs in order.

    Raises:
        NemocError: the record is of other functions, or of another target.
    """

    def __init__(
        self,
        record: LaunchRecord,
        program: Program,
        signatures: Mapping[str, Signature],
        weights: int,
        source: str,
    ) -> None:
        self.record = record
        self.inputs = {name: [v.name for v in given.inputs] for name, given in signatures.items()}
        _check_whose(record, program, source)
        self._functions = {
            name: _Function(
                record, name, _arena_bytes(record, program, name, signatures[name], weights), source
            )
            for name in record.functions
        }
        self._recent: Recent[tuple[str, Sizes], PlacedFunction] = Recent(_MOST_KEPT)

    def at(self, function: str, sizes: Sizes) -> PlacedFunction:
        """A function's launches when B, L and C have these sizes.

        Raises:
            NemocError: the record makes no sense there: an address is outside its memory, or a number none.
        """
        key = (function, sizes)
        placed = self._recent.get(key)
        if placed is None:
            placed = self._functions[function].at(sizes)
            self._recent.put(key, placed)
        return placed


def _check_whose(record: LaunchRecord, program: Program, source: str) -> None:
    if record.target != program.target:
        raise NemocError(f"{source}: target is {record.target[:60]!r}, expected {program.target!r}")
    for name in sorted(program.functions ^ record.functions.keys()):
        what = "is missing" if name in program.functions else "is none of the program's"
        raise NemocError(f"{source}: the function {name[:60]!r} {what}")


def _arena_bytes(
    record: LaunchRecord, program: Program, function: str, signature: Signature, weights: int
) -> tuple[Dim, ...]:
    """The size of each memory that a function works on: weights, state, scratch, inputs, logits."""
    tokens = dim(B * L) if function == PREFILL_ALL else B
    inputs = [value.type.bytes for value in signature.inputs]
    return (weights, program.state.bytes, record.scratch, *inputs, dim(4 * tokens * program.vocab))


_Numbered = tuple[int, int, tuple[tuple[int, int], ...]]
"""A launch: its kernel, the number of its tasks, and of each pointer the arena and the number of its offset."""


def _numbered(launch: KernelLaunch, number: Callable[[Dim], int]) -> _Numbered:
    pointers = tuple((pointer.arena, number(pointer.offset)) for pointer in launch.pointers)
    return launch.binary, number(launch.tasks), pointers


class _Function:
    """A function of a record whose distinct dimensions are numbered.

    Args:
        record, name: the function.
        arenas: the size of each memory that it works on.
        source: what messages call the record.
    """

    def __init__(self, record: LaunchRecord, name: str, arenas: Sequence[Dim], source: str) -> None:
        self._where = f"{source}: {name}"
        self._binaries = record.binaries
        function = record.functions[name]
        self._names = function.arenas
        if len(self._names) != len(arenas):
            raise NemocError(
                f"{self._where} works on {len(self._names)} pieces of memory, expected {len(arenas)}: "
                "weights, state, scratch, its inputs and the logits"
            )
        distinct: dict[Dim, int] = {}

        def number(value: Dim) -> int:
            return distinct.setdefault(value, len(distinct))

        self._arenas = [number(size) for size in arenas]
        self._launches = [_numbered(launch, number) for launch in function.launches]
        try:
            self._evaluate = [dim_function(value) for value in distinct]
        except IRError as error:
            raise NemocError(f"{self._where}: {error}") from None

    def at(self, sizes: Sizes) -> PlacedFunction:
        try:
            values = [evaluate(sizes) for evaluate in self._evaluate]
        except IRError as error:
            raise NemocError(f"{self._where}: {error}") from None
        bounds = [max(1, values[number]) for number in self._arenas]
        placed = []
        for index, (binary, tasks, numbers) in enumerate(self._launches):
            count = values[tasks]
            if not 0 <= count <= _MOST_TASKS:
                raise self._wrong(index, sizes, f"{count} tasks, expected 0 to {_MOST_TASKS}")
            if not count:
                continue
            pointers = tuple((arena, values[number]) for arena, number in numbers)
            for arena, offset in pointers:
                if not 0 <= offset < bounds[arena]:
                    place = f"byte {offset} of {self._names[arena]}, which has {bounds[arena]}"
                    raise self._wrong(index, sizes, f"a pointer to {place}")
            placed.append(PlacedLaunch(index, binary, count, pointers))
        return PlacedFunction(sizes, tuple(placed), self._hidden(placed))

    def _hidden(self, placed: Sequence[PlacedLaunch]) -> tuple[int, int]:
        used = [(launch.tasks, self._binaries[launch.binary]) for launch in placed]
        return (
            max((tasks * binary.global_scratch for tasks, binary in used), default=0),
            max((tasks * binary.profile_scratch for tasks, binary in used), default=0),
        )

    def _wrong(self, index: int, sizes: Sizes, what: str) -> NemocError:
        symbol = self._binaries[self._launches[index][0]].symbol[:60]
        at = ", ".join(f"{name} = {size}" for name, size in zip("BLC", sizes, strict=True))
        return NemocError(f"{self._where}, launch {index} of {symbol!r}: has {what}, when {at}")
