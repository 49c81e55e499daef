"""What was measured on GPUs: one JSON line for each contender of a case, and the tables that are printed of them.

Lines are only ever added. A case is done once it has lines of the same device and the same code, so that a run that
was cut off goes on where it ended.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemoc.autotune.measure import Roofs
from nemoc.ir import NemocError

FORMAT = 1
"""Raised whenever lines would mean something else than before; those of other formats are passed over."""

OWN = "nemoc"
"""The contender that the others are compared with."""

Status = Literal["measured", "checked", "wrong", "unavailable", "failed"]
"""Timed; only held against a reference; not timed, since its results are wrong; not there; or ended with an error."""

Key = tuple[str, str, str, str]
"""Device, code, stage and case: what a line is about."""


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    Attributes:
        device: the GPU's name.
        driver: the version of CUDA that its driver knows.
        versions: of the packages that have a part in it.
    """

    device: str
    driver: str
    versions: dict[str, str] = field(default_factory=dict)


def quartiles(seconds: tuple[float, ...]) -> tuple[float, float, float]:
    """The quartiles in milliseconds, the median in the middle."""
    if len(seconds) < 2:
        return (seconds[0] * 1e3,) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low * 1e3, middle * 1e3, high * 1e3


@dataclass(frozen=True)
class Line:
    """One contender of one case.

    Attributes:
        machine: where.
        code: a digest of everything that was measured, compilers included.
        stage, case, contender: what.
        status: how it went.
        note: why it was not timed, or what else there is to know.
        ms: the quartiles of the runs in milliseconds, the median between the others; empty unless timed.
        rounds: how many runs.
        bytes, flops: what the case takes at least, by closed forms.
        tokens: that one run takes in or gives; 0 where it is no whole model.
        roofs: what the device reached in the same run.
        share: the time that the roofs allow over the median; 0 unless timed.
        error: the largest relative error of a result against the reference; none if nothing was compared.
        bound: the largest that is allowed.
    """

    machine: Machine
    code: str
    stage: str
    case: str
    contender: str
    status: Status
    note: str = ""
    ms: tuple[float, ...] = ()
    rounds: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    roofs: Roofs | None = None
    share: float = 0.0
    error: float | None = None
    bound: float | None = None

    @property
    def key(self) -> Key:
        """What the line is about."""
        return self.machine.device, self.code, self.stage, self.case

    @property
    def median(self) -> float:
        """Milliseconds; NaN unless timed."""
        return self.ms[1] if self.ms else float("nan")

    def to_json(self) -> str:
        """The line's text."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Line":
        """Read what `to_json` wrote."""
        given = {name: value for name, value in data.items() if name != "format"}
        roofs = given["roofs"]
        return cls(
            **{
                **given,
                "machine": Machine(**given["machine"]),
                "roofs": None if roofs is None else Roofs(**roofs),
                "ms": tuple(given["ms"]),
            }
        )


class Journal:
    """A file of lines.

    Args:
        path: where; need not be there yet.

    Raises:
        NemocError: something else is in the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines = list(_read(path)) if path.exists() else []

    def has(self, key: Key) -> bool:
        """Whether a case is done."""
        return any(line.key == key for line in self.lines)

    def add(self, lines: Iterable[Line]) -> None:
        """Append the lines of a case, all of them at once: a case is there as a whole or not at all."""
        given = list(lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("".join(line.to_json() + "\n" for line in given))
        self.lines += given

    def newest(self, device: str, stage: str) -> list[Line]:
        """The lines of each case of a stage that were added last, in the order in which cases came first."""
        last: dict[str, str] = {}
        for line in self._of(device, stage):
            last[line.case] = line.code
        found = {case: dict[str, Line]() for case in last}
        for line in self._of(device, stage):
            if line.code == last[line.case]:
                found[line.case][line.contender] = line
        return [line for lines in found.values() for line in lines.values()]

    def _of(self, device: str, stage: str) -> Iterator[Line]:
        return (x for x in self.lines if x.machine.device == device and x.stage == stage)


def _read(path: Path) -> Iterator[Line]:
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            data = json.loads(text)
            if data["format"] == FORMAT:
                yield Line.from_json(data)
        except (ValueError, KeyError, TypeError):
            raise NemocError(f"{path}: line {number} is no line of results") from None


def table(lines: Sequence[Line]) -> str:
    """A stage's cases one below the other, each with its contenders and their times relative to nemoc's."""
    own = {line.case: line for line in lines if line.contender == OWN}
    head = f"{'case':<34}{'contender':<28}{'ms':>11}{'quartiles':>24}{'ratio':>8}{'share':>8}{'error':>10}"
    if any(line.tokens for line in lines):
        head += f"{'tok/s':>11}"
    rows = [head]
    shown = ""
    for line in lines:
        case = "" if line.case == shown else line.case
        shown = line.case
        base = own[line.case].median if line.case in own else float("nan")
        rows.append(f"{case:<34}{line.contender:<28}{_figures(line, base)}")
    return "\n".join(rows)


def _figures(line: Line, base: float) -> str:
    """The figures of a line; `base` is nemoc's median in milliseconds, NaN where there is none."""
    error = "" if line.error is None else f"{line.error:.1e}"
    if not line.ms:
        return f"{line.status:>11}{'':>40}{error:>10}  {line.note}".rstrip()
    low, median, high = line.ms
    ratio = f"{median / base:.2f}" if base == base else ""
    text = f"{median:>11.4f}{f'{low:.4f} to {high:.4f}':>24}{ratio:>8}{line.share:>8.1%}{error:>10}"
    return text + (f"{line.tokens / median * 1e3:>11.1f}" if line.tokens else "")
