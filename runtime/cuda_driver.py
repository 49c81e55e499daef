"""The calls of NVIDIA's driver that it takes to run compiled kernels.

Kernels are loaded and launched through the driver alone, with a recorded list of parameters: which torch or Triton is
installed, and whether Triton is at all, makes no difference to an artifact.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p, pointer
from typing import Any

from nemoc.ir.errors import NemocError


class _AttributeValue(ctypes.Union):
    """CUlaunchAttributeValue."""

    _fields_ = (("number", c_int), ("space", ctypes.c_uint64 * 8))


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("value", _AttributeValue))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_LaunchAttribute)),
        ("count", c_uint),
    )


_AHEAD = _LaunchAttribute(6, _AttributeValue(1))
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel itself waits for former work of the stream."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_void_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (
        POINTER(_LaunchConfig),
        c_void_p,
        POINTER(c_void_p),
        POINTER(c_void_p),
    ),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
"""The driver's functions and the types of their parameters; each returns 0 or an error's number."""

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_FREE_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have without asking."""

_UNLOADABLE = {200, 209, 218, 222}
"""Numbers of the errors for code that the driver does not know: CUDA_ERROR_INVALID_IMAGE, NO_BINARY_FOR_GPU,
INVALID_PTX, UNSUPPORTED_PTX_VERSION."""


class DriverError(NemocError):
    """A call of the driver failed.

    Args:
        call: the function.
        code: what it returned.
        text: what the driver says that means.

    Attributes:
        code: what it returned.
    """

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"CUDA: {call}: {text} (error {code})")
        self.code = code

    @property
    def is_unloadable(self) -> bool:
        """Whether the driver does not know how to load the code at all."""
        return self.code in _UNLOADABLE


class CudaDriver:
    """The driver. Handles of what it makes are plain integers.

    Args:
        library: what has the functions; None for the driver that is installed.

    Raises:
        NemocError: there is none, or it cannot be initialised.
    """

    def __init__(self, library: Any = None) -> None:
        self._calls = _bind(_open() if library is None else library)
        self._call("cuInit", 0)

    @property
    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver knows, such as (12, 4)."""
        number = c_int()
        self._call("cuDriverGetVersion", number)
        return number.value // 1000, number.value % 1000 // 10

    def retain_context(self, index: int) -> int:
        """The context that torch works in on a device; to be given back by `release_context`."""
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", device, index)
        self._call("cuDevicePrimaryCtxRetain", context, device)
        return _handle(context)

    def release_context(self, index: int) -> None:
        """Give a device's context back."""
        device = c_int()
        self._call("cuDeviceGet", device, index)
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Let calls of this thread work in a context; a thread that has not used the device has none."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", c_void_p())

    def load(self, image: bytes) -> int:
        """A module from a cubin.

        Raises:
            DriverError: it is none, or one for other devices or a newer driver.
        """
        module = c_void_p()
        self._call("cuModuleLoadData", module, image)
        return _handle(module)

    def unload(self, module: int) -> None:
        """Free a module; nothing of it may run any more."""
        self._call("cuModuleUnload", module)

    def function(self, module: int, symbol: str, shared: int) -> int:
        """A kernel of a module, which may have that much shared memory in each launch.

        Raises:
            DriverError: there is no such kernel, or the device has less shared memory.
        """
        function = c_void_p()
        self._call("cuModuleGetFunction", function, module, symbol.encode())
        if shared > _FREE_SHARED:
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        return _handle(function)

    def launch(
        self,
        function: int,
        tasks: int,
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[int],
        ahead: bool,
    ) -> None:
        """Put a kernel into a stream.

        Args:
            function: the kernel.
            tasks: programs, at least 1.
            threads: of a program.
            shared: bytes of shared memory of a program.
            stream: the stream's handle.
            arguments: the value of each parameter, none below 0: 8 bytes each, of which the driver copies as many as
                the parameter has. The machines that drive such devices store the low bytes first.
            ahead: whether it may start while former work of the stream still runs: only where the kernel waits for that
                itself.
        """
        count = len(arguments)
        values = (ctypes.c_uint64 * count)(*arguments)
        start = ctypes.addressof(values)
        places = (c_void_p * count)(*range(start, start + 8 * count, 8))
        attributes = pointer(_AHEAD) if ahead else None
        config = _LaunchConfig(
            (tasks, 1, 1), (threads, 1, 1), shared, stream, attributes, 1 if ahead else 0
        )
        self._call("cuLaunchKernelEx", config, function, places, None)

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            raise DriverError(name, code, self._text(code))

    def _text(self, code: int) -> str:
        text = c_char_p()
        if self._calls["cuGetErrorString"](code, text) or text.value is None:
            return "unknown error"
        return text.value.decode(errors="replace")


def _handle(value: c_void_p) -> int:
    return value.value or 0


def _open() -> Any:
    windows = sys.platform == "win32"
    name = "nvcuda.dll" if windows else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise NemocError(f"NVIDIA's driver is not installed: there is no {name}") from None


def _bind(library: Any) -> dict[str, Any]:
    calls = {}
    for name, parameters in _SIGNATURES.items():
        try:
            call = getattr(library, name)
        except AttributeError:
            raise NemocError(f"NVIDIA's driver is too old: it lacks {name}") from None
        call.argtypes = parameters
        call.restype = c_int
        calls[name] = call
    return calls
