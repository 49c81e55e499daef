"""Loops that the themed emitters share: the elements of a task, vectors along an axis, sums along an axis."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nemoc.codegen.plan import View
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter, size_text
from nemoc.ir.dims import Dim, ceil_div, product
from nemoc.ir.dtypes import DType

CHAINS = 4
"""Independent partial sums: a floating-point addition takes about four cycles and a core starts one or two in each."""


def vector_lanes(views: Sequence[View], target: CpuTarget) -> int:
    """Elements that fill a vector register, or 1 where the last axis of some view is not contiguous."""
    if any(v.strides[-1] != 1 for v in views):
        return 1
    return target.vector_bits // (8 * max(v.dtype.bytes for v in views))


def constant(value: float, dtype: DType, lanes: int = 1) -> str:
    """A constant in the type in which kernels hold elements of `dtype`."""
    kind = COMPUTE_NAMES[dtype]
    if not kind.startswith("float"):
        value = int(bool(value)) if dtype == DType.BOOL else int(value)
    text = repr(value) if math.isfinite(value) else f'"{value}"'
    return f"T.{kind}({text})" if lanes == 1 else f"T.Broadcast(T.{kind}({text}), {lanes})"


@dataclass(frozen=True)
class Tiles:
    """Rows of elements cut into tasks: each takes several whole rows, or a part of one.

    Attributes:
        rows: how many rows there are.
        width: elements of a row.
        block: elements that a task takes at most.
    """

    rows: Dim
    width: Dim
    block: int = 1024

    @property
    def _together(self) -> int:
        """Rows of one task."""
        return max(1, self.block // self.width) if isinstance(self.width, int) else 1

    @property
    def _parts(self) -> Dim:
        """Tasks of one row."""
        return ceil_div(self.width, self.block)

    @property
    def tasks(self) -> Dim:
        """How many tasks there are."""
        return product((ceil_div(self.rows, self._together), self._parts))

    @contextmanager
    def loop(
        self, writer: KernelWriter, task: str = "task"
    ) -> Iterator[tuple[str, str, int | str]]:
        """A block of statements for each row of a task: the row, its first element here, and how many."""
        if self._together > 1:
            assert isinstance(self.width, int)
            first = writer.let("first", f"{task} * {self._together}")
            rows = writer.let("rows", f"T.min({self._together}, {size_text(self.rows)} - {first})")
            with writer.loop("r", rows) as r:
                yield writer.let("row", f"{first} + {r}"), "0", self.width
        elif self._parts == 1:
            yield task, "0", count_of(writer, self.width)
        else:
            parts = size_text(self._parts)
            start = writer.let("start", f"{task} % {parts} * {self.block}")
            count = f"T.min({self.block}, {size_text(self.width)} - {start})"
            yield writer.let("row", f"{task} // {parts}"), start, writer.let("count", count)


def count_of(writer: KernelWriter, size: Dim) -> int | str:
    """A dimension as a loop count: an integer, or the name of an int32."""
    return size if isinstance(size, int) else writer.let("count", size_text(size))


def each_vector(
    writer: KernelWriter, count: int | str, lanes: int, body: Callable[[str, int], None]
) -> None:
    """Loops over elements: whole vectors, then single ones.

    Args:
        count: how many elements: an integer, or the name of an int32.
        lanes: elements per vector.
        body: writes the statements for the elements from an index on, given how many lanes.
    """
    vectors, done, rest = _split(writer, count, lanes)
    if lanes > 1 and vectors != "0":
        with writer.loop("k", vectors) as k:
            body(f"{k} * {lanes}", lanes)
    if lanes == 1:
        done, rest = "0", str(count)
    if rest != "0":
        with writer.loop("k", rest) as k:
            body(f"{done} + {k}", 1)


def sum_elements(
    writer: KernelWriter,
    count: int | str,
    lanes: int,
    dtype: DType,
    term: Callable[[str, int], str],
) -> str:
    """The sum of terms, a scalar: partial sums in several vectors, joined pairwise.

    Args:
        count: how many terms, as in `each_vector`.
        lanes: lanes of the partial sums; 1 where `dtype` is not f32.
        dtype: the type of the terms and the sum.
        term: the terms from an index on as an expression, given how many lanes.
    """
    kind = COMPUTE_NAMES[dtype]
    zero = f"T.{kind}(0)"
    chains = max(1, min(CHAINS, count // lanes)) if isinstance(count, int) else CHAINS
    acc = writer.local("acc", chains, lanes, kind)
    for j in range(chains):
        writer.line(f"{acc}[{j}] = {zero if lanes == 1 else f'T.Broadcast({zero}, {lanes})'}")
    rounds, done, rest = _split(writer, count, chains * lanes)
    if rounds != "0":
        with writer.loop("k", rounds) as k:
            for j in range(chains):
                at = f"{k} * {chains * lanes} + {j * lanes}"
                writer.line(f"{acc}[{j}] = {acc}[{j}] + {term(at, lanes)}")
    tail = writer.value("tail", zero, 1, kind)

    def add(at: str, width: int) -> None:
        total = tail if width == 1 else f"{acc}[0]"
        writer.line(f"{total} = {total} + {term(f'{done} + {at}', width)}")

    if rest != "0":
        each_vector(writer, int(rest) if rest.isdigit() else rest, lanes, add)
    joined = " + ".join(f"{acc}[{j}]" for j in range(chains))
    return f"({VectorMath(writer, lanes).total(joined) if lanes > 1 else joined} + {tail})"


def _split(writer: KernelWriter, count: int | str, step: int) -> tuple[str, str, str]:
    """(whole steps, elements in them, elements left) of a count, as int32 expressions."""
    if isinstance(count, int):
        return str(count // step), str(count - count % step), str(count % step)
    steps = writer.let("steps", f"{count} // {step}")
    done = writer.let("done", f"{steps} * {step}")
    return steps, done, writer.let("rest", f"{count} - {done}")
