"""Everything that has to be measured on a GPU: `python -m benchmarks.gpu`.

Parts of Nano and whole models are held against a reference first, and then timed next to peers. Figures go into a file,
a line for each; what is there already is not measured again, so that runs may be short: the next one goes on.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

from benchmarks.gpu_results import Journal, table
from benchmarks.gpu_session import (
    LostDeviceError,
    Session,
    Stage,
    find_target,
    open_device,
    this_machine,
)
from benchmarks.gpu_stages import (
    attention_stage,
    fp8_stage,
    matmul_stage,
    moe_stage,
    nvfp4_stage,
    quantized_moe_stage,
    scan_stage,
    update_stage,
)
from benchmarks.gpu_whole import ParityStage, WholeStage, parity_models
from nemoc.autotune.gpu_clock import EventClock, measure_roofs
from nemoc.autotune.measure import Roofs
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.ir import NemocError
from nemoc.models import open_model, preset
from nemoc.options import read_options

MODEL = "nano"
"""The preset whose shapes are measured."""

NO_DEVICE = 2
"""The exit code where there is no GPU to measure."""


def stages() -> tuple[Stage, ...]:
    """All stages, in the order in which they run."""
    return (
        ParityStage(parity_models()),
        matmul_stage(preset(MODEL)),
        nvfp4_stage(preset(MODEL)),
        fp8_stage(preset(MODEL)),
        scan_stage(),
        update_stage(),
        moe_stage(),
        quantized_moe_stage(),
        attention_stage(),
        WholeStage(),
    )


@click.command()
@click.option("--stage", "names", multiple=True, help="A stage to run; by default all, in order.")
@click.option(
    "--cases", default="", help="A regular expression that the names of cases have in them."
)
@click.option("--minutes", default=7.5, help="No case is begun that would not end within these.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("benchmarks/results/gpu.jsonl"),
    help="Where lines are added.",
)
@click.option("--list", "listing", is_flag=True, help="Print stages and cases, and run nothing.")
@click.option(
    "--ahead",
    metavar="TARGET",
    help="Compile into the cache for a GPU that is elsewhere, and run nothing.",
)
@click.option("--again", is_flag=True, help="Measure what has been measured before.")
@click.option(
    "--in-turn",
    is_flag=True,
    help="Launch kernels only when the former ones have ended; for comparison, with an --output of its own.",
)
def main(
    names: tuple[str, ...],
    cases: str,
    minutes: float,
    output: Path,
    listing: bool,
    ahead: str | None,
    again: bool,
    in_turn: bool,
) -> None:
    """Measure on this machine's NVIDIA GPU, and print what is known of it."""
    started = time.monotonic()
    try:
        chosen = choose(stages(), names)
        if listing:
            for stage in chosen:
                print_cases(stage)
            return
        if ahead is not None:
            compile_ahead(chosen, ahead)
            return
        if not torch.cuda.is_available():
            raise NemocError(f"no NVIDIA GPU is at hand: torch {torch.__version__} finds none")
        journal = Journal(output)
        session = start(journal, started + 60 * minutes, again, _pattern(cases), ahead=not in_turn)
    except NemocError as error:
        click.echo(f"benchmarks.gpu: {error}", err=True)
        sys.exit(NO_DEVICE)
    sys.exit(measure(session, journal, chosen))


def choose(every: Iterable[Stage], names: Iterable[str]) -> list[Stage]:
    """The stages of some names, or all.

    Raises:
        NemocError: there is none of that name.
    """
    by_name = {stage.name: stage for stage in every}
    wanted = list(names) or list(by_name)
    for name in wanted:
        if name not in by_name:
            raise NemocError(f"no stage {name!r}, expected one of {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def print_cases(stage: Stage) -> None:
    """A stage and the names of its cases."""
    click.echo(f"{stage.name}: {stage.about}")
    for case in stage.case_names():
        click.echo(f"  {case}")


def compile_ahead(chosen: Iterable[Stage], target: str) -> None:
    """Compile all that stages launch, so that a run which finds the cache compiles nothing.

    Raises:
        NemocError: the target is none, or a kernel cannot be compiled for it.
    """
    say = _told_apart()
    for stage in chosen:
        say(stage.name)
        stage.compile_ahead(open_model(f"random:{MODEL}"), target, _store(), None)


def _store() -> KernelStore:
    """Where compiled kernels are kept, those of whole models too."""
    return KernelStore(read_options().cache / "kernels")


def _pattern(cases: str) -> re.Pattern[str]:
    try:
        return re.compile(cases)
    except re.error as error:
        raise NemocError(f"--cases is {cases!r}, no regular expression: {error}") from None


def start(
    journal: Journal, deadline: float, again: bool, cases: re.Pattern[str], ahead: bool
) -> Session:
    """Find the device and measure what it can do at best.

    Raises:
        NemocError: nothing can be compiled for it, or its driver is missing.
    """
    target = find_target(torch.cuda.get_device_capability())
    clock = EventClock()
    roofs = measure_roofs(clock)
    return Session(
        this_machine(),
        target,
        functools.partial(open_device, ahead),
        clock,
        roofs,
        journal,
        open_model(f"random:{MODEL}"),
        deadline,
        _store(),
        again=again,
        cases=cases,
    )


def measure(session: Session, journal: Journal, chosen: Iterable[Stage]) -> int:
    """Run stages until time is over, print their tables, and return the exit code."""
    chosen = list(chosen)
    code, say = 0, _told_apart()
    click.echo(describe(session))
    for stage in chosen:
        try:
            finished = session.run(stage, say)
        except (NemocError, RuntimeError) as error:  # of the others there may still be something
            click.echo(f"{stage.name}: {error}", err=True)
            code = 1
            if isinstance(error, LostDeviceError):
                break
            continue
        if not finished:
            click.echo(f"{stage.name}: time is over; the next run goes on from here", err=True)
            break
    for stage in chosen:
        if lines := journal.newest(session.machine.device, stage.name):
            click.echo(f"\n{stage.name}: {stage.about}\n{table(lines)}")
    return code


def describe(session: Session) -> str:
    """The device, and what it can do at best."""
    machine, roofs = session.machine, session.roofs
    return f"{machine.device}, CUDA {machine.driver}, for {session.target}: {_roofs(roofs)}"


def _roofs(roofs: Roofs) -> str:
    copied = f"{roofs.bandwidth / 1e9:.0f} GB/s in a copy"
    return f"{copied}, {roofs.arithmetic / 1e12:.0f} TFLOP/s in a product of bf16"


def _told_apart() -> Callable[[str], None]:
    """Prints what is begun, with seconds since the first."""
    started = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"[{time.monotonic() - started:6.1f} s] {text}", err=True)

    return tell


if __name__ == "__main__":
    main()
