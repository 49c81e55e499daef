"""What tuning does, and whether it does it again: `python -m benchmarks.tuning COMMAND SOURCE`.

`repeat` tunes a model several times from nothing, each time with a journal and records of its own, then compiles it
without records and with those of each tuning, and times all of these in turns: the tunings agree if the intervals of
each two overlap. `kill` ends a tuning with SIGKILL again and again, each time at a random moment after it has
finished a candidate of its own, lets the last one finish, and counts what was kept and what was paid for twice.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from nemoc import compiler
from nemoc.autotune.journal import Journal
from nemoc.autotune.measure import interleaved
from nemoc.autotune.records import Records, read_records
from nemoc.autotune.statistics import Interval, ratio_of_times
from nemoc.models import open_model
from nemoc.runtime import Executable
from nemoc.runtime.machine import processor_model
from nemoc.tuning import steps, tune
from nemoc.workload import Workload

NONE = "no records"
"""What all are compared with."""


@click.group()
def main() -> None:
    """Measure tuning itself."""


@main.command()
@click.argument("source")
@click.option(
    "--budget", type=float, default=600.0, show_default=True, help="Seconds of each tuning."
)
@click.option("--times", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--rounds", type=click.IntRange(min=4), default=25, show_default=True)
@click.option("--numerics", type=click.Choice(["same", "any"]), default="same", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def repeat(
    source: str, budget: float, times: int, rounds: int, numerics: str, json_file: Path | None
) -> None:
    """Tune SOURCE several times from nothing and compare what comes out in one run."""
    model, work = open_model(source), Workload()
    found: dict[str, Records] = {NONE: Records()}
    tunings: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(times):
            name = f"tuning {number + 1}"
            log, kept = Path(folder) / f"{number}.log", Path(folder) / f"{number}.json"
            report = tune(
                model,
                "cpu",
                budget,
                numerics=numerics,
                workload=work,
                journal=log,
                records=kept,
                compare=False,
            )
            found[name] = report.records
            tunings.append(
                {
                    "seconds": round(report.spent, 1),
                    "kernels": len(report.kernels),
                    "candidates": sum(len(k.study.trials()) for k in report.kernels),
                    "faster": sum(bool(k.best) for k in report.kernels),
                    "expected": {k: round(v, 4) for k, v in report.gains.items()},
                    "finished": report.finished,
                }
            )
            click.echo(f"{name}: {json.dumps(tunings[-1])}")
        runs: dict[str, Callable[[], object]] = {}
        made: Executable | None = None
        for name, records in found.items():
            made = compiler.compile(
                model, "cpu", records=records, numerics=numerics, weights_of=made
            )
            runs |= {f"{step} {name}": run for step, run in steps(made, work)}
        timings = interleaved(runs, rounds)
    ratios: dict[str, dict[str, Interval]] = {}
    for step, name in itertools.product(("prefill", "decode"), found):
        if name != NONE:
            ratios.setdefault(step, {})[name] = ratio_of_times(
                timings[f"{step} {name}"].seconds, timings[f"{step} {NONE}"].seconds
            )
    for step, of in ratios.items():
        for name, interval in of.items():
            click.echo(f"{step}, {name}: {interval} of the time with {NONE}")
        click.echo(f"{step}: the tunings {'agree' if agree(of) else 'DO NOT agree'}")
    if json_file is not None:
        report_json = {
            "source": source,
            "processor": processor_model(),
            "versions": {p: version(p) for p in ("nemoc", "torch", "apache-tvm", "optuna")},
            "numerics": numerics,
            "budget": budget,
            "tunings": tunings,
            "relative_time": {
                step: {n: [i.ratio, i.low, i.high] for n, i in of.items()}
                for step, of in ratios.items()
            },
            "agree": {step: agree(of) for step, of in ratios.items()},
        }
        json_file.write_text(json.dumps(report_json, indent=1) + "\n", encoding="utf-8")


def agree(found: dict[str, Interval]) -> bool:
    """Whether each two intervals overlap."""
    return all(
        a.low <= b.high and b.low <= a.high for a, b in itertools.combinations(found.values(), 2)
    )


@main.command()
@click.argument("source")
@click.option(
    "--budget", type=float, default=120.0, show_default=True, help="Seconds of each tuning."
)
@click.option("--times", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--within",
    type=float,
    default=3.0,
    show_default=True,
    help="Seconds after its first candidate in which a tuning is killed.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def kill(
    source: str, budget: float, times: int, within: float, seed: int, json_file: Path | None
) -> None:
    """Kill tunings of SOURCE at random moments, and finish the last one."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        log, kept = Path(folder) / "journal.log", Path(folder) / "records.json"
        command = [sys.executable, "-m", "nemoc", "tune", source, "--budget", f"{budget:g}s", "-q"]
        command += ["--target", "cpu", "--db", str(log), "--records", str(kept), "--no-compare"]
        before: list[set[tuple[str, str]]] = []
        for number in range(times):
            child = subprocess.Popen(command, start_new_session=True)
            # Most of a short run is its start, before there is anything to lose.
            known = sum(1 for _ in _trials(log))
            while child.poll() is None and sum(1 for _ in _trials(log)) == known:
                time.sleep(0.5)
            try:
                child.wait(chance.uniform(0.0, within))
            except subprocess.TimeoutExpired:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
            else:
                raise click.ClickException(
                    f"tuning {number + 1} ended by itself; give it a longer --budget"
                )
            before.append({t[:2] for t in _trials(log)})
            click.echo(f"killed {number + 1}: {len(before[-1])} candidates are done")
        subprocess.run(command, check=True)
        trials = list(_trials(log))
        done = {t[:2] for t in trials}
        lost = [len(earlier - done) for earlier in before]
        counts = Counter(t[:2] for t in trials)
        found = {
            "source": source,
            "kills": times,
            "done_after_each_kill": [len(b) for b in before],
            "done": len(done),
            "lost": sum(lost),
            "done_twice": sum(n - 1 for n in counts.values()),
            "outcomes": dict(Counter(t[2] for t in trials)),
            "records": len(read_records(kept)),
        }
    click.echo(json.dumps(found, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _trials(log: Path) -> Iterator[tuple[str, str, str]]:
    """Study, kernels and outcome of each finished trial in a journal."""
    if not log.exists():
        return
    for name, trials in Journal(log).all_trials():
        for trial in trials:
            yield name, trial.kernels, trial.outcome


if __name__ == "__main__":
    main()
