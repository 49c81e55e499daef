"""A CUDA device: everything that running a program asks of torch's CUDA and of the driver, and nothing else does."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime.cuda_driver import CudaDriver, DriverError
from nemoc.runtime.launches import Binary

_ELF = b"\x7fELF"
"""What a cubin begins with."""

_FIRST_EXACT = (9, 0)
"""From this compute capability on, kernels run on exactly the one they were compiled for, since they use instructions
of its own (sm_90a). Those for older ones run on later devices of the generation too."""

_FIRST_AHEAD = (12, 3)
"""The first CUDA that records launches which may start while former ones run."""


_LAPS = 250
"""Pieces of work that are timed at once: with the events between them fewer than make the host wait for a stream."""

_CYCLES_PER_LAP = 4e4
"""Cycles that the device waits for each piece of work to be queued, which takes the host some 10 µs."""


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on a device.

    Attributes:
        function: its handle.
        binary: how it is launched.
    """

    function: int
    binary: Binary


class Device(Protocol):
    """What a program runs on. All methods but `active` are called while it is active.

    Attributes:
        place: where its tensors are.
    """

    place: torch.device

    def active(self) -> AbstractContextManager[None]:
        """Let this thread work on the device."""
        ...

    def in_order(self) -> AbstractContextManager[None]:
        """Let work in torch's current stream begin when all former such work is done, whichever streams that was in."""
        ...

    def allocate(self, size: int) -> torch.Tensor:
        """Memory that holds anything: uint8 [size], aligned to 256 bytes.

        Raises:
            NemocError: there is not that much.
        """
        ...

    def staging(self, size: int) -> torch.Tensor:
        """Memory of the host from which copies to the device are fast: uint8 [size]."""
        ...

    def synchronize(self) -> None:
        """Wait until everything is done that was asked for."""
        ...

    def load(self, binary: Binary, image: bytes, what: str) -> LoadedKernel:
        """Load a kernel.

        Args:
            binary: the kernel.
            image: its file's content.
            what: what messages call the file.

        Raises:
            NemocError: it cannot be loaded here.
        """
        ...

    def launch(self, kernel: LoadedKernel, tasks: int, arguments: Sequence[int]) -> None:
        """Launch a kernel in torch's current stream.

        Args:
            kernel: what `load` gave.
            tasks: how many programs, at least 1.
            arguments: the value of each parameter.
        """
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Note the launches that `work` makes, without running them; what is returned runs them all at once.

        Raises:
            NemocError, RuntimeError: the device cannot, or `work` fails.
        """
        ...

    def laps(self, works: Sequence[Callable[[], None]]) -> list[float]:
        """Seconds that the device takes for each of several pieces of work, one behind the other.

        As many as the device's queue holds are queued before the first of them begins.
        """
        ...

    def close(self) -> None:
        """Free all kernels, once what runs is done. Called once, whether active or not."""
        ...


class CudaDevice:
    """An NVIDIA GPU, in the context that torch uses on it.

    Args:
        index: torch's number of it.
        driver: None for the one that is installed.
        ahead: whether kernels that wait for former ones themselves are launched while those run, so that launching
            takes no time of its own; otherwise each is when the former has ended.

    Raises:
        NemocError: the driver is missing.
    """

    def __init__(self, index: int, driver: CudaDriver | None = None, ahead: bool = True) -> None:
        self.place = torch.device("cuda", index)
        self._index = index
        self._name = torch.cuda.get_device_name(index)
        self._process = os.getpid()
        self._driver = driver or CudaDriver()
        self._ahead = ahead and self._driver.version >= _FIRST_AHEAD
        self._context = self._driver.retain_context(index)
        self._modules: list[int] = []
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise NemocError(
                "the cuda target was loaded before this process was forked, and a fork cannot use the GPU; "
                "load the artifact in a process that is started anew (spawn)"
            )
        with self._selected(), self._driver.current(self._context):
            yield

    def _selected(self) -> AbstractContextManager[None]:
        """Let torch's calls that name no device mean this one."""
        return torch.cuda.device(self.place)

    def _stream(self) -> int:
        """The handle of torch's current stream."""
        return torch.cuda.current_stream(self.place).cuda_stream

    @contextmanager
    def in_order(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.place)
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def allocate(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.place)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self.place)
            raise NemocError(
                f"{self._name}: {size} bytes of GPU memory cannot be allocated, "
                f"{free} of {total} are free"
            ) from None

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.place).synchronize()

    def load(self, binary: Binary, image: bytes, what: str) -> LoadedKernel:
        if not image.startswith(_ELF):  # the driver takes no length, and would read on
            raise NemocError(f"{what}: is no cubin")
        try:
            module = self._driver.load(image)
            self._modules.append(module)
            function = self._driver.function(module, binary.symbol, binary.shared)
        except DriverError as error:
            hint = ""
            if error.is_unloadable:
                known = ".".join(map(str, self._driver.version))
                hint = f"; the driver knows CUDA {known}, a newer one may be needed"
            raise NemocError(f"{what}: cannot be loaded on {self._name}: {error}{hint}") from None
        return LoadedKernel(function, binary)

    def launch(self, kernel: LoadedKernel, tasks: int, arguments: Sequence[int]) -> None:
        binary = kernel.binary
        self._driver.launch(
            kernel.function,
            tasks,
            binary.threads,
            binary.shared,
            self._stream(),
            arguments,
            ahead=self._ahead and binary.waits,
        )

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.place)
        # Other threads may go on allocating memory, which would end a recording that looks after the whole process.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def laps(self, works: Sequence[Callable[[], None]]) -> list[float]:
        pieces = [works[start : start + _LAPS] for start in range(0, len(works), _LAPS)]
        return [lap for piece in pieces for lap in self._laps(piece)]

    def _laps(self, works: Sequence[Callable[[], None]]) -> list[float]:
        stream = torch.cuda.current_stream(self.place)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        torch.cuda._sleep(int(_CYCLES_PER_LAP * len(works)))
        for event, work in zip(events, works, strict=False):
            event.record(stream)
            work()
        events[-1].record(stream)
        events[-1].synchronize()
        return [one.elapsed_time(next_) / 1e3 for one, next_ in pairwise(events)]

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        with self.active():
            self.synchronize()
            if self._done is not None:  # in whichever stream that was
                self._done.synchronize()
            for module in self._modules:
                self._driver.unload(module)
        self._driver.release_context(self._index)


def find_device(target: str, what: str) -> CudaDevice:
    """A GPU that runs code for a target: torch's current one if it does, else the first that does.

    Args:
        target: such as `cuda:sm_90`.
        what: what messages call that which needs it.

    Raises:
        NemocError: there is none, or the target is none of CUDA's.
    """
    needed = _capability(target, what)
    found = _capabilities()
    index = _index(needed, found)
    if index is not None:
        return CudaDevice(index)
    raise NemocError(
        f"{what}: is for {target} and needs an NVIDIA GPU of compute capability "
        f"{needed[0]}.{needed[1]}, found {_described(found)}"
    )


def device_at_hand(target: str) -> tuple[int, str] | None:
    """torch's number and the model of a GPU that runs code for a target, as `find_device` finds it; none if none does.

    Args:
        target: such as `cuda:sm_90`; any.
    """
    if not target.startswith("cuda:"):
        return None
    try:
        needed = _capability(target, "the target")
    except NemocError:
        return None
    index = _index(needed, _capabilities())
    return None if index is None else (index, torch.cuda.get_device_name(index))


def _described(found: Mapping[int, tuple[int, int]]) -> str:
    """Devices in words."""
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is built without CUDA"
    names = (f"{a}.{b} ({torch.cuda.get_device_name(i)})" for i, (a, b) in found.items())
    return ", ".join(names) or "none"


def _index(needed: tuple[int, int], found: Mapping[int, tuple[int, int]]) -> int | None:
    """torch's number of the device that is taken; none where none runs the code."""
    if not found:
        return None
    order = (torch.cuda.current_device(), *found)
    return next((index for index in order if _runs(needed, found[index])), None)


def _capability(target: str, what: str) -> tuple[int, int]:
    """The compute capability in a target's name."""
    match = re.fullmatch(r"cuda:sm_([0-9]{1,3})([0-9])", target)
    if match is None:
        raise NemocError(f"{what}: target is {target[:60]!r}, expected one such as 'cuda:sm_90'")
    return int(match[1]), int(match[2])


def _capabilities() -> dict[int, tuple[int, int]]:
    """The compute capability of each device, by torch's number of it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return {}
    return {i: torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}


def _runs(needed: tuple[int, int], found: tuple[int, int]) -> bool:
    if needed >= _FIRST_EXACT:
        return found == needed
    return found[0] == needed[0] and found[1] >= needed[1]
