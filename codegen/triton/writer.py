"""Writing a Triton kernel as text.

A kernel is a function of typed pointers and the sizes B, L and C. What it computes with are tiles: tensors of two axes,
rows by columns, some of size 1 and broadcast. `let` gives an expression a name, once for each distinct
expression in sight, so that callers may ask for the same index or element as often as they like.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nemoc.codegen.plan import Arg, Kernel, Stage, kernel_name
from nemoc.codegen.triton.work import Work
from nemoc.ir.dims import Dim, format_dim
from nemoc.ir.dtypes import DType

TYPE_NAMES = {
    DType.F64: "tl.float64",
    DType.F32: "tl.float32",
    DType.BF16: "tl.bfloat16",
    DType.F16: "tl.float16",
    DType.F8E4M3: "tl.uint8",
    DType.I64: "tl.int64",
    DType.I32: "tl.int32",
    DType.I8: "tl.int8",
    DType.U8: "tl.uint8",
    DType.BOOL: "tl.int1",
}
"""Element types as Triton writes them."""


@dataclass(frozen=True)
class GpuKernel(Kernel):
    """A Triton kernel `(p0, ..., pn, B, L, C)`; a launch has `tasks` programs along one axis.

    Attributes:
        pointers: the element type behind each pointer parameter.
        warps: warps of a program.
        stages: how many iterations of a loop of products are loaded ahead.
        work: what a program does, where its lowering says so; no part of what the kernel is.
        early: numbers of pointers to weights, which it loads before former kernels have ended.
    """

    pointers: tuple[DType, ...] = ()
    warps: int = 4
    stages: int = 3
    work: Work | None = field(default=None, compare=False)
    early: tuple[int, ...] = ()


def pointer_types(kernel: Kernel) -> tuple[DType, ...]:
    """The element types behind a GPU kernel's pointer parameters."""
    assert isinstance(kernel, GpuKernel)
    return kernel.pointers


@dataclass
class _Scope:
    """A block of statements: the names that end with it, by what they stand for."""

    names: dict[str, str] = field(default_factory=dict)


class KernelWriter:
    """Builds the text of one kernel.

    Args:
        stem: a word for what it does.
    """

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self._lines: list[str] = []
        self._scopes = [_Scope()]
        self._counts = dict.fromkeys(device_functions(), 1)
        self._pointers: dict[tuple[Arg, DType], str] = {}
        self._turn, self._wait = 0, "wait_turn()"
        self._early = set[Arg]()

    def line(self, text: str) -> None:
        """Append a statement."""
        self._lines.append("    " * len(self._scopes) + text)

    def wait_turn(self) -> None:
        """Let the kernel wait for former ones here, not at its start.

        It may have found out what to prefetch, and loaded what `load_early` names, and no more. Only the first call
        counts. Every program has to come here.
        """
        assert len(self._scopes) == 1
        assert self._turn or self._wait == "wait_turn()", "the next kernel may have been launched"
        self._turn = self._turn or len(self._lines)

    def let_next(self) -> None:
        """Let the next kernel be launched here, behind loads that the assembler is not to put off.

        It keeps their order with this, and otherwise would have what was loaded before decoded first. Behind
        `wait_turn`, if that is called, in every program.
        """
        assert len(self._scopes) == 1
        self._wait = "wait()"
        self.line("let_next()")

    def load_early(self, arg: Arg) -> None:
        """Let a tensor that no kernel writes be loaded before `wait_turn`."""
        self._early.add(arg)

    def barrier(self) -> None:
        """Let no thread of a program go on before all have come here.

        Where a program reads memory and writes it, in either order: a thread may hold elements that others have too,
        or have others the next time.
        """
        self.line("tl.debug_barrier()")

    def name(self, prefix: str) -> str:
        """A name that nothing else has."""
        count = self._counts.get(prefix, 0)
        self._counts[prefix] = count + 1
        return f"{prefix}{count}" if count else prefix

    def let(self, prefix: str, expression: str) -> str:
        """A name for an expression whose operands never change; the same one while the first is in sight.

        Names and numbers stand for themselves.
        """
        if expression.isidentifier() or expression.isdigit():
            return expression
        return self.once(expression, lambda: self.fresh(prefix, expression))

    def once(self, key: str, make: Callable[[], str]) -> str:
        """What `make` writes and names, unless it was made under that key already and is still in sight."""
        for scope in reversed(self._scopes):
            if key in scope.names:
                return scope.names[key]
        made = make()
        self._scopes[-1].names[key] = made
        return made

    def fresh(self, prefix: str, expression: str) -> str:
        """A new variable with that value, which later statements may assign again."""
        name = self.name(prefix)
        self.line(f"{name} = {expression}")
        return name

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Statements under a header such as `for k in range(n):`; names made within end with it."""
        self.line(header)
        self._scopes.append(_Scope())
        yield
        self._scopes.pop()

    @contextmanager
    def loop(
        self, prefix: str, stop: str, start: str = "0", step: int = 1, ahead: int = 1
    ) -> Iterator[str]:
        """A loop over `range(start, stop, step)`; gives the counter's name.

        Args:
            prefix: of the counter's name.
            stop, start, step: what it counts.
            ahead: iterations whose loads are under way at a time. Loads for matrix units are ahead without this, by
                the kernel's `stages`.
        """
        counter = self.name(prefix)
        bounds = stop if (start, step) == ("0", 1) else f"{start}, {stop}"
        bounds += f", {step}" if step != 1 else ""
        called = f"range({bounds})" if ahead == 1 else f"tl.range({bounds}, num_stages={ahead})"
        with self.block(f"for {counter} in {called}:"):
            yield counter

    def pointer(self, arg: Arg, dtype: DType) -> str:
        """The pointer parameter for a tensor; E4M3 is read as bits, since not every GPU knows the type."""
        dtype = DType.U8 if dtype == DType.F8E4M3 else dtype
        return self._pointers.setdefault((arg, dtype), f"p{len(self._pointers)}")

    def finish(
        self, tasks: Dim, warps: int = 4, stages: int = 3, work: Work | None = None
    ) -> Stage:
        """The launch of the finished kernel.

        Args:
            tasks: programs of a launch.
            warps, stages, work: as in `GpuKernel`.
        """
        parameters = ", ".join([*self._pointers.values(), "B", "L", "C"])
        lines = list(self._lines)
        lines.insert(self._turn, f"    {self._wait}")
        body = "\n".join(lines)
        pointers = tuple(dtype for _, dtype in self._pointers)
        what = f"{parameters}\n{body}\n{format_dim(tasks)} {warps} {stages} {pointers}"
        name = kernel_name(self.stem, what)
        source = f"@jit\ndef {name}({parameters}):\n{body}\n"
        early = tuple(n for n, (arg, _) in enumerate(self._pointers) if arg in self._early)
        kernel = GpuKernel(name, source, tasks, pointers, warps, stages, work, early)
        return Stage(kernel, tuple(arg for arg, _ in self._pointers))


@cache
def device_functions() -> tuple[str, ...]:
    """Names of the functions that every module has."""
    text = Path(__file__).with_name("device.py").read_text()
    return tuple(re.findall(r"^def (\w+)", text, re.MULTILINE))


def number_text(value: float) -> str:
    """A floating-point constant."""
    return repr(value) if math.isfinite(value) else f'float("{value!r}")'


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below a size."""
    return 1 << max(0, size - 1).bit_length()


def joined_in_pairs(tiles: Sequence[str], join: Callable[[str, str], str]) -> str:
    """What joining neighbours until there is one leaves of a power of two of tiles."""
    while len(tiles) > 1:
        tiles = [join(*pair) for pair in zip(tiles[::2], tiles[1::2], strict=True)]
    return tiles[0]


def size_text(size: Dim) -> str:
    """A size as an expression of B, L and C."""
    text = format_dim(size)
    return text if text.isidentifier() or text.isdigit() else f"({text})"
