"""Running generated kernels by themselves, on guarded and poisoned memory.

    suite = KernelSuite()
    norm = suite.add(Site.dense(RmsNorm(x, w, 1e-5)), emit_rms_norm)
    (y,) = norm.run({"B": 2, "L": 7}, x_tensor, w_tensor)

All sites of a suite compile into one module when the first of them runs. Tensors are given and returned
by value; how they lie in memory follows the site's views. Every buffer begins off any vector boundary, has
guard zones around it, and starts as bytes of 0xFF: NaN as floats, -1 as integers. After a run the operands,
the gaps between strided elements and the guards must be what they were.
"""

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tvm
import tvm_ffi

from nemoc.codegen.plan import Address, Arg, Launch, Plan, Site, StepFunction, View
from nemoc.codegen.tvm.build import build_library
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import CpuTarget, cpu_target
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.errors import NemocError

Emitter = Callable[[Site, CpuTarget], Plan]

_GUARD = 256
"""Bytes before and behind each tensor."""

_POISON = 0xFF

_GUARD_BYTE = 0x7F
"""What guards hold: numbers near the largest; other bits than poison, or storing poison there would leave no trace."""


class KernelFault(NemocError):
    """A kernel wrote where it must not."""


class KernelSuite:
    """Sites whose plans are compiled together, when the first of them runs.

    Args:
        target: the CPU; by default the one at hand.
    """

    def __init__(self, target: CpuTarget | None = None) -> None:
        self.target = target or cpu_target()
        self._steps: list[StepFunction] = []
        self._library: tvm_ffi.Module | None = None

    def add(self, site: Site, emit: Emitter) -> "CompiledSite":
        """Emit a site's plan and put it into the module.

        Raises:
            ValueError: the module is compiled already.
        """
        if self._library is not None:
            raise ValueError("add every site before the first one runs")
        plan = emit(site, self.target)
        args = _arguments(site, plan)
        phases = tuple(
            (Launch(stage.kernel, tuple(Address(str(a)) for a in stage.args)),)
            for stage in plan.stages
        )
        name = f"site{len(self._steps)}"
        self._steps.append(StepFunction(name, tuple(map(str, args)), phases))
        return CompiledSite(self, name, site, plan)

    @property
    def source(self) -> str:
        """The text of the module."""
        return module_source(self._steps)

    def call(self, name: str, threads: int, *args: object) -> None:
        """Call one of the compiled functions, after compiling them if need be."""
        if self._library is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "kernels.so"
                build_library(self.source, self.target, path)
                self._library = tvm_ffi.load_module(str(path))
        _caller().submit(_call, self._library[name], threads, args).result()


@dataclass(frozen=True)
class CompiledSite:
    """One site of a suite; `run` and `check` execute it."""

    suite: KernelSuite
    name: str
    site: Site
    plan: Plan

    def run(
        self,
        sizes: Mapping[str, int],
        *operands: torch.Tensor,
        threads: int = 2,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """The results for operands given by value, in the order of `op.operands()`.

        Args:
            sizes: B, L and C; those left out are 1.
            operands: a tensor for each operand, of the shape and type that its view has.
            threads: how many threads share the tasks: 1 or 2.
            in_place: let results take over the operands' buffers where the plan allows it. Results that the plan
                says must share a buffer always do.

        Raises:
            KernelFault: the kernels wrote where they must not.
        """
        sizes = {"B": 1, "L": 1, "C": 1} | dict(sizes)
        buffers = {
            Arg("operand", i): Buffer.holding(view, sizes, tensor)
            for i, (view, tensor) in enumerate(zip(self.site.operands, operands, strict=True))
        }
        shared = {*self.plan.updates, *(self.plan.in_place if in_place else ())}
        for result, operand in shared:
            buffers[Arg("result", result)] = buffers[Arg("operand", operand)]
        for i, view in enumerate(self.site.results):
            buffers.setdefault(Arg("result", i), Buffer(view, sizes))
        for i, view in enumerate(self.plan.scratch):
            buffers[Arg("scratch", i)] = Buffer(view, sizes)
        before = {arg: buffer.memory.clone() for arg, buffer in buffers.items()}
        pointers = [buffers[a].pointer for a in _arguments(self.site, self.plan)]
        self.suite.call(self.name, threads, *pointers, sizes["B"], sizes["L"], sizes["C"])
        written = {id(b) for arg, b in buffers.items() if arg.kind != "operand"}
        for arg, buffer in buffers.items():
            buffer.assert_unchanged(before[arg], str(arg), gaps_only=id(buffer) in written)
        count = len(self.site.results)
        return tuple(buffers[Arg("result", i)].tensor.clone() for i in range(count))


class Buffer:
    """Poisoned memory with a tensor of some view in the middle.

    Attributes:
        memory: all bytes, guards included.
        tensor: the elements in the view's shape and strides.
    """

    def __init__(self, view: View, sizes: Mapping[str, int]) -> None:
        self._view = view
        width = view.dtype.bytes
        offset = _GUARD + 3 * width  # elements are aligned, vectors are not
        total = offset + evaluate_dim(view.span, sizes) + _GUARD
        self.memory = torch.full((-(-total // width) * width,), _POISON, dtype=torch.uint8)
        self.memory[:offset] = _GUARD_BYTE
        self.memory[total - _GUARD :] = _GUARD_BYTE
        self._shape = [evaluate_dim(d, sizes) for d in view.shape]
        self._strides = [evaluate_dim(d, sizes) for d in view.strides]
        self._offset = offset // width
        self.tensor = self._within(self.memory)

    @classmethod
    def holding(cls, view: View, sizes: Mapping[str, int], values: torch.Tensor) -> "Buffer":
        """A buffer whose tensor has these values."""
        buffer = cls(view, sizes)
        if values.dtype != view.dtype.torch or list(values.shape) != buffer._shape:
            raise NemocError(
                f"an operand is {values.dtype} {list(values.shape)}, expected {view.dtype} {buffer._shape}"
            )
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in buffer._strides)
        buffer.tensor[once] = values[once]
        if not torch.equal(_bits(buffer.tensor), _bits(values)):
            raise NemocError("an operand's values differ along a stride of 0")
        return buffer

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The address of the first element."""
        return ctypes.c_void_p(self.memory.data_ptr() + self._offset * self._view.dtype.bytes)

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


@functools.cache
def _caller() -> ThreadPoolExecutor:
    """The thread that calls kernels: TVM keeps a pool of workers per thread, as large as it was first made."""
    caller = ThreadPoolExecutor(max_workers=1)
    with mock.patch.dict(os.environ, TVM_NUM_THREADS="2"):
        caller.submit(_configure, 2).result()
    return caller


def _configure(threads: int) -> None:
    tvm.get_global_func("runtime.config_threadpool")(1, threads)


def _call(function: Callable[..., None], threads: int, args: tuple[object, ...]) -> None:
    _configure(threads)
    function(*args)


def _arguments(site: Site, plan: Plan) -> list[Arg]:
    return [
        *(Arg("operand", i) for i in range(len(site.operands))),
        *(Arg("result", i) for i in range(len(site.results))),
        *(Arg("scratch", i) for i in range(len(plan.scratch))),
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_RAW[tensor.element_size()])
