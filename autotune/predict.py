"""Schedules of kernels that were not tuned, from records of kernels that do the same at other shapes.

Two methods are asked. The *neighbour* takes the schedule of the nearest shape, by logarithms of sizes. The *model* is a
ridge regression: the logarithm of a schedule's time relative to the default's, by how its settings differ from the
default, by products of two such differences, and by those with the shape. So an optimum that moves with the shape can
be learnt, and the default comes out at exactly 1. Neither is believed on its word: each predicts every shape that has a
record from the others alone, and what it chose there is looked up in that record's trials. A method counts by what its
choices would have come to, and one whose choices were not clearly faster than the default is not followed.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nemoc.autotune.records import Record
from nemoc.autotune.search import Space, schedule_changes
from nemoc.codegen.tunables import Schedule, Setting

Method = Literal["neighbour", "model", "default"]

LEAST_SHAPES = 3
"""Shapes with records from which on a prediction can be held against what was measured."""

MARGIN = 0.01
"""Part of the default's time that a prediction must be expected to save."""

_RIDGE = 0.04
"""Weight of the penalty: logarithms of measured ratios are off by some 0.02, coefficients come to about 0.1."""

_Key = tuple[tuple[str, Setting], ...]
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """What is expected to be fast for a shape that has no record.

    Attributes:
        schedule: settings that differ from the defaults; empty for the default.
        method: where it comes from: the nearest shape, the model, or the default because neither did clearly better.
        ratio: the expected time relative to the default's: the geometric mean of what the method's choices came to at
            shapes that it had not seen.
        low, high: the least and the greatest of them.
        regret: by which factor those choices were slower than the fastest trials at these shapes, in the geometric
            mean: the method's leave-one-out error.
        shapes: how many shapes that was measured on.
    """

    schedule: Schedule
    method: Method
    ratio: float
    low: float
    high: float
    regret: float
    shapes: int


@dataclass(frozen=True)
class _Known:
    """What is known of one shape.

    Attributes:
        shape: logarithms of its sizes.
        defaults: settings of its default.
        best: the schedule that its record claims, as far as the new kernel can have it.
        logs: logarithms of trials' ratios by their schedule; the default is among them.
    """

    shape: _Array
    defaults: Schedule
    best: _Key
    logs: Mapping[_Key, float]


_Rank = Callable[[Sequence[_Known], _Array, Schedule, Iterable[_Key]], list[_Key]]
"""What a method expects to be faster than the default for a shape, best first: from what is known of others, the
logarithms of its sizes, the settings of its default, and the schedules to choose from."""


def predict(records: Iterable[Record], shape: Sequence[int], space: Space) -> Prediction:
    """The schedule of a kernel from records of other shapes.

    Args:
        records: of kernels of one structure on one device.
        shape: the new one, as in `Record.shape`.
        space: what the kernel can be; only its legal schedules are predicted.
    """
    known = _known(records, len(shape), space)
    best = next(iter(_scores(known)), None)
    if best is not None and best.is_gain:
        schedule = _first_legal(best.rank, known, shape, space)
        if schedule:
            return best.prediction(schedule)
    regrets = [-min(k.logs.values()) for k in known]
    regret = math.exp(statistics.fmean(regrets)) if regrets else 1.0
    return Prediction({}, "default", 1.0, 1.0, 1.0, regret, len(known))


def seeds(records: Iterable[Record], shape: Sequence[int], space: Space) -> list[Schedule]:
    """Schedules to try first for a shape: what each method chooses, the better one's first, however good it is."""
    known = _known(records, len(shape), space)
    if not known:
        return []
    methods = [s.rank for s in _scores(known)] or list(_METHODS.values())
    found: list[Schedule] = []
    for rank in methods:
        schedule = _first_legal(rank, known, shape, space)
        if schedule and schedule not in found:
            found.append(schedule)
    return found


@dataclass(frozen=True)
class _Score:
    """How a method did on shapes that it had not seen.

    Attributes:
        method: its name.
        rank: the method.
        reached: logarithms of the ratios of what it chose.
        least: those of the fastest trials.
    """

    method: Method
    rank: _Rank
    reached: tuple[float, ...]
    least: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.reached)

    @property
    def is_gain(self) -> bool:
        """Whether the mean is below the margin by more than twice its own standard error."""
        error = statistics.stdev(self.reached) / math.sqrt(len(self.reached))
        return self.mean + 2.0 * error < math.log(1.0 - MARGIN)

    def prediction(self, schedule: Schedule) -> Prediction:
        regret = statistics.fmean(a - b for a, b in zip(self.reached, self.least, strict=True))
        mean, low, high, factor = map(
            math.exp, (self.mean, min(self.reached), max(self.reached), regret)
        )
        return Prediction(schedule, self.method, mean, low, high, factor, len(self.reached))


def _scores(known: Sequence[_Known]) -> list[_Score]:
    """How methods do on every shape from the others, the better one first; nothing where there are too few."""
    if len(known) < LEAST_SHAPES:
        return []
    least = tuple(min(k.logs.values()) for k in known)
    found = []
    for method, rank in _METHODS.items():
        reached = []
        for i, held_out in enumerate(known):
            others = [*known[:i], *known[i + 1 :]]
            ranked = rank(others, held_out.shape, held_out.defaults, held_out.logs)
            # The default, and what was not tried there, is not known to gain anything.
            reached.append(held_out.logs.get(ranked[0], 0.0) if ranked else 0.0)
        found.append(_Score(method, rank, tuple(reached), least))
    return sorted(found, key=lambda s: s.mean)


def _first_legal(
    rank: _Rank, known: Sequence[_Known], shape: Sequence[int], space: Space
) -> Schedule:
    """What a method chooses for the new kernel; empty for the default."""
    tried = dict.fromkeys(key for k in known for key in k.logs)
    for key in rank(known, _logarithms(shape), _defaults(space), tried):
        if space.plan(dict(key)) is not None:
            return schedule_changes(space, dict(key))
    return {}


def _defaults(space: Space) -> dict[str, Setting]:
    return {t.name: t.default for t in space.tunables}


def _known(records: Iterable[Record], rank: int, space: Space) -> list[_Known]:
    """What is known of each shape, as far as the space has its settings; of two records the later one counts."""
    found: dict[tuple[int, ...], _Known] = {}
    for record in sorted(records, key=lambda r: r.when):
        if record.origin != "measured" or len(record.shape) != rank:
            continue
        before = found.get(record.shape)
        logs = dict(before.logs) if before is not None else {(): 0.0}
        trials = [*record.tried, (record.schedule, record.ratio)]
        logs |= {_key(s): math.log(r) for s, r in trials if s and _is_in(space, s)}
        best = _key(record.schedule)
        if best not in logs:
            best = min(logs, key=lambda key: logs[key])
        defaults = {**_defaults(space), **record.defaults}
        found[record.shape] = _Known(_logarithms(record.shape), defaults, best, logs)
    return list(found.values())


def _is_in(space: Space, schedule: Schedule) -> bool:
    """Whether a space has the settings of a schedule."""
    values = {t.name: t.values for t in space.tunables}
    return all(value in values.get(name, ()) for name, value in schedule.items())


def _key(schedule: Schedule) -> _Key:
    return tuple(sorted(schedule.items()))


def _logarithms(shape: Sequence[int]) -> _Array:
    return np.log(np.asarray(shape, dtype=np.float64) + 1.0)


def _nearest(
    known: Sequence[_Known], shape: _Array, defaults: Schedule, among: Iterable[_Key]
) -> list[_Key]:
    """The schedule of the nearest shape."""
    best = min(known, key=lambda k: float(np.linalg.norm(k.shape - shape))).best
    return [best] if best else []


def _modelled(
    known: Sequence[_Known], shape: _Array, defaults: Schedule, among: Iterable[_Key]
) -> list[_Key]:
    """The schedules for which the regression gives less time than for the default."""
    candidates = [key for key in among if key]
    if not candidates:
        return []
    axes = _Axes.of(known)
    seen = [axes.features(k.shape, k.defaults, key) for k in known for key in k.logs]
    logs = np.asarray([log for k in known for log in k.logs.values()])
    wanted = np.stack([axes.features(shape, defaults, key) for key in candidates])
    expected = _ridge(np.stack(seen), logs, wanted)
    return [candidates[i] for i in np.argsort(expected, kind="stable") if expected[i] < 0.0]


_METHODS: dict[Method, _Rank] = {"neighbour": _nearest, "model": _modelled}


@dataclass(frozen=True)
class _Axes:
    """What features are made of.

    Attributes:
        numbers: tunables with numbers for settings.
        words: other tunables and their settings.
        middle: the mean of the shapes' logarithms.
        sizes: which sizes differ between shapes, each kind of difference once.
    """

    numbers: tuple[str, ...]
    words: tuple[tuple[str, str], ...]
    middle: _Array
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, known: Sequence[_Known]) -> "_Axes":
        """Those of some shapes and the schedules that were tried there."""
        changes = sorted({change for k in known for key in k.logs for change in key}, key=repr)
        numbers = tuple(dict.fromkeys(name for name, v in changes if isinstance(v, int)))
        words = tuple((name, v) for name, v in changes if isinstance(v, str))
        shapes = np.stack([k.shape for k in known])
        middle = shapes.mean(axis=0)
        different = {
            tuple(np.round(column, 9)): i
            for i, column in reversed(list(enumerate((shapes - middle).T)))
            if np.ptp(column) > 0
        }
        return cls(numbers, words, middle, tuple(sorted(different.values())))

    def features(self, shape: _Array, defaults: Schedule, key: _Key) -> _Array:
        """Features of a schedule at a shape; all are 0 for the default."""
        settings = dict(key)
        steps = [_step(defaults.get(name), settings.get(name)) for name in self.numbers]
        chosen = [float(settings.get(name) == value) for name, value in self.words]
        single = np.asarray([*steps, *chosen])
        pairs = np.outer(steps, steps)[np.triu_indices(len(steps))]
        where = (shape - self.middle)[list(self.sizes)]
        return np.concatenate([single, pairs, np.outer(single, where).ravel()])


def _step(default: Setting | None, setting: Setting | None) -> float:
    """How far a setting is from the default, in powers of two; what a schedule leaves out is at its default."""
    if not isinstance(setting, int):
        return 0.0
    start = default if isinstance(default, int) else 0
    return math.log2((abs(setting) + 1) / (abs(start) + 1))


def _ridge(seen: _Array, values: _Array, wanted: _Array) -> _Array:
    """Ridge regression without an intercept (Hoerl and Kennard, 1970): values expected at wanted rows.

    Args:
        seen: [n, f], the features of the n values.
        wanted: [m, f].
    """
    scale = np.sqrt(np.mean(seen**2, axis=0))
    used = scale > 0
    x = seen[:, used] / scale[used]
    # The form in n unknowns instead of f: there may be more features than trials.
    weights = np.linalg.solve(x @ x.T + _RIDGE * np.eye(len(x)), values)
    result: _Array = (wanted[:, used] / scale[used]) @ (x.T @ weights)
    return result
