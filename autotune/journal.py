"""The journal of tuning: what was tried, on which kernel, and how it went; written as it happens.

Trials lie in an Optuna storage: a journal file by default, or whatever a URL names (`sqlite:///tuning.db`,
`mysql://...`), on which several processes may work at once. A study is one kernel at given sizes on one device; a
trial is one candidate. A trial is open while its process works on it; if that process dies it is lost, and the
candidate may be tried again. All that is done stays done.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from nemoc.codegen.bench import Outcome
from nemoc.codegen.tunables import Schedule, Tunable
from nemoc.ir.errors import NemocError

_FOREIGN = timedelta(minutes=15)
"""Age from which on an open trial of another machine counts as lost."""

_LOCKED = 20.0
"""Seconds for which another process may hold the journal file."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried.

    Attributes:
        number: within its study.
        schedule: its settings.
        kernels: the name of its plan.
        outcome: how it ended.
        ratio: its time relative to the default's in the same rounds; none unless it is "ok".
        seconds: of each round.
        equal: whether its results have the bits of the default's.
        cost: seconds of wall clock that the trial took.
        message: what was wrong with it; empty if it is "ok".
    """

    number: int
    schedule: Mapping[str, Any]
    kernels: str
    outcome: Outcome
    ratio: float | None
    seconds: tuple[float, ...]
    equal: bool
    cost: float
    message: str


class Journal:
    """A storage of trials.

    Args:
        place: a file, or the URL of an Optuna storage.

    Raises:
        NemocError: Optuna is not installed, or the storage cannot be opened or is damaged.
    """

    def __init__(self, place: str | Path) -> None:
        self._place = str(place)
        self._optuna = _optuna()
        with _explained(self._place):
            self._storage = self._open()
        # Of this process only: a number may belong to another process later on.
        started = psutil.Process().create_time()
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{started:.0f}"

    def study(self, name: str, tunables: Sequence[Tunable], about: Mapping[str, Any]) -> "Study":
        """The study of that name, created if there is none.

        Args:
            name: all that the outcome of a trial depends on.
            tunables: what can be chosen.
            about: what the study says of its kernel, as JSON data; written when it is created.
        """
        with _explained(self._place):
            study = self._optuna.create_study(
                storage=self._storage, study_name=name, load_if_exists=True
            )
            if not study.user_attrs:
                for key, value in about.items():
                    study.set_user_attr(key, value)
        return Study(study, tunables, self._worker, self._place)

    def all_trials(self) -> Iterator[tuple[str, list[Trial]]]:
        """Every study's name and the candidates that were tried."""
        with _explained(self._place):
            for study in self._storage.get_all_studies():
                found = self._storage.get_all_trials(study._study_id, deepcopy=False)
                yield study.study_name, _tried(found)

    def spent(self, name: str) -> "Spent":
        """The time that was spent under a name."""
        with _explained(self._place):
            study = self._optuna.create_study(
                storage=self._storage, study_name=name, load_if_exists=True
            )
        return Spent(study, self._place)

    def _open(self) -> Any:
        if "://" in self._place:
            return self._optuna.storages.get_storage(self._place)
        path = Path(self._place)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _FileLock(path)
        journal = self._optuna.storages.journal
        with lock.held():
            _mend(path)
            backend = journal.JournalFileBackend(str(path), lock_obj=lock)
        return self._optuna.storages.JournalStorage(backend)


class Study:
    """The trials of one kernel at given sizes on one device."""

    def __init__(self, study: Any, tunables: Sequence[Tunable], worker: str, place: str) -> None:
        self._study, self._worker, self._place = study, worker, place
        self._tunables = tuple(tunables)
        categorical = _optuna().distributions.CategoricalDistribution
        self._distributions = {t.name: categorical(t.values) for t in tunables}

    @property
    def name(self) -> str:
        """Its name in the storage."""
        return str(self._study.study_name)

    @property
    def about(self) -> dict[str, Any]:
        """What the study says of its kernel."""
        with _explained(self._place):
            return dict(self._study.user_attrs)

    def note(self, key: str, value: Any) -> None:
        """Write down something of the whole study."""
        with _explained(self._place):
            self._study.set_user_attr(key, value)

    def trials(self) -> list[Trial]:
        """The candidates that were tried, in order; open and lost ones are not among them."""
        with _explained(self._place):
            found = self._study.get_trials(deepcopy=False)
        return _tried(found)

    def open(self) -> list[dict[str, Any]]:
        """The settings of candidates that live processes work on, this one's included."""
        with _explained(self._place):
            found = self._study.get_trials(deepcopy=False)
        return [dict(t.params) for t in found if t.state.name == "RUNNING" and _is_alive(t)]

    def recover(self) -> int:
        """Close the open trials of processes that are gone; returns how many there were."""
        states = _optuna().trial.TrialState
        lost = 0
        with _explained(self._place):
            for trial in self._study.get_trials(deepcopy=False):
                if trial.state.name == "RUNNING" and not _is_alive(trial):
                    with contextlib.suppress(ValueError, RuntimeError):  # somebody else was first
                        self._study.tell(trial.number, state=states.FAIL)
                        lost += 1
        return lost

    def suggestions(self, count: int) -> Iterator[dict[str, Any]]:
        """Settings that Optuna's TPE expects much of in the light of all trials so far; nothing is written."""
        optuna = _optuna()
        with _explained(self._place):
            done = [t for t in self.trials() if t.ratio is not None]
            sampler = optuna.samplers.TPESampler(seed=len(done), n_startup_trials=8)
            scratch = optuna.create_study(sampler=sampler)
            scratch.add_trials(
                [
                    optuna.trial.create_trial(
                        params=dict(t.schedule), distributions=self._distributions, value=t.ratio
                    )
                    for t in done
                ]
            )
        for _ in range(count):
            yield dict(scratch.ask(self._distributions).params)

    def begin(self, schedule: Schedule) -> int | None:
        """Open the trial of a candidate; its number, or none if it is done or another live process is at it."""
        optuna, storage = _optuna(), self._study._storage
        running = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=self.complete(schedule),
            distributions=self._distributions,
            user_attrs={"worker": self._worker},
        )
        with _explained(self._place):
            # One entry of the journal: there is no moment at which the trial is nobody's.
            opened = storage.create_new_trial(self._study._study_id, template_trial=running)
            number = int(storage.get_trial_number_from_id(opened))
            for other in self._study.get_trials(deepcopy=False):
                if other.number < number and other.params == running.params and _holds(other):
                    self._study.tell(number, state=optuna.trial.TrialState.FAIL)
                    return None
        return number

    def finish(
        self,
        number: int,
        kernels: str,
        outcome: Outcome,
        *,
        ratio: float | None = None,
        seconds: Sequence[float] = (),
        equal: bool = False,
        cost: float = 0.0,
        message: str = "",
    ) -> None:
        """Close a trial; fields as in `Trial`."""
        states = _optuna().trial.TrialState
        details = {
            "kernels": kernels,
            "seconds": [float(f"{s:.4g}") for s in seconds],
            "equal": equal,
            "cost": round(cost, 3),
            "message": message,
            "outcome": outcome,
        }
        with _explained(self._place):
            trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
            for key, value in details.items():
                self._study._storage.set_trial_user_attr(trial_id, key, value)
            if ratio is None:
                self._study.tell(number, state=states.FAIL)
            else:
                self._study.tell(number, ratio)

    def complete(self, schedule: Schedule) -> dict[str, Any]:
        """A schedule with the defaults of what it leaves out."""
        return {t.name: schedule.get(t.name, t.default) for t in self._tunables}


class Spent:
    """The wall-clock time for which at least one process has worked under a name."""

    def __init__(self, study: Any, place: str) -> None:
        self._study, self._place = study, place
        self._run = f"run {uuid.uuid4().hex}"
        self._start = time.time()

    def earlier(self) -> float:
        """Seconds of other runs than this one; what several spent at the same time counts once."""
        with _explained(self._place):
            runs = {k: v for k, v in self._study.user_attrs.items() if k.startswith("run ")}
        spans = sorted(tuple(v) for k, v in runs.items() if k != self._run)
        total, end = 0.0, float("-inf")
        for first, last in spans:
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total

    def update(self) -> None:
        """Write down that this run has gone on until now."""
        with _explained(self._place):
            self._study.set_user_attr(self._run, [self._start, time.time()])


def _optuna() -> Any:
    """The package; it is needed for tuning only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna  # noqa: PLC0415
    except ImportError:
        raise NemocError("tuning needs Optuna: install nemoc[tune] (package optuna)") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _tried(trials: Iterable[Any]) -> list[Trial]:
    """Those of a storage's trials that are done."""
    return [_trial(t) for t in trials if t.state.is_finished() and "outcome" in t.user_attrs]


def _trial(trial: Any) -> Trial:
    about = trial.user_attrs
    return Trial(
        int(trial.number),
        dict(trial.params),
        str(about["kernels"]),
        about["outcome"],
        trial.value if trial.state.name == "COMPLETE" else None,
        tuple(about["seconds"]),
        bool(about["equal"]),
        float(about["cost"]),
        str(about["message"]),
    )


def _holds(trial: Any) -> bool:
    """Whether a trial's candidate is done, or a live process works on it."""
    if trial.state.is_finished():
        return "outcome" in trial.user_attrs
    return bool(trial.state.name == "RUNNING" and _is_alive(trial))


def _is_alive(trial: Any) -> bool:
    """Whether the process of an open trial still works on it."""
    host, _, rest = str(trial.user_attrs.get("worker", "")).partition(":")
    if host != socket.gethostname():
        begun: datetime | None = trial.datetime_start
        return begun is not None and datetime.now() - begun < _FOREIGN
    pid, _, started = rest.partition(":")
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) < 1.5)
    except (psutil.Error, ValueError):
        return False


class _FileLock:
    """A lock that ends with its process, whatever ends that."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".lock")
        self._descriptor = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + _LOCKED
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise NemocError(
                        f"{self._path}: another process has held it for {_LOCKED:g} s, "
                        f"expected to get it; is one stopped?"
                    ) from None
                time.sleep(0.005)
            else:
                self._descriptor = descriptor
                return True

    def release(self) -> None:
        """Let others have it."""
        os.close(self._descriptor)
        self._descriptor = -1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block that has the lock."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


_ENTRY = b'{"op_code"'
"""What every entry of a journal begins with."""


def _mend(path: Path) -> None:
    """Cut off a last line that is an entry which was not written to its end.

    Raises:
        NemocError: another line, or one that begins otherwise, is no entry: perhaps the file is something else.
    """
    if not path.exists():
        return
    good = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and _is_entry(line):
                good += len(line)
                continue
            if file.read(1) or not _ENTRY.startswith(line[: len(_ENTRY)]):
                raise NemocError(
                    f"{path}: line {number}: found {_beginning(line)}, expected an entry of the journal; "
                    f"the {number - 1} lines before it are good"
                )
            file.truncate(good)
            return


def _is_entry(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("op_code"), int)


def _beginning(line: bytes) -> str:
    return repr(line[:20].decode("utf-8", "replace"))


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turn what goes wrong with a storage into one line."""
    try:
        yield
    except NemocError:
        raise
    except OSError as error:
        raise NemocError(
            f"{place}: the tuning journal cannot be read or written: {error.strerror or error}"
        ) from None
    except Exception as error:  # nothing of nemoc's is within but the storage
        reason, kind = str(error).strip().splitlines(), type(error)
        known = kind.__module__.startswith(("optuna", "sqlalchemy", "json"))
        said = reason[0] if reason and known else ": ".join((kind.__name__, *reason[:1]))
        raise NemocError(f"{place}: the tuning journal: {said}") from None
