"""The `cpu` target: step functions in a shared library, loaded with TVM's small runtime and no compiler.

A step function takes pointers to weights, state, scratch, its inputs and its output, then B, L and C, how many threads
it has, and where they note the time, if anybody wants to know. Scratch is allocated once; a step allocates its logits,
and in TVM's pool what its threads claim tasks in.
"""

import ctypes
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemoc.codegen.storage import ALIGNMENT
from nemoc.codegen.threads import let_idle_threads_sleep, use_threads
from nemoc.ir.errors import NemocError
from nemoc.runtime.backend import Opened
from nemoc.runtime.program import PREFILL_ALL, Program
from nemoc.runtime.state import State
from nemoc.runtime.step_times import StepTimes, launch_seconds
from nemoc.runtime.weights import PackedWeights

LIBRARY = "kernels/step.so"
"""The library's name within an artifact."""


def kernel_record(scratch: int) -> dict[str, Any]:
    """What the manifest says of a library: JSON data.

    Args:
        scratch: bytes of scratch at the largest sizes.
    """
    return {"scratch": scratch}


def read_kernel_record(artifact: Path, record: Mapping[str, Any]) -> int:
    """The bytes of scratch in a `kernel_record`.

    Raises:
        NemocError: it holds something else.
    """
    match record:
        case {"scratch": scratch} if type(scratch) is int and scratch >= 0 and len(record) == 1:
            return scratch
    raise NemocError(f"{artifact}: kernels is {record!r}, expected the size of scratch")


def open_cpu(opened: Opened) -> "CpuBackend":
    """The backend of an artifact for a `cpu` target.

    Raises:
        NemocError: TVM's runtime is not installed, or the library does not fit.
    """
    return CpuBackend(
        opened.folder / LIBRARY,
        {name: [v.name for v in found.inputs] for name, found in opened.signatures.items()},
        read_kernel_record(opened.folder, opened.manifest.kernels),
        opened.program,
        opened.weights,
        opened.threads,
    )


class CpuBackend:
    """Runs the step functions of a library. One step runs at a time; others wait.

    Args:
        library: the shared library.
        inputs: for each function that the library exports, the names of its inputs in order.
        scratch: bytes of scratch at the largest sizes.
        program: what the library's functions are of.
        weights: in the layout that the library was compiled for.
        threads: how many share the work.

    Raises:
        NemocError: TVM's runtime is not installed, or the library cannot be loaded or lacks a function.
    """

    def __init__(
        self,
        library: Path,
        inputs: Mapping[str, Sequence[str]],
        scratch: int,
        program: Program,
        weights: PackedWeights,
        threads: int,
    ) -> None:
        self.threads = threads
        self._vocab = program.vocab
        self._inputs = inputs
        self._functions = _load(library, tuple(inputs))
        self._weights = weights.data
        self._scratch = _allocate(library, scratch)
        self._lock = threading.Lock()
        self._clock: _Clock | None = None

    def allocate(self, size: int) -> torch.Tensor:
        # Zeroed by the system, page by page as they are first used: capacity that no token comes to costs nothing.
        try:
            memory = torch.from_numpy(np.zeros(size + ALIGNMENT - 1, dtype=np.uint8))
        except (MemoryError, ValueError):  # beyond the memory, or beyond 64 bits
            raise NemocError(f"{size} bytes of a state cannot be allocated") from None
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + size]

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        if _first_process() != os.getpid():
            raise NemocError(
                "the cpu target ran before this process was forked, and its threads are not in the "
                "fork; load the artifact in a process that is started anew (spawn)"
            )
        batch, length = tokens.shape
        shape = (batch, length) if function == PREFILL_ALL else (batch,)
        logits = torch.empty((*shape, self._vocab), dtype=torch.float32, device="cpu")
        given = {"tokens": tokens, "valid": valid}
        with self._lock:
            threads = _use_threads(self.threads)
            step = partial(
                self._functions[function],
                *map(_pointer, (self._weights, state.arena, self._scratch)),
                *(_pointer(given[name]) for name in self._inputs[function]),
                _pointer(logits),
                batch,
                length,
                state.capacity,
                threads,
            )
            if self._clock is None:
                step(None)
            else:
                self._clock.run(function, (batch, length, state.capacity), threads, step)
        return logits

    @contextmanager
    def timed(self, phases: Mapping[str, Sequence[int]]) -> Iterator[list[StepTimes]]:
        clock = _Clock(phases)
        found: list[StepTimes] = []
        with self._lock:
            if self._clock is not None:
                raise NemocError("launches are being timed already")
            self._clock = clock
        try:
            yield found
        finally:
            with self._lock:
                self._clock = None
            found += clock.read()


class _Clock:
    """Notes when threads begin and end their work; what that means is worked out afterwards, since steps that follow
    each other at once are those of which somebody wants to know.

    Args:
        phases: for each function, how many launches each phase has.
    """

    def __init__(self, phases: Mapping[str, Sequence[int]]) -> None:
        self._phases = phases
        self._noted: list[tuple[str, tuple[int, int, int], float, torch.Tensor]] = []

    def run(
        self,
        function: str,
        sizes: tuple[int, int, int],
        threads: int,
        step: Callable[[ctypes.c_void_p], object],
    ) -> None:
        """Run a step, which takes the address of its marks."""
        phases = self._phases[function]
        marks = torch.empty(threads, sum(phases) + len(phases), dtype=torch.int64, device="cpu")
        started = time.perf_counter()
        step(_pointer(marks))
        self._noted.append((function, sizes, time.perf_counter() - started, marks))

    def read(self) -> Iterator[StepTimes]:
        """What each step took."""
        for function, sizes, seconds, marks in self._noted:
            launches, waiting = launch_seconds(marks, self._phases[function])
            yield StepTimes(function, sizes, seconds, launches, waiting)


@cache
def _first_process() -> int:
    """The process of the first step, whose threads TVM waits for ever after."""
    return os.getpid()


def _allocate(library: Path, size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except (RuntimeError, TypeError):  # beyond the memory, or beyond 64 bits
        raise NemocError(f"{library}: {size} bytes of scratch cannot be allocated") from None


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _load(library: Path, names: tuple[str, ...]) -> dict[str, Callable[..., object]]:
    ffi = _runtime()
    try:
        module = ffi.load_module(str(library))
        return {name: getattr(module, name) for name in names}
    except (RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise NemocError(
            f"{library}: cannot be loaded: {reason[-1] if reason else error}"
        ) from None


@cache
def _runtime() -> Any:
    """`tvm_ffi`, with TVM's runtime library loaded; the package `tvm`, which has the compiler, is not imported."""
    try:
        import tvm_ffi  # noqa: PLC0415  (the reference target runs without it)
    except ImportError:
        raise _not_installed() from None
    found = importlib.util.find_spec("tvm")
    let_idle_threads_sleep()
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in Path(folder, "lib").glob("libtvm_runtime.*"):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return tvm_ffi
    raise _not_installed()


def _not_installed() -> NemocError:
    return NemocError("the cpu target needs TVM's runtime: install nemoc[cpu] (package apache-tvm)")


_configured = threading.local()
"""How many threads were wanted in the pool of this thread, and how many there are: TVM keeps one for each thread that
calls it."""


def _use_threads(count: int) -> int:
    if getattr(_configured, "wanted", None) != count:
        _configured.found = use_threads(_runtime().get_global_func, count)
        _configured.wanted = count
    found: int = _configured.found
    return found
