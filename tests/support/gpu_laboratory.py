"""A laboratory without a GPU: its worker runs in this process, on a device that interprets kernels."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemoc.autotune.gpu_clock import Run, nothing
from nemoc.codegen.triton.binary import Binary
from nemoc.codegen.triton.build import Variant
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.writer import GpuKernel, pointer_types
from nemoc.gpu_laboratory import GpuLaboratory
from nemoc.gpu_trial_worker import Trials
from support.fake_cuda import FakeDevice, FakeKernel, FakeLaunch, FakeLibrary, tensor_at
from support.gpu_trials import PaperCompiler, paper_binary


class TickingClock:
    """Every run takes a microsecond."""

    def seconds(self, run: Run, before: Run = nothing) -> float:
        before()
        run()
        return 1e-6


class InterpretedCompiler(PaperCompiler):
    """Gives kernels whose code says what they are called, for an `InterpretedLaboratory`.

    Attributes:
        kernels: all that were compiled, by name.
    """

    def __init__(self) -> None:
        super().__init__(self._binary)
        self.kernels: dict[str, GpuKernel] = {}

    def _binary(self, variant: Variant) -> Binary:
        kernel = variant.kernel
        self.kernels[kernel.name] = kernel
        parameters = ("pointer",) * len(kernel.pointers) + ("i32",) * 3
        code = b"\x7fELF" + kernel.name.encode()
        found = paper_binary(kernel.warps)
        return Binary(
            **vars(found) | {"code": code, "symbol": kernel.name, "parameters": parameters}
        )


class InterpretedLaboratory(GpuLaboratory):
    """Answers requests in this process.

    Args:
        compiler: knows the kernels.
        folder: an empty folder.
        spoil: called with each launch in place of its kernel, and with what carries the kernel out.
    """

    def __init__(
        self,
        compiler: InterpretedCompiler,
        folder: Path,
        spoil: Callable[[FakeLaunch, Callable[[], None]], None] = lambda launch, run: run(),
    ) -> None:
        super().__init__(folder)
        self._compiler, self._spoil = compiler, spoil
        self._interpreter = functools.cache(lambda kernel: Interpreter([kernel]))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kernels = self._compiler.kernels
        fakes = {
            name: FakeKernel(len(kernel.pointers), self._launched, hidden=0)
            for name, kernel in kernels.items()
        }
        device = FakeDevice(FakeLibrary(fakes), 1 << 40)
        return Trials(device, TickingClock()).answer(request)

    def _launched(self, launch: FakeLaunch) -> None:
        kernel = self._compiler.kernels[launch.symbol]

        def run() -> None:
            pairs = zip(launch.pointers, pointer_types(kernel), strict=True)
            pointers = [tensor_at(at, dtype.torch, [1]) for at, dtype in pairs]
            sizes = dict(zip("BLC", launch.sizes, strict=True))
            self._interpreter(kernel).launch(launch.symbol, pointers, sizes)

        self._spoil(launch, run)
