"""Kernel plans: what code generation produces for one op, as plain data that no target owns.

A kernel reads and writes tensors through raw pointers and knows each tensor only as a `View`. What it computes is
fixed by the op without its values, the views of its operands and results, and the target: wherever these are equal the
source is equal, and so is the kernel's name, which carries a hash of the source. A plan says which kernels run in
which order for one op, and which of its tensors each pointer is.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, Self

from nemoc.codegen.tunables import Choices
from nemoc.ir.dims import Dim, dim, dims, product, substitute_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.op import BODY, Op, operand_fields
from nemoc.ir.printer import print_op
from nemoc.ir.types import TensorType


class LayoutError(NemocError):
    """A kernel cannot read an operand under its view; lowering copies the operand to a dense one."""


class RegionError(NemocError):
    """No kernel carries out a region as a whole; lowering falls back to its ops one by one."""


@dataclass(frozen=True)
class View:
    """How a tensor lies in memory, seen from the address of its first element.

    Attributes:
        dtype: the element type.
        shape: the size of each axis.
        strides: for each axis, the distance between neighbours in elements; 0 repeats one element.
    """

    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]

    @classmethod
    def dense(cls, type_: TensorType) -> Self:
        """The row-major view of a whole tensor."""
        return cls(type_.dtype, type_.shape, dense_strides(type_.shape))

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie in row-major order without gaps; axes of size 1 do not matter."""
        expected = dense_strides(self.shape)
        return all(
            n == 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def span(self) -> Dim:
        """Bytes from the first element's first to the last element's last."""
        last = sum((dim(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)), 0)
        return dim((dim(last) + 1) * self.dtype.bytes)

    def substitute(self, mapping: dict[str, Dim]) -> "View":
        """The view with dimension symbols replaced."""
        return View(
            self.dtype,
            tuple(substitute_dim(d, mapping) for d in self.shape),
            tuple(substitute_dim(d, mapping) for d in self.strides),
        )

    def broadcast(self, shape: tuple[Dim, ...]) -> "View":
        """The view repeated to a shape, as numpy broadcasts; the shapes must fit."""
        lead = len(shape) - self.rank
        strides = tuple(
            0 if n == 1 and m != 1 else s
            for n, s, m in zip(self.shape, self.strides, shape[lead:], strict=True)
        )
        return View(self.dtype, shape, (0,) * lead + strides)


def dense_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides in elements."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.append(step)
        step = dim(step * size)
    return dims(reversed(strides))


@dataclass(frozen=True)
class Arg:
    """A tensor as a plan sees it: an operand or result of the op, or scratch that the plan asks for."""

    kind: Literal["operand", "result", "scratch"]
    index: int

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"


@dataclass(frozen=True)
class Kernel:
    """One generated function `(task, p0, ..., pn, B, L, C) -> 0`.

    Attributes:
        name: a word for the op and a hash of the source; equal names mean equal kernels.
        source: the text of the function.
        tasks: how many tasks make up one launch, in B, L, C; tasks write disjoint memory. On CPUs a
            thread's are consecutive, but for the last ones, which go to whoever is free.
    """

    name: str
    source: str
    tasks: Dim


@dataclass(frozen=True)
class Stage:
    """One launch of a kernel within a plan: everything that it reads is complete before it starts.

    Attributes:
        kernel: the kernel.
        args: for each pointer parameter, the tensor that it points to.
    """

    kernel: Kernel
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Plan:
    """The launches that carry out one op.

    Attributes:
        stages: the launches in order.
        scratch: the tensors that live only within the plan.
        in_place: pairs (result, operand): the kernels are right when the two are one buffer with equal views, as where
            an element is stored only after everything that its old value is needed for.
        updates: pairs (result, operand): the two must be one buffer, of which the kernels write only what changes. They
            reach it through one argument, since compilers take different pointers to be different memory.
    """

    stages: tuple[Stage, ...]
    scratch: tuple[View, ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    updates: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """The names of its kernels: equal plans for equal sites have equal names, since these hold hashes."""
        return "+".join(stage.kernel.name for stage in self.stages)


@dataclass(frozen=True)
class Site:
    """An op together with the views of the tensors it is applied to.

    Attributes:
        op: the op; emitters read its attributes, never its values.
        operands: views in the order of `op.operands()`, absent optional operands left out.
        results: views in the order of the op's results.
        choices: where emitters ask for the settings of their tunables; no part of what the site is.
        weights: numbers of operands that are weights, which no kernel writes.
    """

    op: Op
    operands: tuple[View, ...]
    results: tuple[View, ...]
    choices: Choices = field(default_factory=Choices, repr=False, compare=False)
    weights: frozenset[int] = frozenset()
    _index: dict[str, int | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index: dict[str, int | None] = {}
        position = 0
        for name in operand_fields(type(self.op)):
            value = getattr(self.op, name)
            index[name] = None if value is None else position
            position += len(value) if isinstance(value, tuple) else value is not None
        object.__setattr__(self, "_index", index)

    @classmethod
    def dense(cls, op: Op) -> Self:
        """The op on row-major tensors of its own types."""
        return cls(
            op,
            tuple(View.dense(v.type) for v in op.operands()),
            tuple(View.dense(t) for t in op.result_types()),
        )

    def has(self, name: str) -> bool:
        """Whether the operand field of that name holds a value."""
        return self._index[name] is not None

    def arg(self, name: str) -> Arg:
        """The operand field of that name (its first value when it holds several)."""
        position = self._index[name]
        if position is None:
            raise KeyError(f"{self.op.mnemonic()} has no operand {name}")
        return Arg("operand", position)

    def view(self, arg: Arg) -> View:
        """The view of an operand or a result."""
        return (self.operands if arg.kind == "operand" else self.results)[arg.index]

    @property
    def key(self) -> tuple[object, ...]:
        """What the plan depends on, besides the target: the op without its values, and the views."""
        holds = tuple(
            len(v) if isinstance(v, tuple) else v is not None
            for v in (getattr(self.op, name) for name in operand_fields(type(self.op)))
        )
        # As text, since 0.0 == -0.0, and both may not share a kernel.
        text, body = print_op(self.op), getattr(self.op, BODY, None)
        return type(self.op), text, body, holds, self.operands, self.results


@dataclass(frozen=True)
class Address:
    """Where a tensor begins: bytes from the start of an arena, named by its pointer parameter."""

    arena: str
    offset: Dim = 0


@dataclass(frozen=True)
class Launch:
    """A kernel applied to tensors in memory.

    Attributes:
        kernel: the kernel.
        buffers: one address for each pointer parameter.
        job: which of the step function's jobs it is a part of.
    """

    kernel: Kernel
    buffers: tuple[Address, ...]
    job: int = 0


@dataclass(frozen=True)
class Job:
    """An op that a step function carries out by one launch or several.

    Attributes:
        op: the op.
        weight: the name of the largest stored weight among its operands; empty if there is none.
    """

    op: Op
    weight: str = ""


@dataclass(frozen=True)
class StepFunction:
    """An exported function of pointers to arenas, B, L and C, and of what else a backend needs.

    Attributes:
        name: the exported name.
        arenas: the pointer parameters in order.
        phases: what it runs: the launches of one phase in any order or at once, and each sees everything that those of
            earlier phases wrote.
        jobs: what the launches are parts of; none where nobody asks.
    """

    name: str
    arenas: tuple[str, ...]
    phases: tuple[tuple[Launch, ...], ...]
    jobs: tuple[Job, ...] = ()

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The launches of all phases in order."""
        return tuple(launch for phase in self.phases for launch in phase)


def kernel_name(stem: str, body: str) -> str:
    """A name for a kernel: a word and 10 hex digits of a hash of everything it does."""
    return f"{stem}_{hashlib.sha256(body.encode()).hexdigest()[:10]}"
