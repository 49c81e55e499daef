"""Tuning of Nano's kernels on the GPU at hand: what is gained, and how well predicted times rank measured ones.

`python -m benchmarks.gpu_tuning FOLDER JOB:SECONDS ...` tunes the first six layers, of which the others are copies, for
one workload after the other. A job's journal stays in the folder, so that a run goes on where the last one ended.
"""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from nemoc.autotune.tuner import KernelReport
from nemoc.models import Model, RandomSource, open_model
from nemoc.tuning import TuneReport, tune
from nemoc.workload import Workload

LAYERS = 6
"""Layers of Nano that have all kinds of kernels in them."""

JOBS: dict[str, tuple[str | None, Workload]] = {
    "prompt": (None, Workload(2048, 1024, 1, ("prefill",))),
    "decode-1": (None, Workload(32, 1024, 1, ("decode",))),
    "decode-16": (None, Workload(32, 1024, 16, ("decode",))),
    "decode-64": (None, Workload(32, 1024, 64, ("decode",))),
    "nvfp4-1": ("nvfp4", Workload(32, 1024, 1, ("decode",))),
    "nvfp4-16": ("nvfp4", Workload(32, 1024, 16, ("decode",))),
    "nvfp4-64": ("nvfp4", Workload(32, 1024, 64, ("decode",))),
}
"""By name: how weights are quantized, and what is tuned for."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("jobs", nargs=-1, required=True, metavar="JOB:SECONDS...")
@click.option("--target", default="cuda:sm_90", show_default=True)
def main(folder: Path, jobs: tuple[str, ...], target: str) -> None:
    """Tune for each JOB within so many SECONDS, and write what came of it to FOLDER/JOB.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        name, _, seconds = job.partition(":")
        if name not in JOBS or not seconds.isdigit():
            raise click.UsageError(f"{job!r}: expected one of {', '.join(JOBS)}, and its seconds")
        quantize, work = JOBS[name]
        found = tune(
            part_of_nano(),
            target,
            float(seconds),
            quantize=quantize,
            numerics="any",
            workload=work,
            journal=folder / f"{name}.log",
            records=folder / "records.json",
            compare=False,
        )
        text = json.dumps(summary(found), indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        click.echo(text)


def part_of_nano() -> Model:
    """The first layers of Nano, with random weights."""
    whole = open_model("random:nano")
    config = replace(whole.config, layers=whole.config.layers[:LAYERS])
    return replace(whole, config=config, parameters=RandomSource(config))


def summary(found: TuneReport) -> dict[str, Any]:
    """A tuning as JSON: the device, and each kernel that more than its default was tried of."""
    return {
        "device": dataclasses.asdict(found.device),
        "seconds": round(found.spent, 1),
        "kernels": [_kernel(report) for report in found.kernels if len(report.study.trials()) > 1],
    }


def _kernel(report: KernelReport) -> dict[str, Any]:
    trials = report.study.trials()
    return {
        "kernel": report.name.partition("+")[0],
        "share": round(report.share, 3),
        "default_us": round(report.seconds * 1e6, 2),
        "tried": len(trials),
        "faulty": sum(trial.outcome != "ok" for trial in trials),
        "schedule": report.best,
        "ratio": None if report.gain is None else dataclasses.astuple(report.gain),
        "rank_correlation": None if report.order is None else round(report.order, 2),
    }


if __name__ == "__main__":
    main()
