"""A compiled kernel: machine code, and everything that a launch of it needs; plain data, free of any compiler.

A launch passes `parameters` in order. Scratch is memory that the compiler asks for behind the kernel's back: so many
bytes for each program of the launch, where it asks for any; otherwise its pointer may be null.
"""

import base64
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Parameter = Literal["pointer", "i32", "global_scratch", "profile_scratch"]
"""A kernel's pointers, its sizes B, L and C, then hidden pointers: all but "i32" are 8 bytes."""


@dataclass(frozen=True)
class Scratch:
    """Memory that a kernel needs besides its tensors.

    Attributes:
        bytes: for each program of a launch; 0 where it needs none.
        alignment: of its start, in bytes.
    """

    bytes: int = 0
    alignment: int = 1


@dataclass(frozen=True)
class Occupancy:
    """How much of a kernel a multiprocessor holds at a time.

    Attributes:
        programs: programs.
        warps: their warps.
        limit: what there is too little of for more: "warps", "registers", "shared memory" or "tensor memory".
    """

    programs: int
    warps: int
    limit: str


@dataclass(frozen=True)
class Report:
    """What compiling says about a kernel's speed.

    Attributes:
        registers: 32-bit registers of a thread; on AMD vector registers, accumulators included.
        spilled: bytes that go to memory and back for want of registers, of a thread: what instructions store plus what
            they load; on AMD the size of the registers that are kept in memory.
        occupancy: programs that fit on a multiprocessor.
        matrix: kinds of matrix instructions in the code, each with their number.
        plain: products that are made without matrix instructions, as `MxKxtype * KxNxtype`.
        warnings: lines of the assembler's about lost speed.
    """

    registers: int
    spilled: int
    occupancy: Occupancy
    matrix: tuple[tuple[str, int], ...] = ()
    plain: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Binary:
    """A kernel for a GPU.

    Attributes:
        code: a cubin or an hsaco, as the driver loads it.
        symbol: the function's name in it.
        parameters: what a launch passes, in order.
        warps: warps of a program.
        threads: threads of a program: the size of its block along x.
        shared: bytes of dynamic shared memory of a program.
        tensor_memory: columns of tensor memory of a program; 0 where there is none.
        global_scratch, profile_scratch: what the hidden pointers point to.
        waits: whether it waits itself for the end of the kernels before it, so that it may be launched while they run.
        report: on its speed.
    """

    code: bytes = dataclasses.field(repr=False)
    symbol: str
    parameters: tuple[Parameter, ...]
    warps: int
    threads: int
    shared: int
    tensor_memory: int
    global_scratch: Scratch
    profile_scratch: Scratch
    waits: bool
    report: Report

    def record(self) -> dict[str, Any]:
        """Everything as JSON; the code in base64."""
        return dataclasses.asdict(self) | {"code": base64.b64encode(self.code).decode()}

    @classmethod
    def from_record(cls, record: object) -> "Binary":
        """The binary of a record, which may be anything that JSON can say.

        Raises:
            ValueError: it is no record of a binary.
        """
        fields = _Fields(record)
        parameters = fields.texts("parameters")
        if not set(parameters) <= set(get_args(Parameter)):
            raise ValueError(f"parameters: found {parameters}, expected {get_args(Parameter)}")
        report = fields.inner("report")
        occupancy = report.inner("occupancy")
        return cls(
            code=base64.b64decode(fields.text("code"), validate=True),
            symbol=fields.text("symbol"),
            parameters=parameters,  # type: ignore[arg-type]
            warps=fields.number("warps"),
            threads=fields.number("threads"),
            shared=fields.number("shared"),
            tensor_memory=fields.number("tensor_memory"),
            global_scratch=fields.scratch("global_scratch"),
            profile_scratch=fields.scratch("profile_scratch"),
            waits=fields.flag("waits"),
            report=Report(
                registers=report.number("registers"),
                spilled=report.number("spilled"),
                occupancy=Occupancy(
                    occupancy.number("programs"),
                    occupancy.number("warps"),
                    occupancy.text("limit"),
                ),
                matrix=report.counts("matrix"),
                plain=report.texts("plain"),
                warnings=report.texts("warnings"),
            ),
        )


class _Fields:
    """Typed access to a JSON object; every method raises ValueError where it holds something else."""

    def __init__(self, content: object) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"found {type(content).__name__}, expected an object")
        self._content = content

    def number(self, name: str) -> int:
        value = self._content.get(name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: expected a number that is not negative")
        return value

    def flag(self, name: str) -> bool:
        value = self._content.get(name)
        if type(value) is not bool:
            raise ValueError(f"{name}: expected true or false")
        return value

    def text(self, name: str) -> str:
        value = self._content.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name}: expected a list of texts")
        return tuple(values)

    def counts(self, name: str) -> tuple[tuple[str, int], ...]:
        pairs = self._list(name)
        for pair in pairs:
            if not isinstance(pair, list) or list(map(type, pair)) != [str, int]:
                raise ValueError(f"{name}: expected a list of names with numbers")
        return tuple((what, count) for what, count in pairs)

    def inner(self, name: str) -> "_Fields":
        return _Fields(self._content.get(name))

    def scratch(self, name: str) -> Scratch:
        inner = self.inner(name)
        return Scratch(inner.number("bytes"), inner.number("alignment"))

    def _list(self, name: str) -> list[Any]:
        values = self._content.get(name)
        if not isinstance(values, list):
            raise ValueError(f"{name}: expected a list")
        return values
