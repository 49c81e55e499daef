"""The `cuda` targets: compiled kernels, launched one after the other on a GPU through its driver.

Weights are copied to the device when the artifact is loaded; scratch, tokens and logits have memory of their own there.
The decode of a state is the same launches each time, so they are recorded once and replayed.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime.backend import DeferredBackend, Opened
from nemoc.runtime.cuda_device import Device, find_device
from nemoc.runtime.launches import LAUNCHES, LaunchRecord, read_launches
from nemoc.runtime.placement import LaunchTable
from nemoc.runtime.program import DECODE, PREFILL_ALL, Program
from nemoc.runtime.recent import Recent
from nemoc.runtime.state import State
from nemoc.runtime.step_times import StepTimes

_PIECE = 64 << 20
"""Bytes of weights copied at a time."""

_MOST_RECORDED = 8
"""States whose decode is kept recorded."""


def open_cuda(opened: Opened) -> "CudaBackend":
    """The backend of an artifact for a `cuda` target, on a device of this machine.

    Raises:
        NemocError: the artifact's launches or kernels are wrong, or there is no such device.
    """
    return _prepare(opened)()


def defer_cuda(opened: Opened) -> DeferredBackend:
    """`open_cuda` on first use; launches and kernels are read at once.

    Raises:
        NemocError: the artifact's launches are wrong, or a kernel is missing.
    """
    return DeferredBackend(_prepare(opened))


def _prepare(opened: Opened) -> Callable[[], "CudaBackend"]:
    """Everything but the device."""
    table, images = read_kernels(opened)

    def make() -> CudaBackend:
        device = find_device(opened.program.target, str(opened.folder))
        return CudaBackend(table, images, opened.program, opened.weights.data, device)

    return make


def read_kernels(opened: Opened) -> tuple[LaunchTable, dict[str, bytes]]:
    """The launches of an artifact, and the content of each kernel's file by its name.

    Raises:
        NemocError: they are missing, or do not fit the program.
    """
    path = opened.folder / LAUNCHES
    if LAUNCHES not in opened.manifest.files:
        raise NemocError(f"{opened.folder}: lists no file {LAUNCHES}")
    record = read_launches(path)
    weights = opened.weights.data.numel()
    table = LaunchTable(record, opened.program, opened.signatures, weights, str(path))
    _check_largest(table, opened.program)
    return table, {file: _image(opened, file) for file in _files(record)}


def _files(record: LaunchRecord) -> tuple[str, ...]:
    return tuple(dict.fromkeys(binary.file for binary in record.binaries))


def _image(opened: Opened, file: str) -> bytes:
    if file not in opened.manifest.files:  # its digest would be unknown
        raise NemocError(f"{opened.folder}: lists no file {file[:60]!r}, which {LAUNCHES} names")
    path = opened.folder / file
    try:
        return path.read_bytes()
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


def _check_largest(table: LaunchTable, program: Program) -> None:
    """Place every function at the largest sizes, so that a record that does not fit is refused when it is loaded."""
    bounds = program.bounds
    for name in program.functions:
        length = 1 if name == DECODE else bounds.max_tokens // bounds.max_batch
        table.at(name, (bounds.max_batch, length, bounds.max_context))


class CudaBackend:
    """Launches a program's functions on a device. One step runs at a time; others wait.

    Steps go into torch's current stream and are not waited for: whoever reads logits or states does. They share
    scratch, so that on the device a step waits for the one before, also where that is in another stream.

    Args:
        table: the launches.
        images: the content of each kernel's file by its name.
        program: what they carry out.
        weights: uint8, in the layout that the kernels were compiled for; read once.
        device: what runs them.

    Raises:
        NemocError: a kernel cannot be loaded, or the device lacks memory.
    """

    def __init__(
        self,
        table: LaunchTable,
        images: Mapping[str, bytes],
        program: Program,
        weights: torch.Tensor,
        device: Device,
    ) -> None:
        self._table = table
        self._program = program
        self._device = device
        self._lock = threading.Lock()
        self._times: list[StepTimes] | None = None
        self._recordings = Recordings(device)
        weakref.finalize(self, _close, self._recordings, device).atexit = False
        bounds = program.bounds
        with device.active():
            self._kernels = [
                device.load(binary, images[binary.file], f"{program.name}/{binary.file}")
                for binary in table.record.binaries
            ]
            self._weights = upload(device, weights)
            self._scratch = device.allocate(table.record.scratch)
            self._tokens = device.allocate(8 * bounds.max_tokens).view(torch.int64)
            self._valid = device.allocate(4 * bounds.max_batch).view(torch.int32)
            self._logits = device.allocate(4 * bounds.max_batch * program.vocab)
            # Recorded launches point to former ones, so that they stay.
            self._hidden = ([device.allocate(0)], [device.allocate(0)])

    def allocate(self, size: int) -> torch.Tensor:
        with self._lock, self._device.active(), self._device.in_order():
            return self._device.allocate(size).zero_()

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        if state.arena.device != self._device.place:
            raise NemocError(
                f"state: is on {state.arena.device}, {self._program.name} is on {self._device.place}"
            )
        rows, length = tokens.shape
        shape = (rows, length) if function == PREFILL_ALL else (rows,)
        size = 4 * rows * (length if function == PREFILL_ALL else 1) * self._program.vocab
        with self._lock, self._device.active(), self._device.in_order():
            self._tokens[: tokens.numel()].copy_(tokens.reshape(-1))
            self._valid[:rows].copy_(valid)
            recorded = function == DECODE and self._times is None
            memory = self._logits[:size] if recorded else self._device.allocate(size)
            step = (function, (rows, length, state.capacity), state.arena, memory)
            if self._times is not None:
                self._times.append(self._timed(*step))
            elif recorded:
                self._recordings.run(state, partial(self._launch, *step))
                memory = memory.clone()  # the next step of any state writes there
            else:
                self._launch(*step)
        return memory.view(torch.float32).view(*shape, self._program.vocab)

    @contextlib.contextmanager
    def timed(self, phases: Mapping[str, Sequence[int]]) -> Iterator[list[StepTimes]]:
        """As `TimedBackend.timed`; decodes run launch by launch too, with events between launches."""
        for name, function in self._table.record.functions.items():
            if sum(phases.get(name, ())) != len(function.launches):
                raise NemocError(
                    f"{self._program.name}: {name} has {len(function.launches)} launches, "
                    f"its record of costs {sum(phases.get(name, ()))}"
                )
        found: list[StepTimes] = []
        with self._lock:
            if self._times is not None:
                raise NemocError("launches are being timed already")
            self._times = found
        try:
            yield found
        finally:
            with self._lock:
                self._times = None

    def _timed(
        self, function: str, sizes: tuple[int, int, int], state: torch.Tensor, logits: torch.Tensor
    ) -> StepTimes:
        """Carry out a function launch by launch."""
        numbers, launches = zip(*self._launches(function, sizes, state, logits), strict=True)
        seconds = [0.0] * len(self._table.record.functions[function].launches)
        for number, lap in zip(numbers, self._device.laps(launches), strict=True):
            seconds[number] = lap
        return StepTimes(function, sizes, sum(seconds), tuple(seconds), waiting=0.0)

    def _launch(
        self, function: str, sizes: tuple[int, int, int], state: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """All launches of a function."""
        for _, launch in self._launches(function, sizes, state, logits):
            launch()

    def _launches(
        self, function: str, sizes: tuple[int, int, int], state: torch.Tensor, logits: torch.Tensor
    ) -> Iterator[tuple[int, Callable[[], None]]]:
        """The launches of a function that have tasks at these sizes, by number, in order."""
        placed = self._table.at(function, sizes)
        given = {"tokens": self._tokens, "valid": self._valid}
        inputs = [given[name] for name in self._table.inputs[function]]
        arenas = (self._weights, state, self._scratch, *inputs, logits)
        starts = [arena.data_ptr() for arena in arenas]
        hidden = (self._hidden_start(0, placed.hidden[0]), self._hidden_start(1, placed.hidden[1]))
        for launch in placed.launches:
            kernel = self._kernels[launch.binary]
            pointers = [starts[arena] + offset for arena, offset in launch.pointers]
            arguments = kernel.binary.arguments(pointers, sizes, hidden)
            yield launch.number, partial(self._device.launch, kernel, launch.tasks, arguments)

    def _hidden_start(self, which: int, size: int) -> int:
        """Where at least that many bytes of hidden scratch begin."""
        kept = self._hidden[which]
        if kept[-1].numel() < size:
            kept.append(self._device.allocate(size))
        return kept[-1].data_ptr()


def _close(recordings: "Recordings", device: Device) -> None:
    recordings.clear()
    with contextlib.suppress(NemocError, RuntimeError):  # a device that has failed keeps failing
        device.close()


def upload(device: Device, data: torch.Tensor) -> torch.Tensor:
    """A copy of bytes on a device, which is active, by way of one small piece of fast memory at a time.

    Args:
        device: where to.
        data: uint8, possibly a file that is mapped.
    """
    size = data.numel()
    copy = device.allocate(size)
    staging = device.staging(min(size, _PIECE))
    for start in range(0, size, _PIECE):
        piece = data[start : start + _PIECE]
        device.synchronize()  # what the staging memory held has left it
        part = staging[: piece.numel()].copy_(piece)
        copy[start : start + _PIECE].copy_(part, non_blocking=True)
    device.synchronize()
    return copy


class Recordings:
    """The decodes of states, recorded.

    A state's first decode runs launch by launch, which also loads what the driver loads late; its second is recorded.
    A recording goes with its state, or when others were used later. On a device that cannot record, every step runs
    launch by launch.

    Args:
        device: what records.
        most: for how many states.
    """

    def __init__(self, device: Device, most: int = _MOST_RECORDED) -> None:
        self._device = device
        self._possible = True
        self._recent: Recent[weakref.ref[State], Callable[[], None]] = Recent(most)

    def __len__(self) -> int:
        return len(self._recent)

    def run(self, state: State, work: Callable[[], None]) -> None:
        """Do a state's decode.

        Args:
            state: whose; its memory does not move.
            work: makes the launches, the same ones each time.
        """
        key = weakref.ref(state, self._recent.discard)
        replay = self._recent.get(key)
        if replay is None:
            work()
            self._recent.put(key, _seen)
        elif replay is not _seen:
            replay()
        elif (recorded := self._record(work)) is not None:
            self._recent.put(key, recorded)
            recorded()
        else:
            work()

    def clear(self) -> None:
        """Drop all."""
        self._recent.clear()

    def _record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        if self._possible:
            try:
                return self._device.record(work)
            except (NemocError, RuntimeError):  # the launches themselves have worked before
                self._possible = False
        return None


def _seen() -> None:
    """Stands for the recording of a state that was decoded once."""
