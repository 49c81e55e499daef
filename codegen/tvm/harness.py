"""Running generated kernels by themselves, on guarded and poisoned memory.

    suite = KernelSuite()
    norm = suite.add(Site.dense(RmsNorm(x, w, 1e-5)), emit_rms_norm)
    (y,) = norm.run({"B": 2, "L": 7}, x_tensor, w_tensor)

All sites of a suite compile into one module when the first of them runs; memory is guarded as `nemoc.codegen.guarded`
says.
"""

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

from nemoc.codegen.guarded import Buffer, arguments, run_guarded
from nemoc.codegen.plan import Address, Arg, Launch, Plan, Site, StepFunction
from nemoc.codegen.threads import SHARE_CORES, let_idle_threads_sleep, use_threads
from nemoc.codegen.tvm.build import build_library
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import CpuTarget, cpu_target

Emitter = Callable[[Site, CpuTarget], Plan]


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
        args = arguments(site, plan)
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

        def call(buffers: Mapping[Arg, Buffer]) -> None:
            pointers = [buffers[a].pointer for a in arguments(self.site, self.plan)]
            self.suite.call(self.name, threads, *pointers, sizes["B"], sizes["L"], sizes["C"])

        return run_guarded(self.site, self.plan, sizes, operands, call, in_place)


@functools.cache
def _caller() -> ThreadPoolExecutor:
    """The thread that calls kernels: TVM keeps a pool of workers per thread, as large as it was first made."""
    caller = ThreadPoolExecutor(max_workers=1)
    with mock.patch.dict(os.environ, TVM_NUM_THREADS="2"):
        caller.submit(start_threads, 2).result()
    return caller


def start_threads(count: int, mode: int = SHARE_CORES) -> int:
    """Set up the pool in which kernels run, which the first call makes; how many threads it has."""
    let_idle_threads_sleep()
    return use_threads(tvm.get_global_func, count, mode)


def _call(function: Callable[..., None], threads: int, args: tuple[object, ...]) -> None:
    function(*args, start_threads(threads), None)
