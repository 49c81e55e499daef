"""The child process in which kernels run on a GPU that nobody trusts yet.

It reads JSON from standard input, one object a line, and answers each line with one on the file descriptor that its
argument names. `device` is torch's number of the GPU.

    setup    {"device"}                                                     ->  {}
    request  {"do": "roofs"}                                                ->  {"bandwidth", "arithmetic"}
             {"do": "check", "subject", "candidate", "default"}             ->  {"deviation", "equal"}
             {"do": "time", "subject", "candidates", "rounds", "seed"}      ->  {"seconds"}

each of which may be answered by {"error"} instead. After an error of the device nothing in the process can use it any
more, so it ends; whoever asked starts another one.

`subject` is a folder that `nemoc.gpu_laboratory` has filled: `site.json` with the op as a graph, the sizes, and how
operands and results lie in memory; and `tensors.safetensors` with the operands that cannot be just any numbers. The
others are drawn on the device, where also is computed what the results should be. A candidate is {"stages", "scratch",
"updates"}: its kernels, the views of its scratch, and what it updates in place. `deviation` is the largest relative
error of a result, `equal` whether all have the bits that the default's have.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemoc.autotune.gpu_clock import Clock, EventClock, measure_roofs
from nemoc.codegen.children import serve
from nemoc.codegen.guarded import Buffer, KernelFault, Views, bits, run_views
from nemoc.codegen.plan import Arg, View
from nemoc.ir import NemocError, parse
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Env
from nemoc.ir.region import evaluate_op
from nemoc.models.drawn import draw, draw_bytes
from nemoc.passes.check import relative_error
from nemoc.runtime.cuda_device import CudaDevice, Device, LoadedKernel
from nemoc.runtime.cuda_driver import DriverError
from nemoc.runtime.launches import Binary

_WARM = 16 << 20
"""Bytes up to which an operand that a step has just computed is taken to be in the cache."""


@dataclass(frozen=True)
class Operand:
    """An operand of a site.

    Attributes:
        view: how it lies in memory, sizes as integers.
        source: "file" where it is given, "normal" for normal numbers, "bytes" for any bytes.
        scale: of normal numbers.
        warm: whether a step has just computed it.
    """

    view: View
    source: str
    scale: float
    warm: bool


class Subject:
    """A site with its operands on a device, and what its results should be.

    Args:
        folder: what the parent has written.
        place: the device.

    Attributes:
        sizes: B, L and C.
        operands: how each lies in memory.
        results: the view of each.
        tensors: a value for each operand.
    """

    def __init__(self, folder: Path, place: torch.device) -> None:
        record = json.loads((folder / "site.json").read_text("utf-8"))
        (self._node,) = parse(record["graph"], str(folder)).nodes
        self._sizes: dict[str, int] = record["sizes"]
        self.sizes = tuple(self._sizes[symbol] for symbol in "BLC")
        self.operands = [
            Operand(_view(o["view"]), o["source"], o["scale"], o["warm"])
            for o in record["operands"]
        ]
        self.results = tuple(_view(view) for view in record["results"])
        given = load_file(folder / "tensors.safetensors")
        self.tensors = [
            given[f"operand{i}"].to(place)
            if operand.source == "file"
            else _drawn(operand, f"{folder.name}/{i}", place)
            for i, operand in enumerate(self.operands)
        ]
        self.found: dict[str, tuple[torch.Tensor, ...]] = {}

    @functools.cached_property
    def expected(self) -> tuple[torch.Tensor, ...]:
        """What the results should be, computed on the device in float32, rounded where the op rounds."""
        env = Env(self._sizes)
        # Without cudnn, whose convolutions of float32 may be rounded to TF32.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
            values = dict(zip(self._node.op.operands(), self.tensors, strict=True))
            return evaluate_op(self._node.op, env, values)


def _drawn(operand: Operand, seed: str, place: torch.device) -> torch.Tensor:
    """An operand of the view's shape, the same along strides of 0."""
    view = operand.view
    pairs = zip(view.shape, view.strides, strict=True)
    shape = [1 if stride == 0 else int(size) for size, stride in pairs]
    out = torch.empty(shape, dtype=view.dtype.torch, device=place)
    if operand.source == "bytes":
        draw_bytes(out.view(-1), seed)
    else:
        draw(out.view(-1), operand.scale, seed)
    return out.expand([int(size) for size in view.shape])


@dataclass(frozen=True)
class _Launch:
    """A kernel of a candidate: how many programs, and which tensors it is given."""

    kernel: LoadedKernel
    tasks: int
    args: tuple[Arg, ...]


class Trials:
    """Runs candidates on a device, which is torch's default one meanwhile.

    Args:
        device: the device.
        clock: times runs on it.
    """

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self._loaded: dict[str, LoadedKernel] = {}
        self._subject: tuple[str, Subject] | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a request."""
        device = self._device
        with device.active(), device.in_order(), device.place:
            if request["do"] == "roofs":
                roofs = measure_roofs(self._clock, device.place)
                return {"bandwidth": roofs.bandwidth, "arithmetic": roofs.arithmetic}
            subject = self._open(request["subject"])
            if request["do"] == "check":
                return self.check(subject, request["candidate"], request["default"])
            given = request["candidates"], request["rounds"], request["seed"]
            return {"seconds": self.time(subject, *given)}

    def check(
        self, subject: Subject, candidate: Mapping[str, Any], default: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run a candidate once on guarded memory and compare its results."""
        try:
            found = self._results(subject, candidate)
        except KernelFault as fault:
            return {"deviation": math.inf, "equal": False, "fault": str(fault)}
        key = json.dumps(default)
        if key not in subject.found:
            subject.found[key] = found if candidate == default else self._results(subject, default)
        same = subject.found[key]
        equal = all(torch.equal(bits(a), bits(b)) for a, b in zip(found, same, strict=True))
        pairs = zip(found, subject.expected, same, strict=True)
        return {"deviation": max(_deviation(*three) for three in pairs), "equal": equal}

    def time(
        self, subject: Subject, candidates: Sequence[Mapping[str, Any]], rounds: int, seed: int
    ) -> list[list[float]]:
        """Seconds of each candidate in each round; in a round all run, in random order, each with cold caches.

        What a step would have just computed is brought back into the cache first. Rounds go on what earlier ones left
        in updated operands.
        """
        held = {
            Arg("operand", i): Buffer.holding(operand.view, {}, tensor, aligned=True)
            for i, (operand, tensor) in enumerate(
                zip(subject.operands, subject.tensors, strict=True)
            )
        }
        warm = [
            held[Arg("operand", i)].memory
            for i, operand in enumerate(subject.operands)
            if operand.warm and int(operand.view.span) <= _WARM
        ]
        runs = [self._run(subject, candidate, dict(held)) for candidate in candidates]
        for run in runs:
            run()

        def bring_back() -> None:
            for memory in warm:
                memory.amax()

        order, chance = list(range(len(runs))), random.Random(seed)
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            chance.shuffle(order)
            for number in order:
                seconds[number].append(self._clock.seconds(runs[number], bring_back))
        return seconds

    def _open(self, folder: str) -> Subject:
        """A subject; the one before goes, since the device may not hold both."""
        if self._subject is None or self._subject[0] != folder:
            self._subject = None
            self._subject = folder, Subject(Path(folder), self._device.place)
        return self._subject[1]

    def _results(self, subject: Subject, candidate: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        views = Views(
            tuple(operand.view for operand in subject.operands),
            subject.results,
            tuple(map(_view, candidate["scratch"])),
            tuple((result, operand) for result, operand in candidate["updates"]),
            aligned=True,
        )

        def call(buffers: Mapping[Arg, Buffer]) -> None:
            self._prepared(subject, candidate, buffers)()
            self._device.synchronize()

        return run_views(views, {}, subject.tensors, call)

    def _run(
        self, subject: Subject, candidate: Mapping[str, Any], buffers: dict[Arg, Buffer]
    ) -> Callable[[], None]:
        """A run of a candidate on operands that all share; scratch and results of its own."""
        for result, operand in candidate["updates"]:
            buffers[Arg("result", result)] = buffers[Arg("operand", operand)]
        for i, view in enumerate(subject.results):
            buffers.setdefault(Arg("result", i), Buffer(view, {}, aligned=True))
        for i, record in enumerate(candidate["scratch"]):
            buffers[Arg("scratch", i)] = Buffer(_view(record), {}, aligned=True)
        return self._prepared(subject, candidate, buffers)

    def _prepared(
        self, subject: Subject, candidate: Mapping[str, Any], buffers: Mapping[Arg, Buffer]
    ) -> Callable[[], None]:
        """What launches a candidate on some memory."""
        launches = []
        for launch in map(self._launch, candidate["stages"]):
            binary = launch.kernel.binary
            hidden = [
                self._device.allocate(max(1, launch.tasks * size))
                for size in (binary.global_scratch, binary.profile_scratch)
            ]
            pointers = [int(buffers[arg].pointer.value or 0) for arg in launch.args]
            ends = (hidden[0].data_ptr(), hidden[1].data_ptr())
            arguments = binary.arguments(pointers, subject.sizes, ends)
            launches.append((launch.kernel, launch.tasks, arguments, hidden))

        def run(buffers: Mapping[Arg, Buffer] = buffers) -> None:  # which has to stay
            for kernel, tasks, arguments, _ in launches:
                if tasks:
                    self._device.launch(kernel, tasks, arguments)

        return run

    def _launch(self, record: Mapping[str, Any]) -> _Launch:
        file = record["file"]
        if file not in self._loaded:
            image = Path(file).read_bytes()
            self._loaded[file] = self._device.load(Binary(**record["binary"]), image, file)
        args = tuple(Arg(kind, index) for kind, index in record["args"])
        return _Launch(self._loaded[file], record["tasks"], args)


def _deviation(found: torch.Tensor, expected: torch.Tensor, same: torch.Tensor) -> float:
    """The relative error of a result. Integers are the default's or wrong: others may be as good, where keys tie."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, same) else math.inf
    return relative_error(found.float(), expected.float())


def _view(record: Mapping[str, Any]) -> View:
    return View(DType(record["dtype"]), tuple(record["shape"]), tuple(record["strides"]))


def _is_lost(error: Exception) -> bool:
    """Whether the device can no longer be used."""
    if isinstance(error, DriverError):
        return True
    return not isinstance(error, NemocError | torch.OutOfMemoryError) and "CUDA error" in str(error)


def _start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    device = CudaDevice(setup["device"])
    with device.active():
        return Trials(device, EventClock()).answer


if __name__ == "__main__":
    serve(_start, ends=_is_lost)
