"""Running kernels on guarded and poisoned memory, whatever carries them out.

Tensors are given and returned by value; how they lie in memory follows the site's views. Buffers are on torch's
default device. Every buffer begins off any vector boundary, unless kernels were promised one, has guard zones around
it, and starts as bytes of 0xFF: NaN as floats, -1 as integers. After a run the operands, the gaps between strided
elements and the guards must be what they were.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.plan import Arg, Plan, Site, View
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.errors import NemocError

_GUARD = 256
"""Bytes before and behind each tensor."""

_WORD = 4
"""Bytes of a word: what kernels may read shorter elements by, where rows are whole words."""

_POISON = 0xFF

_GUARD_BYTE = 0x7F
"""What guards hold: numbers near the largest; other bits than poison, or storing poison there would leave no trace."""


class KernelFault(NemocError):
    """A kernel wrote where it must not."""


def arguments(site: Site, plan: Plan) -> list[Arg]:
    """Every tensor that a plan works on."""
    return [
        *(Arg("operand", i) for i in range(len(site.operands))),
        *(Arg("result", i) for i in range(len(site.results))),
        *(Arg("scratch", i) for i in range(len(plan.scratch))),
    ]


def run_guarded(
    site: Site,
    plan: Plan,
    sizes: Mapping[str, int],
    operands: Sequence[torch.Tensor],
    call: Callable[[Mapping[Arg, "Buffer"]], None],
    in_place: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The results of a plan for operands given by value, in the order of `op.operands()`.

    Args:
        site, plan: what runs.
        sizes: B, L and C.
        operands: a tensor for each operand, of the shape and type that its view has.
        call: runs the plan's launches on these buffers.
        in_place: let results take over the operands' buffers where the plan allows it. Results that the plan says
            must share a buffer always do.

    Raises:
        KernelFault: the kernels wrote where they must not.
    """
    shared = (*plan.updates, *(plan.in_place if in_place else ()))
    views = Views(site.operands, site.results, plan.scratch, shared)
    return run_views(views, sizes, operands, call)


@dataclass(frozen=True)
class Views:
    """What kernels work on.

    Attributes:
        operands, results, scratch: the view of each.
        shared: pairs (result, operand) that are one buffer.
        aligned: whether tensors begin at multiples of 256 bytes, which the kernels were promised.
    """

    operands: tuple[View, ...]
    results: tuple[View, ...]
    scratch: tuple[View, ...]
    shared: tuple[tuple[int, int], ...]
    aligned: bool = False


def run_views(
    views: Views,
    sizes: Mapping[str, int],
    operands: Sequence[torch.Tensor],
    call: Callable[[Mapping[Arg, "Buffer"]], None],
) -> tuple[torch.Tensor, ...]:
    """As `run_guarded`, of kernels of which only the views are known."""
    buffers = {
        Arg("operand", i): Buffer.holding(view, sizes, tensor, views.aligned)
        for i, (view, tensor) in enumerate(zip(views.operands, operands, strict=True))
    }
    for result, operand in views.shared:
        buffers[Arg("result", result)] = buffers[Arg("operand", operand)]
    for i, view in enumerate(views.results):
        buffers.setdefault(Arg("result", i), Buffer(view, sizes, views.aligned))
    for i, view in enumerate(views.scratch):
        buffers[Arg("scratch", i)] = Buffer(view, sizes, views.aligned)
    before = {arg: buffer.memory.clone() for arg, buffer in buffers.items()}
    call(buffers)
    written = {id(b) for arg, b in buffers.items() if arg.kind != "operand"}
    for arg, buffer in buffers.items():
        buffer.assert_unchanged(before[arg], str(arg), gaps_only=id(buffer) in written)
    count = len(views.results)
    return tuple(buffers[Arg("result", i)].tensor.clone() for i in range(count))


class Buffer:
    """Poisoned memory with a tensor of some view in the middle.

    Attributes:
        memory: all bytes, guards included.
        tensor: the elements in the view's shape and strides.
    """

    def __init__(self, view: View, sizes: Mapping[str, int], aligned: bool = False) -> None:
        self._view = view
        width = view.dtype.bytes
        word = max(width, _WORD)
        # Without being asked for more, elements and words are aligned, vectors are not.
        offset = _GUARD if aligned else _GUARD + 3 * word
        total = offset + evaluate_dim(view.span, sizes) + _GUARD
        self.memory = torch.full((-(-total // word) * word,), _POISON, dtype=torch.uint8)
        self.memory[:offset] = _GUARD_BYTE
        self.memory[total - _GUARD :] = _GUARD_BYTE
        self._shape = [evaluate_dim(d, sizes) for d in view.shape]
        self._strides = [evaluate_dim(d, sizes) for d in view.strides]
        self._offset = offset // width
        self.tensor = self._within(self.memory)

    @classmethod
    def holding(
        cls, view: View, sizes: Mapping[str, int], values: torch.Tensor, aligned: bool = False
    ) -> "Buffer":
        """A buffer whose tensor has these values."""
        buffer = cls(view, sizes, aligned)
        if values.dtype != view.dtype.torch or list(values.shape) != buffer._shape:
            raise NemocError(
                f"an operand is {values.dtype} {list(values.shape)}, expected {view.dtype} {buffer._shape}"
            )
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in buffer._strides)
        buffer.tensor[once] = values[once]
        if not torch.equal(bits(buffer.tensor), bits(values)):
            raise NemocError("an operand's values differ along a stride of 0")
        return buffer

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The address of the first element."""
        return ctypes.c_void_p(self.memory.data_ptr() + self._offset * self._view.dtype.bytes)

    @property
    def start(self) -> torch.Tensor:
        """The memory from the first element on, as elements."""
        return self.memory.view(self._view.dtype.torch)[self._offset :]

    def assert_unchanged(self, before: torch.Tensor, what: str, gaps_only: bool) -> None:
        """Check that the memory is as before; with `gaps_only`, everywhere but in the tensor."""
        after = self.memory.clone()
        if gaps_only:
            for memory in (before, after):
                self._within(memory).view(_RAW[self._view.dtype.bytes]).zero_()
        if not torch.equal(before, after):
            raise KernelFault(f"{what}: written where it must not be")

    def _within(self, memory: torch.Tensor) -> torch.Tensor:
        typed = memory.view(self._view.dtype.torch)
        return typed.as_strided(self._shape, self._strides, self._offset)


_RAW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers of their size, so that NaN and zeros compare as what they are."""
    return tensor.contiguous().view(_RAW[tensor.element_size()])
