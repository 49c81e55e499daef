"""The report of a tuning run: one HTML file that needs no network, for people.

What kernels and candidates are called and what went wrong with them comes from journals, which others may have
written; the template (`tune_report.html`) escapes everything but the plots, which are drawn here.
"""

import functools
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from nemoc.autotune.journal import Trial
from nemoc.autotune.statistics import Interval
from nemoc.autotune.tuner import KernelReport
from nemoc.codegen.tunables import Setting, Tunable
from nemoc.ir import NemocError
from nemoc.page import render, write_page
from nemoc.terminal import duration
from nemoc.tuning import TuneReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_TRIALS = 8
"""Right trials from which on it is said which tunables mattered."""

_BARS = 12
"""Kernels of a function whose times are drawn; the table has all."""

_MESSAGE = 200
"""Characters of a message that are shown."""

_BEFORE, _AFTER, _FAULT = "#9aa5b1", "#1f6feb", "#c0392b"

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "nemoc",  # else names of clip paths differ from run to run
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_report(report: TuneReport, path: str | Path) -> None:
    """Write the report of a tuning run; a file of that name is replaced.

    Raises:
        NemocError: matplotlib is not installed, or the file cannot be written.
    """
    write_page(report_html(report), path)


def report_html(report: TuneReport) -> str:
    """The text of a report; equal runs have equal ones.

    Raises:
        NemocError: matplotlib is not installed.
    """
    kernels = [_section(f"kernel{i}", kernel) for i, kernel in enumerate(report.kernels)]
    return render(
        "tune_report.html",
        device=report.device,
        spent=duration(report.spent),
        earlier=duration(report.earlier) if report.earlier else "nothing",
        ending=_ending(report),
        not_reached=sorted(report.not_reached.items()),
        numerics=_numerics(report),
        whole=[(step, _verdict(i)) for step, i in sorted(report.whole.items())],
        gains=[(step, f"{gain:.1%}") for step, gain in sorted(report.gains.items())],
        plots=_plots(report),
        kernels=kernels,
        searched=[k for k in kernels if k.choices],
        tuned=sum(bool(k.settings) for k in kernels),
        trials=sum(k.trials for k in kernels),
    )


@dataclass(frozen=True)
class _Choice:
    """A tunable as the report shows it.

    Attributes:
        name: of the tunable.
        values: each with whether it was tried.
        default, chosen: its settings.
        explained: part of the variance of times that it explains alone; nothing where there are too few trials.
    """

    name: str
    values: tuple[tuple[Setting, bool], ...]
    default: Setting
    chosen: Setting
    explained: str


@dataclass(frozen=True)
class _Section:
    """A kernel as the report shows it, in texts that are not escaped yet.

    Attributes:
        anchor: where the report has its search.
        name, function, launches, share, seconds: as in `KernelReport`.
        result: what came of tuning it.
        settings: what differs from the default.
        trials, size, coverage: candidates tried, schedules there are, and the part that was tried.
        faults: kinds, how many there were, and the first one's message.
        choices: its tunables.
        convergence: a plot; nothing where there was nothing to try.
    """

    anchor: str
    name: str
    function: str
    launches: int
    share: str
    seconds: str
    result: str
    settings: str
    trials: int
    size: int
    coverage: str
    faults: tuple[tuple[str, int, str], ...]
    choices: tuple[_Choice, ...]
    convergence: Markup


def _section(anchor: str, kernel: KernelReport) -> _Section:
    trials, tunables = kernel.study.trials(), kernel.space.tunables
    explained = explained_variance(trials, tunables)
    size = kernel.space.size
    convergence = Markup()
    if tunables and trials:
        draw = functools.partial(_convergence, trials=trials)
        convergence = _drawn(anchor, draw, 5.0, 2.2)
    return _Section(
        anchor=anchor,
        name=kernel.name,
        function=kernel.kernel.function,
        launches=kernel.kernel.launches,
        share=f"{kernel.share:.1%}",
        seconds=duration(kernel.seconds) if kernel.seconds else "not measured",
        result=_result(kernel),
        settings=", ".join(f"{name}={value}" for name, value in kernel.best.items()),
        trials=len(trials),
        size=size,
        coverage=f"{min(1.0, len(trials) / size):.1%}",
        faults=_faults(trials),
        choices=tuple(_choice(kernel, t, trials, explained) for t in tunables),
        convergence=convergence,
    )


def _choice(
    kernel: KernelReport,
    tunable: Tunable,
    trials: Sequence[Trial],
    explained: dict[str, float],
) -> _Choice:
    tried = {t.schedule.get(tunable.name) for t in trials}
    return _Choice(
        tunable.name,
        tuple((value, value in tried) for value in tunable.values),
        tunable.default,
        kernel.best.get(tunable.name, tunable.default),
        f"{explained[tunable.name]:.0%}" if tunable.name in explained else "",
    )


def explained_variance(trials: Sequence[Trial], tunables: Iterable[Tunable]) -> dict[str, float]:
    """Which part of the variance of the ratios' logarithms each tunable explains alone, from 0 to 1.

    It is adjusted for the number of values, so that a tunable that does not matter has 0 and not what chance gives it
    (epsilon squared: Kelley, "An unbiased correlation ratio measure", 1935). Candidates are not drawn at random, so it
    describes those that were tried. A tunable of which one value only was tried is left out, and all of them are
    where there are too few trials.
    """
    timed = [t for t in trials if t.ratio is not None]
    if len(timed) < _LEAST_TRIALS:
        return {}
    logs = np.asarray([math.log(t.ratio or 1.0) for t in timed])
    total = float(np.sum((logs - logs.mean()) ** 2))
    found = {}
    for tunable in tunables:
        values = [str(t.schedule.get(tunable.name)) for t in timed]
        groups = [logs[[v == value for v in values]] for value in sorted(set(values))]
        freedom = len(logs) - len(groups)
        if len(groups) > 1 and freedom > 0 and total > 0.0:
            within = sum(float(np.sum((g - g.mean()) ** 2)) for g in groups)
            left = (within / freedom) / (total / (len(logs) - 1))
            found[tunable.name] = min(1.0, max(0.0, 1.0 - left))
    return found


def _faults(trials: Sequence[Trial]) -> tuple[tuple[str, int, str], ...]:
    """Kinds of faults, the most frequent first: how many there were, and the first one's message."""
    counts = Counter(t.outcome for t in trials if t.outcome != "ok")
    messages: dict[str, str] = {}
    for trial in trials:
        messages.setdefault(trial.outcome, trial.message)
    return tuple((kind, n, messages[kind][:_MESSAGE]) for kind, n in counts.most_common())


def _result(kernel: KernelReport) -> str:
    if not kernel.space.tunables:
        return "nothing to choose"
    if not kernel.reached:
        return "not reached"
    if kernel.gain is None:
        return "not measured"
    if kernel.best:
        return str(kernel.gain)
    return "no gain over the default" if kernel.searched else "not searched"


def _ending(report: TuneReport) -> str:
    """Why the search ended."""
    if report.interrupted:
        return "stopped by an interrupt"
    if report.finished:
        return "nothing more is expected of any kernel"
    return "the budget ended before the search"


def _verdict(interval: Interval | None) -> str:
    """How a step's time compares with that of the defaults; none: it launches what it does with them."""
    if interval is None:
        return "nothing changed"
    what = "slower" if interval.is_loss else "no gain over the default beyond doubt"
    return f"{interval} of the time before: {'faster' if interval.is_gain else what}"


def _numerics(report: TuneReport) -> str:
    """What was changed of results, in a word or two."""
    tuned = [record for record in report.records if record.schedule]
    others = sum(record.numerics != "same" for record in tuned)
    if others:
        return f"{others} of {len(tuned)} tuned kernels add in another order, within rounding"
    return "every bit of every result is kept"


def _plots(report: TuneReport) -> list[tuple[str, Markup]]:
    """Plots of the whole model with their captions."""
    found = []
    if whole := [(step, i) for step, i in sorted(report.whole.items()) if i is not None]:
        height = 0.7 + 0.5 * len(whole)
        caption = (
            "The whole model's time relative to that with all defaults, with intervals of 95 %"
        )
        found.append((caption, _drawn("whole", lambda axes: _whole_bars(axes, whole), 7.0, height)))
    functions = sorted({k.kernel.function for k in report.kernels})
    for i, function in enumerate(functions):
        timed = [k for k in report.kernels if k.kernel.function == function and k.seconds]
        largest = sorted(timed, key=_step_seconds, reverse=True)[:_BARS]
        if largest:
            height = 0.8 + 0.4 * len(largest)
            caption = f"{function}: kernels' part of a step, before and after"
            draw = functools.partial(_kernel_bars, kernels=largest)
            found.append((caption, _drawn(f"step{i}", draw, 7.0, height)))
    return found


def _step_seconds(kernel: KernelReport) -> float:
    return kernel.seconds * kernel.kernel.launches


def _whole_bars(axes: "Axes", whole: Sequence[tuple[str, Interval]]) -> None:
    places = np.arange(len(whole))
    ratios = [i.ratio for _, i in whole]
    around = [[i.ratio - i.low for _, i in whole], [i.high - i.ratio for _, i in whole]]
    axes.barh(places + 0.2, [1.0] * len(whole), 0.38, color=_BEFORE, label="before")
    axes.barh(places - 0.2, ratios, 0.38, xerr=around, color=_AFTER, label="after", capsize=3)
    axes.set_yticks(places, [step for step, _ in whole])
    axes.set_xlim(left=0.0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _kernel_bars(axes: "Axes", kernels: Sequence[KernelReport]) -> None:
    places = np.arange(len(kernels))[::-1]
    before = np.asarray([_step_seconds(k) * 1e6 for k in kernels])
    ratios = np.asarray([k.gain.ratio if k.best and k.gain else 1.0 for k in kernels])
    axes.barh(places + 0.2, before, 0.38, color=_BEFORE, label="before")
    axes.barh(places - 0.2, before * ratios, 0.38, color=_AFTER, label="after")
    axes.set_yticks(places, [k.name.partition("+")[0] for k in kernels])
    axes.set_xlabel("microseconds of a step")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _convergence(axes: "Axes", trials: Sequence[Trial]) -> None:
    """The least ratio so far over trials, and each trial's own."""
    best, so_far = 1.0, []
    for trial in trials:
        best = min(best, trial.ratio if trial.ratio is not None else best)
        so_far.append(best)
    numbers = range(1, len(trials) + 1)
    right = [(n, t.ratio) for n, t in zip(numbers, trials, strict=True) if t.ratio is not None]
    wrong = [n for n, t in zip(numbers, trials, strict=True) if t.ratio is None]
    axes.axhline(1.0, color=_BEFORE, linewidth=1)
    axes.step(list(numbers), so_far, where="post", color=_AFTER)
    axes.plot([n for n, _ in right], [r for _, r in right], ".", color=_AFTER, alpha=0.5)
    axes.plot(wrong, [1.0] * len(wrong), "x", color=_FAULT)
    axes.set_ylim(top=min(2.0, axes.get_ylim()[1]))  # how slow the slow ones are matters to nobody
    axes.set_xlabel("trial (crosses: faults)")
    axes.set_ylabel("time / default's")


def _drawn(name: str, draw: Callable[["Axes"], None], width: float, height: float) -> Markup:
    """A plot as SVG that can stand in an HTML page.

    Args:
        name: what identifiers within it begin with, since they must differ from those of other plots.
        draw: draws it.
        width, height: in inches.

    Raises:
        NemocError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: PLC0415  (needed for reports only)
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise NemocError(
            "a report of tuning needs matplotlib: install nemoc[tune] (package matplotlib)"
        ) from None
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg))
