"""The launches of a GPU program as plain data: the compiler writes them into an artifact, the runtime reads them.

`kernels/launches.json` says which kernels there are and, for each function of the program, which of them run in what
order on which memory. Tasks and addresses are dimensions in B, L and C, so that one record serves every size. It is
read as what anybody may have written: every field is held against its type and range here, and every address against
its memory in `nemoc.runtime.placement`. That is against damage, not malice: a kernel does what it wants.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemoc.codegen.plan import StepFunction
from nemoc.ir.dims import Dim, format_dim
from nemoc.ir.errors import NemocError
from nemoc.ir.json_field import JsonField
from nemoc.ir.json_file import read_json
from nemoc.runtime.dim_function import Sizes

LAUNCHES = "kernels/launches.json"
"""The record's name within an artifact."""

FORMAT = 2
"""Version of the record; raised whenever an older nemoc could misread a newer one."""

_FIRST_ARENAS = ("weights", "state", "scratch")
"""The arenas that every function begins with; its inputs and its output follow."""

_SYMBOLS = frozenset({"B", "L", "C"})
_MOST_BYTES = 2**50


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and how it is launched.

    The driver passes a kernel its pointers, then B, L and C as int32, then hidden pointers that its compiler added: to
    global scratch, and to scratch for profiling. One that needs no such memory gets null.

    Attributes:
        file: its name within the artifact.
        symbol: the kernel's name within the file.
        threads: of a program.
        shared: bytes of shared memory of a program.
        parameters: how many parameters the kernel has, hidden ones included.
        pointers: how many of them are pointers to tensors; they come first.
        global_scratch: bytes of global scratch of a program.
        global_scratch_align: to what its start is aligned.
        profile_scratch: bytes of scratch for profiling of a program.
        profile_scratch_align: to what its start is aligned.
        waits: whether each of its programs waits for the end of all former kernels before it does anything, so that it
            may be launched while they run.
    """

    file: str
    symbol: str
    threads: int
    shared: int
    parameters: int
    pointers: int
    global_scratch: int = 0
    global_scratch_align: int = 1
    profile_scratch: int = 0
    profile_scratch_align: int = 1
    waits: bool = False

    def arguments(
        self, pointers: Sequence[int], sizes: Sizes, hidden: tuple[int, int]
    ) -> tuple[int, ...]:
        """The values of the kernel's parameters.

        Args:
            pointers: the address of each tensor.
            sizes: B, L and C.
            hidden: where global scratch and scratch for profiling begin.
        """
        given = (
            hidden[0] if self.global_scratch else 0,
            hidden[1] if self.profile_scratch else 0,
        )
        return (*pointers, *sizes, *given)[: self.parameters]


_RANGES = {
    "threads": (1, 1024),
    "shared": (0, 1 << 20),
    "pointers": (0, 250),
    "parameters": (3, 255),
    "global_scratch": (0, 1 << 30),
    "global_scratch_align": (1, 256),
    "profile_scratch": (0, 1 << 30),
    "profile_scratch_align": (1, 256),
}
"""What the numbers of a `Binary` may be; device memory is aligned to 256 bytes."""


@dataclass(frozen=True)
class Pointer:
    """Where a tensor begins.

    Attributes:
        arena: which of the function's arenas.
        offset: bytes from its start.
    """

    arena: int
    offset: Dim


@dataclass(frozen=True)
class KernelLaunch:
    """One launch.

    Attributes:
        binary: which kernel.
        tasks: how many programs; none are launched when it is 0.
        pointers: one for each tensor of the kernel.
    """

    binary: int
    tasks: Dim
    pointers: tuple[Pointer, ...]


@dataclass(frozen=True)
class FunctionLaunches:
    """What a function runs.

    Attributes:
        arenas: names of the memory that it works on: weights, state, scratch, its inputs, its output.
        launches: in order; each sees what the former ones wrote.
    """

    arenas: tuple[str, ...]
    launches: tuple[KernelLaunch, ...]


@dataclass(frozen=True)
class LaunchRecord:
    """What `kernels/launches.json` says.

    Attributes:
        target: what the kernels were compiled for.
        scratch: bytes of scratch at the largest sizes.
        binaries: the distinct kernels.
        functions: by the name of the program's function.
    """

    target: str
    scratch: int
    binaries: tuple[Binary, ...]
    functions: Mapping[str, FunctionLaunches]

    @classmethod
    def of(
        cls,
        target: str,
        scratch: int,
        binaries: Mapping[str, Binary],
        functions: Iterable[StepFunction],
    ) -> "LaunchRecord":
        """The record of planned functions.

        Args:
            target: what the kernels were compiled for.
            scratch: bytes of scratch at the largest sizes.
            binaries: by kernel name, for each kernel that is launched.
            functions: the plans.
        """
        index = {name: i for i, name in enumerate(binaries)}
        return cls(
            target,
            scratch,
            tuple(binaries.values()),
            {f.name: _planned(f, index) for f in functions},
        )

    def to_text(self) -> str:
        """The text of `kernels/launches.json`."""
        data = {
            "format": FORMAT,
            "target": self.target,
            "scratch": self.scratch,
            "binaries": [asdict(binary) for binary in self.binaries],
            "functions": {name: _function_json(f) for name, f in self.functions.items()},
        }
        return json.dumps(data, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, data: Any, source: str) -> "LaunchRecord":
        """Read a record.

        Args:
            data: JSON data from anywhere.
            source: what messages call it.

        Raises:
            NemocError: it is no record of this version; the message names the field.
        """
        whole = JsonField(source, "", data).fields(
            ("format", "target", "scratch", "binaries", "functions")
        )
        if (found := whole["format"].integer(1, 1 << 30)) != FORMAT:
            raise NemocError(
                f"{source}: format is {found}, this nemoc reads {FORMAT}; compile the model again"
            )
        binaries = tuple(map(_binary, whole["binaries"].items()))
        return cls(
            target=whole["target"].text(),
            scratch=whole["scratch"].integer(0, _MOST_BYTES),
            binaries=binaries,
            functions={n: _function(f, binaries) for n, f in whole["functions"].entries().items()},
        )


def read_launches(path: Path) -> LaunchRecord:
    """The record in a file.

    Raises:
        NemocError: it cannot be read, or is no record of this version.
    """
    return LaunchRecord.from_json(read_json(path), str(path))


def _planned(function: StepFunction, index: Mapping[str, int]) -> FunctionLaunches:
    arena = {name: i for i, name in enumerate(function.arenas)}
    return FunctionLaunches(
        function.arenas,
        tuple(
            KernelLaunch(
                index[launch.kernel.name],
                launch.kernel.tasks,
                tuple(Pointer(arena[at.arena], at.offset) for at in launch.buffers),
            )
            for launch in function.launches
        ),
    )


def _function_json(function: FunctionLaunches) -> dict[str, Any]:
    return {
        "arenas": list(function.arenas),
        "launches": [
            {
                "binary": launch.binary,
                "tasks": format_dim(launch.tasks),
                "pointers": [[p.arena, format_dim(p.offset)] for p in launch.pointers],
            }
            for launch in function.launches
        ],
    }


def _binary(data: JsonField) -> Binary:
    found = data.fields(("file", "symbol", "waits", *_RANGES))
    numbers = {name: found[name].integer(*_RANGES[name]) for name in _RANGES}
    binary = Binary(
        found["file"].text(), found["symbol"].text(), waits=found["waits"].flag(), **numbers
    )
    least = binary.pointers + (5 if binary.profile_scratch else 4 if binary.global_scratch else 3)
    found["parameters"].integer(least, binary.pointers + 5)
    for name in ("global_scratch_align", "profile_scratch_align"):
        if numbers[name] & (numbers[name] - 1):
            raise found[name].wrong("a power of 2")
    return binary


def _function(data: JsonField, binaries: Sequence[Binary]) -> FunctionLaunches:
    found = data.fields(("arenas", "launches"))
    arenas = tuple(item.text() for item in found["arenas"].items())
    if arenas[: len(_FIRST_ARENAS)] != _FIRST_ARENAS:
        raise found["arenas"].wrong(f"{', '.join(_FIRST_ARENAS)} first")
    launches = tuple(_launch(item, binaries, len(arenas)) for item in found["launches"].items())
    return FunctionLaunches(arenas, launches)


def _launch(data: JsonField, binaries: Sequence[Binary], arenas: int) -> KernelLaunch:
    found = data.fields(("binary", "tasks", "pointers"))
    binary = found["binary"].integer(0, len(binaries) - 1)
    pointers = found["pointers"].items()
    if len(pointers) != (count := binaries[binary].pointers):
        raise found["pointers"].wrong(f"{count} pointers, as the kernel has")
    return KernelLaunch(
        binary, found["tasks"].dim(_SYMBOLS), tuple(_pointer(item, arenas) for item in pointers)
    )


def _pointer(data: JsonField, arenas: int) -> Pointer:
    parts = data.items()
    if len(parts) != 2:
        raise data.wrong("an arena and an offset")
    return Pointer(parts[0].integer(0, arenas - 1), parts[1].dim(_SYMBOLS))
