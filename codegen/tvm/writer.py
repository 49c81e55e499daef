"""Writing kernels as TVMScript text.

The dialect, in short (TVM 0.27):

- Indices and sizes are named with `let` (`i = T.bind(...)`); data with `value` (`v: T.float32x16 = ...`), never with
  `let`. Arrays of registers are buffers of scope "local": `local("acc", 4)` then `acc[i] = ...`, with constant
  indices after unrolling.
- A vector of `n` elements is loaded and stored by indexing the last axis with `T.Ramp(start, 1, n)`; scalars
  broadcast in arithmetic with vectors by themselves, but casts name their lanes: `T.Cast("float32x16", v)`.
- Buffers have int64 strides, so no offset overflows; index variables are int32.
- A kernel ends by `return 0`; the same inside an `if` leaves early.
- bf16 is loaded and stored as uint16, E4M3 is loaded as uint8; `load` and `store` convert. There is no arithmetic in
  either.
- LLVM is told that different pointer parameters never alias: a kernel that reads what it has overwritten does both
  through one `Arg`.
"""

import functools
import keyword
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sympy

from nemoc.codegen.plan import Arg, Kernel, Stage, View, kernel_name
from nemoc.codegen.tunables import Choices, Tunable
from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

TIR_NAMES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.BF16: "uint16",
    DType.F16: "float16",
    DType.F8E4M3: "uint8",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I8: "int8",
    DType.U8: "uint8",
    DType.BOOL: "uint8",
}
"""The TIR type in which elements are stored."""

COMPUTE_NAMES = TIR_NAMES | dict.fromkeys((DType.BF16, DType.F16, DType.F8E4M3), "float32")
"""The TIR type in which kernels hold a loaded element."""

_RESERVED = ("B", "C", "I", "L", "Module", "T", "range", "task")
"""Names that mean something in a kernel's text."""


def tir_name(dtype: DType) -> str:
    """The TIR type in which elements are stored.

    Raises:
        NemocError: the CPU backend does not store that element type.
    """
    if dtype not in TIR_NAMES:
        raise NemocError(f"the cpu target has no storage for element type {dtype}")
    return TIR_NAMES[dtype]


def lanes_of(name: str, lanes: int) -> str:
    """A TIR type name with lanes: ("float32", 16) -> "float32x16"."""
    return name if lanes == 1 else f"{name}x{lanes}"


def size_text(value: Dim) -> str:
    """A dimension as an int32 expression over the parameters B, L, C."""
    return _dim_text(value, str, lambda name: name)


def offset_text(value: Dim) -> str:
    """A dimension as an int64 expression over the parameters B, L, C."""
    return _dim_text(value, lambda n: f"T.int64({n})", lambda name: f'T.Cast("int64", {name})')


class KernelWriter:
    """Collects the text of one kernel.

    Args:
        stem: a word for the kernel's name.
        choices: of the site that the kernel is for; none where there is nothing to choose.
    """

    def __init__(self, stem: str, choices: Choices | None = None) -> None:
        self._stem = stem
        self._choices = choices or Choices()
        self._args: list[Arg] = []
        self._lines: list[str] = []
        self._depth = 2
        self._views: dict[str, View] = {}
        self._taken = dict.fromkeys((*_RESERVED, *keyword.kwlist), 1)

    def line(self, text: str) -> None:
        """One statement."""
        self._lines.append("    " * self._depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """A compound statement: `with w.block("for i in range(8):"): ...`."""
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    @contextmanager
    def loop(self, hint: str, extent: str | int, kind: str = "range") -> Iterator[str]:
        """A loop from 0 over a fresh int32 variable; `kind` may be T.unroll, for a constant extent."""
        name = self.fresh(hint)
        with self.block(f"for {name} in {kind}({extent}):"):
            yield name

    def pick(self, tunable: Tunable) -> int:
        """The setting of a tunable whose values are numbers.

        Raises:
            IllegalSchedule: the schedule has another value than the tunable.
        """
        return int(self._choices.pick(tunable))

    def require(self, holds: bool, reason: str) -> None:
        """Refuse a schedule under which something does not hold.

        Raises:
            IllegalSchedule: it does not.
        """
        self._choices.require(holds, reason)

    def fresh(self, hint: str) -> str:
        """A name not given before."""
        count = self._taken.get(hint, 0)
        self._taken[hint] = count + 1
        return hint if count == 0 else f"{hint}_{count}"

    def let(self, hint: str, expression: str) -> str:
        """Bind an index expression to a fresh name and return the name.

        Only for sizes, indices and pointers: TVM's analyser expands what a name is bound to at each use, so
        chains of arithmetic on data take exponential time to compile. Those are for `value`.
        """
        name = self.fresh(hint)
        self.line(f"{name} = T.bind({expression})")
        return name

    def value(self, hint: str, expression: str, lanes: int = 1, dtype: str = "float32") -> str:
        """Hold data in a fresh variable, which may be assigned again, and return its name."""
        name = self.fresh(hint)
        self.line(f"{name}: T.{lanes_of(dtype, lanes)} = {expression}")
        return name

    def local(self, hint: str, size: int, lanes: int = 1, dtype: str = "float32") -> str:
        """A mutable local array of `size` vectors, uninitialised; returns its name."""
        name = self.fresh(hint)
        typed = lanes_of(dtype, lanes)
        self.line(f'{name} = T.alloc_buffer(({size},), "{typed}", scope="local")')
        return name

    def matrix(self, hint: str, rows: int, stride: int, dtype: DType = DType.F32) -> str:
        """A mutable local array, uninitialised, seen as rows; returns the buffer's name, as `buffer` does.

        Rows lie `stride` elements apart. Strides of 64 bits let LLVM keep one address for a row: products of 32 bits
        in an index like `row * stride + k` may wrap, and cost a quarter of an inner loop's time.
        """
        kind = tir_name(dtype)
        array = self.local(f"{hint}_data", rows * stride, dtype=kind)
        name = self.fresh(hint)
        self.line(
            f'{name} = T.decl_buffer(({rows}, {stride},), "{kind}", data={array}.data, '
            f'strides=(T.int64({stride}), T.int64(1),), scope="local")'
        )
        self._views[name] = View(dtype, (rows, stride), (stride, 1))
        return name

    def dtype(self, buffer: str) -> DType:
        """What a buffer that `buffer` or `matrix` returned is stored in."""
        return self._views[buffer].dtype

    def pointer(self, arg: Arg) -> str:
        """The pointer parameter for a tensor; one parameter however often it is asked for."""
        if arg not in self._args:
            self._args.append(arg)
        return f"p{self._args.index(arg)}"

    def buffer(self, hint: str, arg: Arg, view: View, at: str = "") -> str:
        """Declare a tensor under its view; returns the buffer's name.

        Args:
            hint: the name wanted.
            arg: which tensor.
            view: its layout; several declarations of one tensor may use different views.
            at: int64 byte offset from the tensor's first element, as text; empty for none. LLVM takes memory reached
                this way to be apart from that of the tensor's other declarations.
        """
        name = self.fresh(hint)
        data = self.pointer(arg)
        if at:
            data = self.let(f"{name}_at", f"T.handle_add_byte_offset({data}, {at})")
        shape = ", ".join(size_text(n) for n in view.shape) or "1"
        strides = ", ".join(offset_text(s) for s in view.strides) or "T.int64(1)"
        self.line(
            f'{name} = T.decl_buffer(({shape},), "{tir_name(view.dtype)}", data={data}, '
            f"strides=({strides},))"
        )
        self._views[name] = view
        return name

    def load(
        self, buffer: str, index: str, lanes: int = 1, raw: bool = False, weight: bool = False
    ) -> str:
        """The elements at an index as an expression in the compute type (bf16 and f16 as f32).

        Args:
            buffer: a name that `buffer` or `matrix` returned.
            index: the index text, axes separated by commas; with lanes, of the first element.
            lanes: elements along the last axis, whose stride must then be 1.
            raw: the elements as stored, in the type that `tir_name` gives.
            weight: whether they are of a weight, of which none is NaN (`nemoc.runtime.weights` sees to it).
        """
        dtype = self._views[buffer].dtype
        element = f"{buffer}[{_ramp(index, lanes)}]"
        if raw:
            return element
        if dtype == DType.BF16:
            wide = f'T.Cast("{lanes_of("uint32", lanes)}", {element})'
            return (
                f'T.reinterpret("{lanes_of("float32", lanes)}", T.shift_left({wide}, T.uint32(16)))'
            )
        if dtype == DType.F16:
            return f'T.Cast("{lanes_of("float32", lanes)}", {element})'
        if dtype == DType.F8E4M3:
            return self._from_e4m3(element, lanes, weight)
        return element

    def _from_e4m3(self, element: str, lanes: int, finite: bool) -> str:
        """Exponent and mantissa where float32 has them, the sign spread above and cut off, then the difference of the
        biases, which is right for denormals too: 2¹²⁰."""
        signed = f'T.reinterpret("{lanes_of("int8", lanes)}", {element})'
        code = f'T.Cast("{lanes_of("int32", lanes)}", {signed})'
        if not finite:
            code = self.value("code", code, lanes, "int32")
        bits = (
            f"T.bitwise_and(T.shift_left({code}, T.int32(20)), T.int32({0x87F00000 - (1 << 32)}))"
        )
        number = f'T.reinterpret("{lanes_of("float32", lanes)}", {bits}) * T.float32({2.0**120!r})'
        if finite:
            return number
        nan = 'T.float32("nan")' if lanes == 1 else f'T.Broadcast(T.float32("nan"), {lanes})'
        top = "T.int32(127)" if lanes == 1 else f"T.Broadcast(T.int32(127), {lanes})"
        return f"T.Select(T.bitwise_and({code}, T.int32(127)) == {top}, {nan}, {number})"

    def store_exact(self, buffer: str, index: str, value: str, lanes: int) -> None:
        """Store f32 numbers that bf16 holds to a buffer of those: nothing has to be rounded."""
        bits = f'T.reinterpret("{lanes_of("uint32", lanes)}", {value})'
        top = f'T.Cast("{lanes_of("uint16", lanes)}", T.shift_right({bits}, T.uint32(16)))'
        self.store(buffer, index, top, lanes, raw=True)

    def store(self, buffer: str, index: str, value: str, lanes: int = 1, raw: bool = False) -> None:
        """Store an expression of the compute type, rounding to nearest even where storage is narrower.

        With `raw` the expression has the type that elements are stored in, and goes there as it is.
        """
        dtype = self._views[buffer].dtype
        target = f"{buffer}[{_ramp(index, lanes)}]"
        if raw:
            pass
        elif dtype == DType.F8E4M3:
            raise NemocError("the cpu target does not round to f8e4m3")
        elif dtype == DType.BF16:
            value = self._to_bf16(value, lanes)
        elif dtype == DType.F16:
            value = f'T.Cast("{lanes_of("float16", lanes)}", {value})'
        self.line(f"{target} = {value}")

    def rounded(self, value: str, dtype: DType, lanes: int = 1) -> str:
        """An f32 expression rounded to what a narrower type can hold, still f32; of other types as it is."""
        wide = lanes_of("float32", lanes)
        if dtype == DType.BF16:
            word = f'T.Cast("{lanes_of("uint32", lanes)}", {self._to_bf16(value, lanes)})'
            return f'T.reinterpret("{wide}", T.shift_left({word}, T.uint32(16)))'
        if dtype == DType.F16:
            return f'T.Cast("{wide}", T.Cast("{lanes_of("float16", lanes)}", {value}))'
        return value

    def _to_bf16(self, value: str, lanes: int) -> str:
        x = self.value("x", value, lanes)
        word = lanes_of("uint32", lanes)
        bits = self.value("bits", f'T.reinterpret("{word}", {x})', lanes, "uint32")
        odd = f"T.bitwise_and(T.shift_right({bits}, T.uint32(16)), T.uint32(1))"
        rounded = f"T.shift_right({bits} + T.uint32(32767) + {odd}, T.uint32(16))"
        nan = f"T.Broadcast(T.uint32(32704), {lanes})" if lanes > 1 else "T.uint32(32704)"
        kept = f"T.Select(T.isnan({x}), {nan}, {rounded})"
        return f'T.Cast("{lanes_of("uint16", lanes)}", {kept})'

    def finish(self, tasks: Dim) -> Stage:
        """The kernel's stage; `tasks` as in `Kernel`."""
        body = "\n".join([*self._lines, "        return 0"])
        pointers = "".join(f"p{i}: T.handle, " for i in range(len(self._args)))
        signature = f"(task: T.int32, {pointers}B: T.int32, L: T.int32, C: T.int32) -> T.int32:\n"
        name = kernel_name(self._stem, f"{signature}{body}|{tasks}")
        source = f"    @T.prim_func(private=True, s_tir=True)\n    def {name}{signature}{body}\n"
        return Stage(Kernel(name, source, tasks), tuple(self._args))


def _ramp(index: str, lanes: int) -> str:
    if lanes == 1:
        return index
    *lead, last = _split(index)
    return ", ".join([*lead, f"T.Ramp({last}, 1, {lanes})"])


def _split(index: str) -> list[str]:
    """Split index text at its top-level commas."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(index):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(index[start:i].strip())
            start = i + 1
    return [*parts, index[start:].strip()]


def _dim_text(value: Dim, number: Callable[[int], str], name: Callable[[str], str]) -> str:
    """A dimension as text; sizes are not negative, so floor division is exact in both directions."""

    def text(e: sympy.Expr) -> str:
        match e:
            case sympy.Integer():
                return number(int(e))
            case sympy.Symbol():
                return name(e.name)
            case sympy.Add():
                return "(" + " + ".join(text(a) for a in e.args) + ")"
            case sympy.Mul():
                return "(" + " * ".join(text(a) for a in e.args) + ")"
            case sympy.Pow() if e.exp.is_Integer and 0 < int(e.exp) <= 8:
                return "(" + " * ".join([text(e.base)] * int(e.exp)) + ")"
            case sympy.floor() | sympy.ceiling():
                top, bottom = sympy.fraction(sympy.together(e.args[0]))
                up = bottom - 1 if isinstance(e, sympy.ceiling) else 0
                return f"({text(sympy.sympify(top + up))} // {text(bottom)})"
            case sympy.Min() | sympy.Max():
                word = "T.min" if isinstance(e, sympy.Min) else "T.max"
                return functools.reduce(lambda a, b: f"{word}({a}, {b})", map(text, e.args))
        raise NemocError(f"dimension {e} cannot be computed in a kernel")

    return number(value) if isinstance(value, int) else text(value)
