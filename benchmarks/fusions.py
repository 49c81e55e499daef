"""What each fusion is worth: `python -m benchmarks.fusions --json FILE`.

The executables with all fusions, with none, and with each one left out live in one process and take turns; what counts
is their ratios. Each is loaded several times: where its memory happens to lie changes an executable's speed by more
than a fusion may, so that the median is over loads too. Beside the times stand the launches and phases of a step.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

import nemoc
from benchmarks.checkpoints import random_checkpoint
from benchmarks.compare import prompt
from nemoc import compiler
from nemoc.autotune.measure import Timing, interleaved
from nemoc.codegen.lower import corner_sizes, lower_program
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.tvm.emit import emit as emit_for
from nemoc.codegen.tvm.emit import expanded
from nemoc.codegen.tvm.target import cpu_target
from nemoc.passes import preset, print_pipeline
from nemoc.runtime import Executable
from nemoc.runtime.machine import processor_model


def variants() -> Iterator[tuple[str, str]]:
    """Pipelines by name: none fused, all that the preset fuses, and the preset without each fusion."""
    passes = preset("cpu", "prefill")
    fusions = [p for p in passes if p.name.startswith("fuse-")]
    yield "none", print_pipeline([p for p in passes if p not in fusions])
    yield "all", print_pipeline(passes)
    for fusion in fusions:
        yield f"without {fusion.name}", print_pipeline([p for p in passes if p is not fusion])


@click.command()
@click.option("--preset", "name", default="mid", help="Model preset, with random weights.")
@click.option("--prefill", "lengths", multiple=True, type=int, default=(256, 2048))
@click.option("--decode", "steps", default=32, help="Tokens decoded in one timed run.")
@click.option("--loads", default=3, help="How often each executable is loaded.")
@click.option("--rounds", default=3, help="Timed rounds of each load.")
@click.option("--threads", default=2, help="Threads.")
@click.option("--pipeline", "extra", multiple=True, help="NAME=TEXT: one more pipeline.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    name: str,
    lengths: tuple[int, ...],
    steps: int,
    loads: int,
    rounds: int,
    threads: int,
    extra: tuple[str, ...],
    out: Path | None,
) -> None:
    """Print a table of pipelines and write it as JSON."""
    torch.set_num_threads(threads)
    pipelines = dict(variants()) | dict(text.split("=", 1) for text in extra)
    context = max(lengths) + steps + 8
    with tempfile.TemporaryDirectory() as folder:
        executables = {
            label: _loaded(Path(folder, f"{number}.nemoc"), name, text, context, threads, loads)
            for number, (label, text) in enumerate(pipelines.items())
        }
        runs: dict[str, Callable[[Executable], object]] = {
            f"prefill {n}": functools.partial(_prefill, prompt(name, n)) for n in lengths
        }
        ids = prompt(name, min(lengths))
        runs[f"decode {steps}"] = functools.partial(_decode, ids, steps)
        timings = {what: _timed(executables, run, rounds) for what, run in runs.items()}
        errors = _errors({k: e[0] for k, e in executables.items()}, ids)
    report = {
        "model": name,
        "processor": processor_model(),
        "versions": {p: version(p) for p in ("nemoc", "torch", "apache-tvm")},
        "loads": loads,
        "rounds": rounds,
        "pipelines": pipelines,
        "error_against_none": errors,
        "launches": {k: _counts(name, text) for k, text in pipelines.items()},
        "seconds": {
            what: {k: [t.median, t.spread] for k, t in found.items()}
            for what, found in timings.items()
        },
    }
    _print(report, timings)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def _loaded(
    artifact: Path, name: str, pipeline: str, context: int, threads: int, loads: int
) -> list[Executable]:
    """Compile into an artifact and load it several times."""
    nemoc.compile(
        random_checkpoint(name),
        "cpu",
        pipeline=pipeline,
        max_context=context,
        threads=threads,
        destination=artifact,
    )
    return [nemoc.load(artifact, threads=threads) for _ in range(loads)]


def _timed(
    executables: Mapping[str, Sequence[Executable]],
    run: Callable[[Executable], object],
    rounds: int,
) -> dict[str, Timing]:
    """For each label the medians of its loads, all of them timed in turns."""
    flat = {(k, i): e for k, loaded in executables.items() for i, e in enumerate(loaded)}
    found = interleaved(
        {f"{k} {i}": functools.partial(run, e) for (k, i), e in flat.items()}, rounds
    )
    return {
        k: Timing(tuple(found[f"{k} {i}"].median for i in range(len(loaded))))
        for k, loaded in executables.items()
    }


def _prefill(ids: torch.Tensor, executable: Executable) -> torch.Tensor:
    return executable.prefill(ids, executable.new_state())


def _decode(ids: torch.Tensor, steps: int, executable: Executable) -> None:
    state = executable.new_state()
    executable.prefill(ids[:, :8], state)
    token = torch.tensor([1])
    for _ in range(steps):
        token = executable.decode(token, state).argmax(-1)


def _counts(name: str, pipeline: str) -> dict[str, dict[str, int]]:
    """Launches and phases of each step function that a pipeline leads to."""
    graphs, weights = bind_weights(compiler.functions(name, "cpu", pipeline).graphs)
    emit = functools.partial(emit_for, target=cpu_target())
    corners = corner_sizes(1, compiler.STEP_TOKENS, 4096)
    program = lower_program(expanded(graphs), weight_layout(weights), corners, emit)
    return {
        f.name: {"launches": len(f.launches), "phases": len(f.phases)} for f in program.functions
    }


def _errors(executables: Mapping[str, Executable], ids: torch.Tensor) -> dict[str, float]:
    logits = {k: _prefill(ids, e) for k, e in executables.items()}
    base = logits["none"]
    return {k: float((y - base).norm() / base.norm()) for k, y in logits.items()}


def _print(report: Mapping[str, Any], timings: Mapping[str, Mapping[str, Timing]]) -> None:
    head = "".join(f"{what:>16}{'ratio':>8}" for what in timings)
    click.echo(f"{'pipeline':<28}{head}  launches (phases)")
    for label in report["pipelines"]:
        cells = "".join(
            f"{1e3 * found[label].median:>13.1f} ms"
            f"{found['none'].median / found[label].median:>8.2f}"
            for found in timings.values()
        )
        counts = ", ".join(
            f"{f} {n['launches']} ({n['phases']})" for f, n in report["launches"][label].items()
        )
        click.echo(f"{label:<28}{cells}  {counts}")


if __name__ == "__main__":
    main()
