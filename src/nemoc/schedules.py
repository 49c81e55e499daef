"""Which schedules a compilation takes: those of records that were measured on the same kind of device."""

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemoc.autotune.records import (
    SHIPPED,
    Device,
    Record,
    Records,
    read_records,
    records_text,
    structure_of,
)
from nemoc.codegen.lower import Emit
from nemoc.codegen.plan import Site
from nemoc.codegen.triton.build import triton_version
from nemoc.codegen.triton.target import gpu_target
from nemoc.codegen.tunables import Schedule
from nemoc.ir import NemocError
from nemoc.options import read_options
from nemoc.runtime.files import as_path, replacing_file
from nemoc.runtime.machine import processor_model

if TYPE_CHECKING:
    from nemoc.autotune.predict import Prediction

Numerics = Literal["same", "any"]
"""Whether tuned kernels must have the bits of the defaults."""

NUMERICS: tuple[Numerics, ...] = ("same", "any")

SCHEDULES = "kernels/schedules.json"
"""The file of an artifact that says which kernels are not the defaults, and why."""

RecordSource = Records | str | Path | Iterable[str | Path] | None
"""Records, files of them, or none for what this installation knows."""


def own_records() -> Path:
    """The file to which `nemoc tune` adds what it found."""
    return read_options().cache / "tuning" / "records.json"


def own_journal() -> Path:
    """The file in which `nemoc tune` keeps its trials."""
    return read_options().cache / "tuning" / "journal.log"


def known_records(source: RecordSource = None) -> Records:
    """Records by their source: by default those that come with nemoc, then the user's own.

    Raises:
        NemocError: a file cannot be read or holds something else.
    """
    if isinstance(source, Records):
        return source
    if source is None:
        files = [path for path in (SHIPPED, own_records()) if path.exists()]
    elif isinstance(source, str | Path):
        files = [as_path(source)]
    else:
        files = list(map(as_path, source))
    found = Records()
    for path in files:
        found.add(read_records(path))
    return found


def write_records(records: Records, path: Path) -> None:
    """Write a file of records; one of that name is replaced as a whole.

    Raises:
        NemocError: it cannot be written.
    """
    with contextlib.suppress(OSError):  # said better when the file is written
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as file:
        file.write(records_text(records).encode())


def check_numerics(numerics: str) -> Numerics:
    """A user's choice.

    Raises:
        NemocError: it is none.
    """
    for known in NUMERICS:
        if numerics == known:
            return known
    raise NemocError(f"numerics is {numerics!r}, expected one of {', '.join(NUMERICS)}")


def cpu_device(mcpu: str, threads: int) -> Device:
    """The machine at hand, as records name it.

    Args:
        mcpu: LLVM's name of the CPU.
        threads: that kernels run on.
    """
    version = importlib.metadata.version("apache-tvm")
    name = f"cpu:{mcpu}, {threads} thread{'s' if threads > 1 else ''}"
    return Device(name, f"apache-tvm {version}", processor_model())


def gpu_device(target: str, predicted_by: str = "", machine: str = "") -> Device:
    """A GPU, as records name it: any of the kind that the target stands for.

    Args:
        target: such as `cuda:sm_90`.
        predicted_by: what predicts times; empty where they are measured.
        machine: the model that is at hand; empty where none is.

    Raises:
        NemocError: Triton is not installed.
    """
    kind = machine or gpu_target(target).description
    return Device(target, f"triton {triton_version()}", kind, predicted_by)


@dataclass
class Chosen:
    """Looks schedules up, and keeps which ones were taken.

    Attributes:
        records: where they are looked up.
        device: for which.
        numerics: of which kind.
        predicted: whether records of predicted times, or those of other shapes, may say what is taken where there is
            none that was measured.
        taken: the records that were found, by kernel.
        predictions: what was predicted, by kernel.
    """

    records: Records
    device: Device
    numerics: Numerics
    predicted: bool = False
    taken: dict[str, Record] = field(default_factory=dict)
    predictions: dict[str, "Prediction"] = field(default_factory=dict)

    def __call__(self, kernel: str, site: Site, emit: Emit) -> Schedule:
        """The schedule of a kernel; empty for the default."""
        record = self.records.find(
            kernel, self.device.name, self.device.tools, self.numerics, self.predicted
        )
        if record is None:
            return self._predict(kernel, site, emit).schedule if self.predicted else {}
        if record.schedule:
            self.taken[kernel] = record
        return record.schedule

    def files(self) -> Mapping[str, str]:
        """What the artifact says of them; nothing where all kernels are the defaults."""
        entries = [_entry(record) for record in self.taken.values()]
        for kernel, found in self.predictions.items():
            if found.schedule:
                entries.append(self._predicted_entry(kernel, found))
        return {SCHEDULES: json.dumps(entries, indent=1) + "\n"} if entries else {}

    def _predict(self, kernel: str, site: Site, emit: Emit) -> "Prediction":
        """What records of other shapes say of a kernel, which many layers may have."""
        from nemoc.autotune.predict import predict  # noqa: PLC0415  (loading needs no tuner)
        from nemoc.autotune.search import Space  # noqa: PLC0415

        if kernel not in self.predictions:
            structure, shape = structure_of(site)
            relatives = self.records.relatives(structure, self.device.name)
            space = Space.of(site, emit, keep_bits=self.numerics == "same")
            self.predictions[kernel] = predict(relatives, shape, space)
        return self.predictions[kernel]

    def _predicted_entry(self, kernel: str, found: "Prediction") -> dict[str, Any]:
        about = {"kernel": kernel, "origin": "predicted", "numerics": self.numerics}
        return about | {"device": self.device.name} | dataclasses.asdict(found)


_SAID = (
    "kernel",
    "origin",
    "schedule",
    "numerics",
    "ratio",
    "low",
    "high",
    "sizes",
    "device",
    "date",
)
"""Fields of a record that an artifact repeats."""


def _entry(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.to_json().items() if name in _SAID}
