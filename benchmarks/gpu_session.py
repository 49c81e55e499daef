"""A run of the benchmarks on a GPU: what is at hand, how long there is, and where lines go."""

import functools
import gc
import hashlib
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch

import nemoc
from benchmarks.gpu_parts import Parts
from benchmarks.gpu_results import OWN, Journal, Line, Machine, Status, quartiles
from nemoc.autotune.gpu_clock import Clock, Run, in_turns
from nemoc.autotune.measure import Roofs, interleaved
from nemoc.codegen.triton.build import triton_version
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.target import GPUS
from nemoc.ir import NemocError
from nemoc.models import Model
from nemoc.progress import Progress
from nemoc.runtime.cuda_device import CudaDevice, Device
from nemoc.runtime.cuda_driver import CudaDriver

_EVERY = re.compile("")
"""Found in every name."""

_LEAST, _FIRST = 60.0, 150.0
"""Seconds that have to be left for a case to be begun, and for the first of a stage, which compiles; more if one has
taken longer."""


@dataclass(frozen=True)
class Outcome:
    """How a contender did.

    Attributes:
        contender, status, note, bytes, flops, tokens, error, bound: as in a `Line`.
        seconds: of each run; empty unless timed.
    """

    contender: str
    status: Status
    note: str = ""
    seconds: tuple[float, ...] = ()
    bytes: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Task:
    """A case that can be measured.

    Attributes:
        case: its name.
        code: a digest of what is measured.
        measure: does it.
    """

    case: str
    code: str
    measure: Callable[[], list[Outcome]]


class Stage(Protocol):
    """Cases that belong together.

    Attributes:
        name: what users call it.
        about: one line, with what is aimed at.
    """

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    def case_names(self) -> tuple[str, ...]:
        """What is measured, in that order."""
        ...

    def tasks(self, session: "Session") -> Iterable[Task]:
        """How; the same names in the same order."""
        ...

    def compile_ahead(
        self, model: Model, target: str, store: KernelStore, progress: Progress | None
    ) -> None:
        """Put into a store what its tasks would compile, for a device that need not be at hand."""
        ...


class LostDeviceError(NemocError):
    """The device does nothing any more, so that this process cannot go on."""


class Session:
    """A run.

    Args:
        machine: where.
        target: what kernels are compiled for.
        open_device: gives what they run on; each time a new one, which is closed on its own.
        clock: times runs.
        roofs: what the device can do.
        journal: where lines go.
        model: what the shapes are of.
        deadline: when to end, by `time.monotonic`.
        store: where compiled kernels are kept.
        progress: told what is being done.
        again: measure what has been measured before.
        cases: measure those only whose name has this in it.
    """

    def __init__(
        self,
        machine: Machine,
        target: str,
        open_device: Callable[[], Device],
        clock: Clock,
        roofs: Roofs,
        journal: Journal,
        model: Model,
        deadline: float = float("inf"),
        store: KernelStore | None = None,
        progress: Progress | None = None,
        again: bool = False,
        cases: re.Pattern[str] = _EVERY,
    ) -> None:
        self.machine, self.target, self.model = machine, target, model
        self.parts = Parts(model, target)
        self.open_device, self.device = open_device, open_device()
        self.roofs, self.store, self.progress = roofs, store, progress
        self._clock, self._journal = clock, journal
        self._deadline, self._longest = deadline, 0.0
        self._again, self._cases = again, cases

    def digest(self, *texts: str) -> str:
        """Of what is measured and what it is compiled with."""
        everything = (*texts, self.target, torch.__version__, triton_version())
        return hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]

    def time(self, runs: Mapping[str, Run]) -> dict[str, tuple[float, ...]]:
        """Seconds of several runs of each, in turns."""
        return in_turns(runs, self._clock) if runs else {}

    def wall(self, run: Run, rounds: int) -> tuple[float, ...]:
        """Seconds of runs by the clock on the wall, each until the device is done."""

        def whole() -> None:
            run()
            self._wait()

        self._wait()
        return interleaved({"run": whole}, rounds, warmup=0)["run"].seconds

    def _wait(self) -> None:
        with self.device.active():
            self.device.synchronize()

    def free_bytes(self) -> int:
        """Memory of the device that nobody uses."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device.place)[0]

    def _has_time(self, first: bool) -> bool:
        """Whether another case can be begun, the first of a stage or a later one."""
        least = max(_FIRST if first else _LEAST, 1.5 * self._longest)
        return time.monotonic() + least < self._deadline

    def run(self, stage: Stage, tell: Callable[[str], None]) -> bool:
        """Measure what a stage has left; false if time has run out.

        Raises:
            LostDeviceError: the device does nothing any more; the case is noted as failed.
        """
        first = True
        for task in stage.tasks(self):
            key = (self.machine.device, task.code, stage.name, task.case)
            if not self._cases.search(task.case):
                continue
            if not self._again and self._journal.has(key):
                continue
            if not self._has_time(first):
                return False
            first = False
            tell(f"{stage.name}: {task.case}")
            self._measure(stage, task)
        return True

    def _measure(self, stage: Stage, task: Task) -> None:
        started = time.monotonic()
        try:
            outcomes = task.measure()
        except Exception as error:  # whatever is wrong with one case, the next may be right
            traceback.print_exc()
            outcomes = [Outcome(OWN, "failed", first_line(error))]
        self._journal.add(self._line(stage.name, task, outcome) for outcome in outcomes)
        self._longest = max(self._longest, time.monotonic() - started)
        gc.collect()
        try:
            self._wait()
            if torch.cuda.is_available():
                # What was compiled keeps its operands, and after some shapes nothing would be compiled any more.
                torch.compiler.reset()
                torch.cuda.empty_cache()
        except (NemocError, RuntimeError) as error:
            raise LostDeviceError(f"{stage.name}: {task.case}: {first_line(error)}") from None

    def _line(self, stage: str, task: Task, outcome: Outcome) -> Line:
        ms = quartiles(outcome.seconds) if outcome.seconds else ()
        least = self.roofs.seconds(outcome.bytes, outcome.flops)
        return Line(
            machine=self.machine,
            code=task.code,
            stage=stage,
            case=task.case,
            contender=outcome.contender,
            status=outcome.status,
            note=outcome.note,
            ms=ms,
            rounds=len(outcome.seconds),
            bytes=outcome.bytes,
            flops=outcome.flops,
            tokens=outcome.tokens,
            roofs=self.roofs,
            share=least * 1e3 / ms[1] if ms else 0.0,
            error=outcome.error,
            bound=outcome.bound,
        )


def first_line(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, NemocError) else f"{type(error).__name__}: {text}"[:300]


def find_target(capability: tuple[int, int]) -> str:
    """The target whose code a device of a compute capability runs best.

    Raises:
        NemocError: none.
    """
    major, minor = capability
    exact = f"cuda:sm_{major}{minor}"
    if exact in GPUS:
        return exact
    # Before 9.0, code for a smaller one of the same generation runs too.
    older = [name for name in GPUS if name.startswith(f"cuda:sm_{major}") and major < 9]
    found = [name for name in older if int(name.rpartition("_")[2]) <= 10 * major + minor]
    if not found:
        raise NemocError(f"no target for devices of compute capability {major}.{minor}")
    return found[-1]


def this_machine() -> Machine:
    """The current device of this machine."""
    packages = ("nemoc", "torch", "triton", "transformers", "mamba-ssm")
    found = {name: text for name in packages if (text := _version(name))}
    driver = ".".join(map(str, CudaDriver().version))
    return Machine(torch.cuda.get_device_name(), driver, {**found, "torch": torch.__version__})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def source_digest() -> str:
    """Of all code of nemoc: for what is more than its kernels."""
    folder = Path(nemoc.__file__).parent
    texts = [path.read_bytes() for path in _sources(folder)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _sources(folder: Path) -> Iterator[Path]:
    """Files of Python in a folder, links followed, in a fixed order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def open_device(ahead: bool = True) -> CudaDevice:
    """The current device, to launch kernels on; `ahead` as in `CudaDevice`."""
    return CudaDevice(torch.cuda.current_device(), ahead=ahead)
