"""A CUDA driver and a device in Python: launches call functions that work on the CPU's memory."""

import contextlib
import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from nemoc.ir import NemocError
from nemoc.runtime.cuda_device import CudaDevice, LoadedKernel
from nemoc.runtime.cuda_driver import CudaDriver

CONTEXT, STREAM = 0xC0, 0x57
"""Handles of the one context and stream that there are."""

CONFIG = "<7I4xQQI4x"
"""CUlaunchConfig, 56 bytes: gridDimX, Y, Z and blockDimX, Y, Z from byte 0 on, sharedMemBytes at 24, hStream at 32,
attrs at 40, numAttrs at 48. This and what follows is what a C compiler says of cuda.h of CUDA 13.1 on x86-64."""

ATTRIBUTE = "<i4xi60x"
"""CUlaunchAttribute, 72 bytes: id at byte 0, value at 8; of that a number, padded to the union's 64 bytes."""

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""The id CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


@dataclass(frozen=True)
class FakeLaunch:
    """What a kernel is launched with.

    Attributes:
        symbol: the kernel.
        tasks: how many programs.
        threads, shared: of each.
        pointers: to tensors.
        sizes: B, L and C.
        hidden: the pointers behind them.
        ahead: whether it may start while former work of the stream still runs.
    """

    symbol: str
    tasks: int
    threads: int
    shared: int
    pointers: tuple[int, ...]
    sizes: tuple[int, int, int]
    hidden: tuple[int, ...]
    ahead: bool


@dataclass(frozen=True)
class FakeKernel:
    """A kernel in Python.

    Attributes:
        pointers: how many pointers to tensors it takes.
        run: does all programs of a launch.
        hidden: how many pointers follow the sizes.
    """

    pointers: int
    run: Callable[[FakeLaunch], None] = lambda launch: None
    hidden: int = 2


def tensor_at(address: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The memory at an address."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def _read(layout: str, address: int) -> tuple[int, ...]:
    """The numbers of a structure."""
    return struct.unpack(layout, ctypes.string_at(address, struct.calcsize(layout)))


class FakeLibrary:
    """The driver's functions. Every module has every kernel.

    Attributes:
        launches: what has run.
        calls: names of all calls, launches included.
        failures: by the name of a function, what it returns instead of doing something.
        attributes: what functions were given by `cuFuncSetAttribute`: name, attribute, value.
        modules: handles of loaded modules, and what they were loaded from.
        version: of CUDA, as the driver says it.
        recording: where launches go instead of running, or none.
    """

    def __init__(self, kernels: Mapping[str, FakeKernel]) -> None:
        self.launches: list[FakeLaunch] = []
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        self.attributes: list[tuple[str, int, int]] = []
        self.modules: dict[int, bytes] = {}
        self.version = 12040
        self.recording: list[FakeLaunch] | None = None
        self._kernels = dict(kernels)
        self._functions = {0x100 + i: name for i, name in enumerate(kernels)}
        self._contexts: list[int] = []
        self._module = 0x900
        self._fault: Exception | None = None
        out, name = POINTER(c_void_p), c_char_p
        functions: dict[Callable[..., None], tuple[Any, ...]] = {
            self.cuInit: (c_uint,),
            self.cuDriverGetVersion: (POINTER(c_int),),
            self.cuDeviceGet: (POINTER(c_int), c_int),
            self.cuDevicePrimaryCtxRetain: (out, c_int),
            self.cuDevicePrimaryCtxRelease_v2: (c_int,),
            self.cuCtxPushCurrent_v2: (c_void_p,),
            self.cuCtxPopCurrent_v2: (out,),
            self.cuModuleLoadData: (out, c_void_p),
            self.cuModuleGetFunction: (out, c_void_p, name),
            self.cuModuleUnload: (c_void_p,),
            self.cuFuncSetAttribute: (c_void_p, c_int, c_int),
            self.cuLaunchKernelEx: (c_void_p, c_void_p, out, out),
            self.cuGetErrorString: (c_int, POINTER(c_char_p)),
        }
        for function, types in functions.items():
            setattr(self, function.__name__, CFUNCTYPE(c_int, *types)(self._guarded(function)))

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        name = function.__name__

        def call(*arguments: Any) -> int:
            if name != "cuGetErrorString":
                self.calls.append(name)
            try:
                if code := self.failures.get(name):
                    return code
                function(*arguments)
            except Exception as error:  # nothing may leave a function that C calls
                self._fault = error
                return 719
            return 0

        return call

    def cuInit(self, flags: int) -> None:
        assert flags == 0

    def cuDriverGetVersion(self, version: Any) -> None:
        version[0] = self.version

    def cuDeviceGet(self, device: Any, index: int) -> None:
        device[0] = index

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = CONTEXT

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        assert not self._contexts

    def cuCtxPushCurrent_v2(self, context: int) -> None:
        self._contexts.append(context)

    def cuCtxPopCurrent_v2(self, context: Any) -> None:
        context[0] = self._contexts.pop()

    def cuModuleLoadData(self, module: Any, image: int) -> None:
        self._assert_current()
        self._module += 1
        module[0] = self._module
        self.modules[self._module] = ctypes.string_at(image)

    def cuModuleGetFunction(self, function: Any, module: int, symbol: bytes) -> None:
        assert module in self.modules
        handles = {name: handle for handle, name in self._functions.items()}
        function[0] = handles[symbol.decode()]

    def cuModuleUnload(self, module: int) -> None:
        self._assert_current()
        del self.modules[module]

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.attributes.append((self._functions[function], attribute, value))

    def cuLaunchKernelEx(self, config: int, function: int, places: Any, extra: Any) -> None:
        *grid, shared, stream, attributes, count = _read(CONFIG, config)
        assert grid[1:3] == grid[4:6] == [1, 1]
        assert stream == STREAM
        assert not extra
        given = [_read(ATTRIBUTE, attributes + 72 * i) for i in range(count)]
        assert given in ([], [(PROGRAMMATIC_STREAM_SERIALIZATION, 1)])
        self._assert_current()
        symbol = self._functions[function]
        kernel = self._kernels[symbol]
        values = [ctypes.c_uint64.from_address(places[i]).value for i in range(kernel.pointers)]
        at = kernel.pointers
        sizes = [ctypes.c_int32.from_address(places[at + i]).value for i in range(3)]
        hidden = [
            ctypes.c_uint64.from_address(places[at + 3 + i]).value for i in range(kernel.hidden)
        ]
        launch = FakeLaunch(
            symbol,
            grid[0],
            grid[3],
            shared,
            tuple(values),
            (sizes[0], sizes[1], sizes[2]),
            tuple(hidden),
            ahead=bool(given),
        )
        if self.recording is not None:
            self.recording.append(launch)
        else:
            self.run(launch)

    def cuGetErrorString(self, code: int, text: Any) -> None:
        texts = {209: "no kernel image is available", 719: f"fault: {self._fault!r}"}
        self._text = texts.get(code, f"failure number {code}").encode()
        text[0] = self._text

    def run(self, launch: FakeLaunch) -> None:
        """Run a kernel now."""
        self.launches.append(launch)
        self._kernels[launch.symbol].run(launch)

    def _assert_current(self) -> None:
        assert self._contexts[-1:] == [CONTEXT]


class FakeDevice(CudaDevice):
    """A device whose memory is the CPU's. What allocates and records is fake, the rest is the real thing.

    Attributes:
        library: its driver.
        staged: bytes of the largest staging memory.
        recorded: how many recordings were made.
        lapped: how many laps were timed.
        can_record: whether that works.
        ordered: how often work was put in order.
        disordered: launches that were not.
    """

    def __init__(self, library: FakeLibrary, memory: int = 1 << 30, ahead: bool = True) -> None:
        with self._without_gpu():
            super().__init__(0, CudaDriver(library), ahead)
        self.place = torch.device("cpu")
        self.library = library
        self.staged = 0
        self.recorded = 0
        self.lapped = 0
        self.can_record = True
        self.ordered = self.disordered = 0
        self._free = memory
        self._in_order = False

    @contextlib.contextmanager
    def _without_gpu(self) -> Any:
        original = torch.cuda.get_device_name
        torch.cuda.get_device_name = lambda device=None: "Fake GPU"
        try:
            yield
        finally:
            torch.cuda.get_device_name = original

    def _selected(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _stream(self) -> int:
        return STREAM

    @contextlib.contextmanager
    def in_order(self) -> Any:
        assert not self._in_order
        self.ordered += 1
        self._in_order = True
        try:
            yield
        finally:
            self._in_order = False

    def launch(self, kernel: LoadedKernel, tasks: int, arguments: Sequence[int]) -> None:
        self.disordered += not self._in_order
        super().launch(kernel, tasks, arguments)

    def allocate(self, size: int) -> torch.Tensor:
        self._free -= size
        if self._free < 0:
            raise NemocError(f"Fake GPU: {size} bytes of GPU memory cannot be allocated")
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def staging(self, size: int) -> torch.Tensor:
        self.staged = max(self.staged, size)
        return torch.empty(size, dtype=torch.uint8)

    def synchronize(self) -> None:
        pass

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self.can_record:
            raise RuntimeError("operation not permitted when stream is capturing")
        launches: list[FakeLaunch] = []
        self.library.recording = launches
        try:
            work()
        finally:
            self.library.recording = None
        self.recorded += 1
        library = self.library

        def replay() -> None:
            for launch in launches:
                library.run(launch)

        return replay

    def laps(self, works: Sequence[Callable[[], None]]) -> list[float]:
        """As many seconds as the device has had laps."""
        for work in works:
            work()
        first = self.lapped + 1
        self.lapped += len(works)
        return [float(lap) for lap in range(first, self.lapped + 1)]
