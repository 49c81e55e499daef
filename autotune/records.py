"""Records: the schedules that tuning found, with what was measured and where.

A record is for one kernel on one device with given tool versions. The kernel's name holds a hash of its default text,
in which shapes, types, layouts and the code generator's version show, so nothing else needs to be in the key. Files
of records are JSON; they may come from other people, and are read as such.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemoc.codegen.plan import Site
from nemoc.codegen.tunables import Setting
from nemoc.ir.json_field import JsonField
from nemoc.ir.json_file import read_json
from nemoc.ir.region import Region

FORMAT = 1

SHIPPED = Path(__file__).with_name("shipped.json")
"""Records that come with nemoc, each measured on the device that it names."""

MOST_TRIED = 64
"""Trials that a record keeps at most."""

_MOST = 1 << 31

_MOST_SETTINGS = 64
"""Tunables that a kernel can have in a file of records."""

_LATER = ("defaults", "tried")
"""Fields that records written before there were any lack."""

Tried = tuple[Mapping[str, Setting], float]
"""A schedule, as settings that differ from the defaults, and its time relative to the default's."""

_KERNEL = re.compile(r"[\w+]{1,2000}\Z")


@dataclass(frozen=True)
class Device:
    """What kernels are tuned for.

    Attributes:
        name: as in `Record.device`.
        tools: versions of what compiles them.
        machine: the model of the processor.
        predicted_by: what predicts times; empty where they are measured.
    """

    name: str
    tools: str
    machine: str
    predicted_by: str = ""

    @property
    def origin(self) -> str:
        """As in `Record`."""
        return "predicted" if self.predicted_by else "measured"


@dataclass(frozen=True)
class Record:
    """What tuning one kernel came to.

    Attributes:
        kernel: the name of its default plan.
        device: what it was measured on, such as `cpu:znver3, 2 threads`; predicted ones say for what.
        tools: versions of what compiles it.
        structure: what the kernel does, without sizes (`structure_of`).
        shape: the sizes that the structure leaves open.
        sizes: B, L and C at which it was measured.
        schedule: settings that differ from the defaults; empty where the default was best.
        numerics: "same" if the results have the bits that the default's have, else "any".
        ratio, low, high: time relative to the default's: the median, and its interval of 95 % confidence.
        seconds: medians of the default and of the schedule.
        trials: candidates tried.
        origin: "measured" or "predicted".
        machine: the model of the processor.
        date: of the measurement, ISO 8601.
        defaults: the settings of the default of whatever could be chosen.
        tried: trials that ran right, at most `MOST_TRIED` of them; other shapes are predicted from them.
    """

    kernel: str
    device: str
    tools: str
    structure: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    schedule: Mapping[str, Setting]
    numerics: str
    ratio: float
    low: float
    high: float
    seconds: tuple[float, float]
    trials: int
    origin: str
    machine: str
    date: str
    defaults: Mapping[str, Setting] = field(default_factory=dict)
    tried: tuple[Tried, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What may have one record only."""
        sizes = tuple(sorted(self.sizes.items()))
        return self.kernel, self.device, self.tools, sizes, self.numerics, self.origin

    @property
    def when(self) -> datetime:
        """The date; where it names no zone, it is UTC's."""
        found = datetime.fromisoformat(self.date)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


class Records:
    """A set of records.

    Args:
        records: in any order; of two with one key the later one counts.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[tuple[object, ...], Record] = {}
        self.add(records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Record]) -> None:
        """Put records in; one replaces that of its key if it is not older."""
        for record in records:
            held = self._records.get(record.key)
            if held is None or held.when <= record.when:
                self._records[record.key] = record

    def remove(self, records: Iterable[Record]) -> None:
        """Take out what has the keys of some records."""
        for record in records:
            self._records.pop(record.key, None)

    def find(
        self,
        kernel: str,
        device: str,
        tools: str,
        numerics: str = "same",
        predicted: bool = False,
    ) -> Record | None:
        """The record of exactly this kernel, the latest of several sizes; none if there is none.

        Args:
            kernel, device, tools: as in `Record`.
            numerics: "same" leaves out what changes bits.
            predicted: where nothing was measured, take what was predicted.
        """
        found = [
            r
            for r in self
            if (r.kernel, r.device, r.tools) == (kernel, device, tools)
            and (predicted or r.origin == "measured")
            and (numerics == "any" or r.numerics == "same")
        ]
        return max(found, key=lambda r: (r.origin == "measured", r.when, -r.ratio), default=None)

    def relatives(self, structure: str, device: str) -> list[Record]:
        """Records of kernels that do the same on the same device, whatever their sizes."""
        return [r for r in self if (r.structure, r.device) == (structure, device)]


def read_records(path: Path) -> Records:
    """The records of a file.

    Raises:
        NemocError: it cannot be read, or holds something else.
    """
    fields = JsonField(str(path), "", read_json(path)).fields(("format", "records"))
    if fields["format"].value != FORMAT:
        raise fields["format"].wrong(str(FORMAT))
    return Records(map(_record, fields["records"].items()))


def records_text(records: Records) -> str:
    """The text of a file of records, sorted, a line for each."""
    entries = sorted((r.to_json() for r in records), key=lambda r: (r["device"], r["kernel"]))
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    return f'{{"format": {FORMAT}, "records": [\n{lines}\n]}}\n'


def compact(tried: Iterable[Tried]) -> tuple[Tried, ...]:
    """Trials as a record keeps them: by ratio; of more than `MOST_TRIED` every so many, the fastest and slowest too."""
    ordered = sorted(tried, key=lambda t: (t[1], repr(sorted(t[0].items()))))
    if len(ordered) > MOST_TRIED:
        step = (len(ordered) - 1) / (MOST_TRIED - 1)
        ordered = [ordered[round(i * step)] for i in range(MOST_TRIED)]
    return tuple((dict(schedule), float(f"{ratio:.4g}")) for schedule, ratio in ordered)


def structure_of(site: Site) -> tuple[str, tuple[int, ...]]:
    """What a site does without its sizes, and its sizes: two sites with one structure differ in these only."""
    nodes = site.op.body.nodes if isinstance(site.op, Region) else ()
    ops = ",".join(node.op.mnemonic() for node in nodes) or site.op.mnemonic()
    shape: list[int] = []
    operands = []
    for view in site.operands:
        axes = []
        for size in view.shape:
            if isinstance(size, int):
                shape.append(size)
            axes.append("#" if isinstance(size, int) else str(size))
        operands.append(f"{view.dtype}[{','.join(axes)}]")
    return f"{ops}({';'.join(operands)})", tuple(shape)


def _record(entry: JsonField) -> Record:
    """A record from JSON data that somebody else wrote."""
    there = entry.entries()
    names = [n for n in Record.__dataclass_fields__ if n in there or n not in _LATER]
    found = entry.fields(names)
    kernel = found["kernel"].text()
    if not _KERNEL.match(kernel):
        raise found["kernel"].wrong("the name of a plan")
    seconds = [s.number() for s in found["seconds"].items()]
    if len(seconds) != 2:
        raise found["seconds"].wrong("two numbers")
    return Record(
        kernel=kernel,
        device=found["device"].text(),
        tools=found["tools"].text(),
        structure=found["structure"].text(),
        shape=tuple(n.integer(0, _MOST) for n in found["shape"].items()),
        sizes={k: n.integer(0, _MOST) for k, n in found["sizes"].entries().items()},
        schedule=_settings(found["schedule"]),
        numerics=found["numerics"].one_of("same", "any"),
        ratio=found["ratio"].number(),
        low=found["low"].number(),
        high=found["high"].number(),
        seconds=(seconds[0], seconds[1]),
        trials=found["trials"].integer(0, _MOST),
        origin=found["origin"].one_of("measured", "predicted"),
        machine=found["machine"].text(),
        date=_date(found["date"]),
        defaults=_settings(found["defaults"]) if "defaults" in found else {},
        tried=tuple(map(_tried, _few(found["tried"]))) if "tried" in found else (),
    )


def _date(value: JsonField) -> str:
    text = value.text()
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise value.wrong("a date such as 2026-11-30T12:00:00+00:00") from None
    return text


def _few(trials: JsonField) -> Sequence[JsonField]:
    found = trials.items()
    if len(found) > MOST_TRIED:
        raise trials.wrong(f"at most {MOST_TRIED} trials")
    return found


def _tried(trial: JsonField) -> Tried:
    parts = trial.items()
    if len(parts) != 2:
        raise trial.wrong("settings and a number")
    return _settings(parts[0]), parts[1].number()


def _settings(entry: JsonField) -> dict[str, Setting]:
    found = entry.entries()
    if len(found) > _MOST_SETTINGS:
        raise entry.wrong(f"at most {_MOST_SETTINGS} settings")
    return {name: _setting(value) for name, value in found.items()}


def _setting(value: JsonField) -> Setting:
    return value.text() if type(value.value) is str else value.integer(-_MOST, _MOST)
