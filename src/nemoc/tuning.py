"""Tuning a model: its kernels, a budget, and what became faster.

On the CPU or GPU at hand candidates are measured. For a GPU that is not they are compiled, which needs none, and their
times predicted (`nemoc.autotune.gpu_model`); what comes of that is no measurement, and `nemoc.compile` takes it only if
asked to.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nemoc import compiler
from nemoc.autotune.gpu_model import RATES
from nemoc.autotune.journal import Journal
from nemoc.autotune.measure import Roofs, interleaved, measured_roofs
from nemoc.autotune.records import Device, Record, Records, read_records
from nemoc.autotune.statistics import Interval, ratio_of_times
from nemoc.autotune.tuner import Kernel, KernelReport, Told, Tuner
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.sites import RecordedSite, record_sites
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.compiler import Functions
from nemoc.gpu_laboratory import GpuLaboratory
from nemoc.gpu_tuning import GpuBenches
from nemoc.ir import NemocError, Op
from nemoc.ir.dims import estimate
from nemoc.ir.params import ParameterSource
from nemoc.ir.types import TensorType
from nemoc.models import Model, open_model
from nemoc.options import read_options
from nemoc.passes import Pass
from nemoc.progress import Progress
from nemoc.quantizations import Quantize
from nemoc.runtime import Executable
from nemoc.runtime.costs import multiplies_integers, read_costs
from nemoc.runtime.cuda_device import device_at_hand
from nemoc.runtime.files import as_path
from nemoc.runtime.machine import thread_count
from nemoc.runtime.manifest import read_manifest
from nemoc.runtime.store import open_weights
from nemoc.runtime.weights import PackedWeights, WeightSource
from nemoc.schedules import (
    check_numerics,
    cpu_device,
    known_records,
    own_journal,
    own_records,
    write_records,
)
from nemoc.workload import Workload

if TYPE_CHECKING:
    from nemoc.codegen.tvm.laboratory import Laboratory, Subject
    from nemoc.codegen.tvm.target import CpuTarget

BUDGET = 600.0
"""Seconds that tuning may take where nobody says."""

_RESERVED = 0.35
"""Part of the budget that is kept for comparing the whole model, until that is known better."""

_BOUND = 1e-5
"""Relative error of a result up to which a candidate is right; as for `nemoc verify`."""

_HEADROOM = 1.25
"""How much faster arithmetic is taken to be than torch's product of square matrices: others may be faster."""

_COMPARED = 8
"""Rounds of the comparison at least."""

_CONTEXT = 4096
"""Tokens of context that executables are compared with at least."""

_DECODED = 8
"""Tokens that are decoded in a round of it."""


@dataclass(frozen=True)
class TuneReport:
    """What tuning came to.

    Attributes:
        kernels: kernel by kernel, the largest part of the model first.
        device: what for.
        records: what was found now.
        gains: expected parts of each function's kernel time that are saved.
        whole: the time of each function of the whole model relative to the defaults, measured; none for one that
            launches what it does with the defaults; empty where nothing changed at all, or it was not compared. Where
            it is longer, what was found of the function's kernels was taken back.
        spent: seconds of this run.
        earlier: seconds that runs before it had spent.
        finished: whether nothing more is expected of any kernel.
        interrupted: whether an interrupt ended it.
    """

    kernels: tuple[KernelReport, ...]
    device: Device
    records: Records
    gains: Mapping[str, float]
    whole: Mapping[str, Interval | None]
    spent: float
    earlier: float
    finished: bool
    interrupted: bool = False

    @property
    def not_reached(self) -> Mapping[str, int]:
        """How many kernels of each function were left to the next run, their defaults too."""
        return Counter(k.kernel.function for k in self.kernels if not k.reached)


def tune(
    source: object,
    target: str | None = None,
    budget: float = BUDGET,
    *,
    quantize: Quantize = None,
    scope: str | None = None,
    pipeline: compiler.Pipeline = None,
    plugins: Iterable[str | type[Pass]] = (),
    numerics: str = "same",
    workload: Workload | None = None,
    journal: str | Path | None = None,
    records: str | Path | None = None,
    threads: int | None = None,
    compare: bool = True,
    tell: Callable[[Told], None] = lambda told: None,
    interrupt: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> TuneReport:
    """Find faster schedules for a model's kernels.

    The budget is for all runs together that tune the same kernels in one journal: a run that was interrupted goes on
    with what is left, and one that has spent it is over at once. Where it does not suffice to measure the defaults,
    kernels are left to the next run, by a roofline the least ones; one default is measured whatever the budget.

    An interrupt (control-C) ends the search: what looks best is measured once more and kept, and the whole model is
    not compared. Another one is raised, as is one before the search.

    Args:
        source, target, quantize, scope, pipeline, plugins, progress: as for `nemoc.compile`.
        budget: seconds of wall clock, the comparison of the whole model included.
        numerics: "same" tries only what keeps every bit of every result, "any" whatever keeps within rounding.
        workload: what for; by default a prompt of 256 tokens, and tokens behind it.
        journal: file or URL of trials; by default in the user's cache.
        records: file to which results are added; by default in the user's cache, where `nemoc.compile` finds them.
        threads: as for `nemoc.compile`.
        compare: measure the whole model before and after, where anything is measured.
        tell: told after each batch of candidates.
        interrupt: called when an interrupt has ended the search, before what looks best is measured once more.

    Raises:
        NemocError: the target cannot be tuned here, the model cannot be compiled for it, or the journal or records
            cannot be read or written.
    """
    check_numerics(numerics)
    if not 0 < budget < math.inf:
        raise NemocError(f"budget is {budget!r}, expected a positive number of seconds")
    model = source if isinstance(source, Model) else open_model(source)
    work = workload or Workload()
    threads = thread_count(threads if threads is not None else read_options().threads)
    options: dict[str, Any] = {
        "target": target,
        "quantize": quantize,
        "scope": scope,
        "pipeline": pipeline,
        "plugins": tuple(plugins),
        "progress": progress,
    }
    clock = _Budget(budget)
    log = Journal(journal if journal is not None else own_journal())
    with (
        tempfile.TemporaryDirectory(prefix="nemoc-tune-") as folder,
        contextlib.ExitStack() as stack,
    ):
        found = compiler.functions(model, which=work.functions, **options)
        compiled = _Executables(model, options | {"threads": threads}, numerics, work)
        # Weights that are quantized on the way take long to make, and executables need them too.
        packed = compiled if compare and quantize is not None else None
        benches = _benches(found.target, threads, Path(folder), progress, packed)
        bench = stack.enter_context(benches)
        compare = compare and bench.device.origin == "measured"
        _say(progress, "look at what kernels are given")
        tuner = Tuner(
            list(bench.kernels(found, work)),
            bench.emit,
            bench.device,
            log,
            known_records(),
            keep_bits=numerics == "same",
            prepare=bench.prepare,
            tell=tell,
            interrupt=interrupt,
        )
        spent = log.spent("model | " + tuner.identity)
        clock.earlier = spent.earlier()
        goes_on = clock.left > 0 and not tuner.is_settled
        _say(progress, "try schedules")
        tuner.run(clock.deadline(1.0 - _RESERVED * compare), spent.update)
        results = tuner.results()
    place = as_path(records) if records is not None else own_records()
    add_records(results, place)
    whole: dict[str, Interval | None] = {}
    interrupted = tuner.interrupted
    if goes_on and compare and not interrupted and any(r.best for r in tuner.reports):
        _say(progress, "compare the whole model")
        try:
            whole = _compare(compiled, results, work, clock)
        except NemocError as error:  # as where a GPU has no room for two
            _say(progress, f"the whole model is not compared: {error}")
        except KeyboardInterrupt:
            interrupted = True  # what kernels gained alone stands, as where nothing is compared
        lost = [step for step, interval in whole.items() if interval and interval.is_loss]
        for step in lost:
            tuner.withdraw(step)
        if lost:
            claimed, results = results, tuner.results()
            add_records(results, place, instead_of=claimed)
        spent.update()
    return TuneReport(
        tuple(sorted(tuner.reports, key=lambda r: -r.share)),
        bench.device,
        results,
        tuner.gains(),
        whole,
        clock.spent,
        clock.earlier,
        tuner.is_settled,
        interrupted,
    )


def add_records(found: Records, path: Path, instead_of: Iterable[Record] = ()) -> None:
    """Add records to a file, which is replaced as a whole; others of it go.

    Raises:
        NemocError: the file holds something else, or cannot be written.
    """
    held = read_records(path) if path.exists() else Records()
    held.remove(instead_of)
    held.add(found)
    write_records(held, path)


class _Budget:
    """Wall-clock time, of which earlier runs have spent some.

    Attributes:
        earlier: seconds that they have spent.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started = seconds, time.monotonic()
        self.earlier = 0.0

    @property
    def spent(self) -> float:
        """Seconds of this run."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - self.earlier - self.spent

    def deadline(self, part: float) -> float:
        """When a part of what is left is spent, on `time.monotonic`."""
        return time.monotonic() + self.left * part


def _say(progress: Progress | None, stage: str) -> None:
    if progress is not None:
        progress(stage, 0, 0)


class _Benches(Protocol):
    """Benches for the kernels of one model.

    Attributes:
        device: what they are for, as records name it.
    """

    device: Device

    @property
    def emit(self) -> Callable[[Site], Plan]:
        """Makes plans of sites."""
        ...

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Compile the defaults of kernels together."""
        ...

    def kernels(self, found: Functions, work: Workload) -> Iterator[Kernel]:
        """The distinct kernels of a model's steps that can be tuned."""
        ...


class _CpuBenches:
    """Benches for the kernels of one model on the CPU at hand.

    Attributes:
        emit: plans of sites.
        device: the CPU, as records name it.
    """

    def __init__(
        self,
        laboratory: "Laboratory",
        cpu: "CpuTarget",
        threads: int,
        packed: ParameterSource | None,
    ) -> None:
        from nemoc.codegen.tvm.emit import emit, expanded  # noqa: PLC0415  (loads tvm)

        self._laboratory, self._packed = laboratory, packed
        self.emit = functools.partial(emit, target=cpu)
        self._expanded = expanded
        self.device = cpu_device(cpu.mcpu, threads)
        found = measured_roofs(threads)
        self._roofs = dataclasses.replace(found, arithmetic=_HEADROOM * found.arithmetic)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Compile the defaults of kernels together; what fails, fails again when its turn comes."""
        self._laboratory.compile((kernel.site, kernel.default) for kernel in kernels)

    def kernels(self, found: Functions, work: Workload) -> Iterator[Kernel]:
        """The distinct kernels of a model's steps that can be tuned, with what reaches them in the model."""
        if found.model.parameters is None:
            raise NemocError(f"{found.model.name} has no weights; random:{found.model.name} has")
        graphs, weights = bind_weights(found.graphs)
        source = self._packed or WeightSource(found.model.parameters, weights)
        layout = weight_layout(weights)
        for function, graph in self._expanded(graphs).items():
            sizes = work.sizes(function)
            program, sites = record_sites(
                {function: graph},
                layout,
                functools.partial(work.arguments, function=function, source=source),
                sizes,
                self.emit,
            )
            (lowered,) = program.graphs
            stored = {*lowered.params, *lowered.states}
            counts = Counter(n.kernel.name for n in program.functions[0].launches)
            for site in sites:
                warm = [value not in stored for value in site.site.op.operands()]
                yield Kernel(
                    site.site,
                    site.plan,
                    function,
                    # Sites may share a launch, as that which makes integers of rows.
                    min(counts[stage.kernel.name] for stage in site.plan.stages),
                    sizes,
                    functools.partial(self._subject, site, sizes, warm),
                    least=_least_seconds(site.site.op, warm, work.symbols(function), self._roofs),
                    cached=work.before(function),
                )

    def _subject(
        self, found: RecordedSite, sizes: Mapping[str, int], warm: Sequence[bool]
    ) -> "Subject":
        """The bench of a kernel."""
        return self._laboratory.subject(found.site, found.plan, found.operands, sizes, warm)


@contextlib.contextmanager
def _benches(
    target: str,
    threads: int,
    folder: Path,
    progress: Progress | None,
    packed: ParameterSource | None = None,
) -> Iterator[_Benches]:
    """Where a target's kernels are measured, or their times predicted where no such GPU is at hand.

    Args:
        target, threads, progress: as for `tune`.
        folder: for what is compiled.
        packed: the model's weights as its steps read them; None: they are made of its parameters.

    Raises:
        NemocError: the target is neither this machine's CPU nor a GPU.
    """
    if target in RATES:
        found = device_at_hand(target)
        if found is None:
            yield GpuBenches(target, progress)
            return
        index, machine = found
        with GpuLaboratory(folder, device=index) as gpu:
            yield GpuBenches(target, progress, gpu, machine)
        return
    if target.partition(":")[0] != "cpu":
        known = ", ".join(("cpu", *RATES))
        raise NemocError(f"target {target!r} cannot be tuned, expected one of {known}")
    from nemoc.codegen.tvm.laboratory import Laboratory  # noqa: PLC0415  (loads tvm)
    from nemoc.codegen.tvm.target import cpu_target  # noqa: PLC0415

    cpu = cpu_target(target)
    store = read_options().cache / "objects"
    with Laboratory(cpu, threads, folder, store, _BOUND) as laboratory:
        yield _CpuBenches(laboratory, cpu, threads, packed)


def _least_seconds(op: Op, warm: Sequence[bool], sizes: Mapping[str, int], roofs: Roofs) -> float:
    """The least time of an op whose operands are in memory, but for warm ones, which caches have.

    Arithmetic is that of f32; where it is in integers, reading alone counts.
    """
    read = sum(estimate(n, sizes) for n, near in zip(op.reads(), warm, strict=True) if not near)
    return roofs.seconds(read, 0.0 if multiplies_integers(op) else estimate(op.flops(), sizes))


class _Executables:
    """The model as executables for comparison, all with one file of weights. A `ParameterSource` of these.

    They are packed once, when the first of them is read or executables are compared.
    """

    def __init__(
        self, model: Model, options: Mapping[str, Any], numerics: str, work: Workload
    ) -> None:
        self._compile = functools.partial(
            compiler.compile,
            model,
            numerics=numerics,
            max_batch=work.batch,
            max_context=max(_CONTEXT, work.context + _DECODED),
            **options,
        )

    @functools.cached_property
    def default(self) -> Executable:
        """With no schedules but defaults."""
        return self._compile(records=Records())

    def with_records(self, records: Records) -> Executable:
        """With the schedules of records."""
        return self._compile(records=records, weights_of=self.default)

    def type_of(self, name: str) -> TensorType:
        return self._weights.type_of(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._weights.read(name, start, stop)

    @functools.cached_property
    def _weights(self) -> PackedWeights:
        folder = self.default.folder
        return open_weights(folder, read_manifest(folder), verify="headers")


def _compare(
    compiled: _Executables, results: Records, work: Workload, clock: _Budget
) -> dict[str, Interval | None]:
    """The whole model's time relative to that with all defaults, by function, in one interleaved run.

    A function that launches the same kernels in both has none: its times would differ by chance alone.

    Both executables map one file of weights: of two copies of it, one may lie better in memory than the other, which
    steps of one token, bound by reading, show as a gain or a loss that no kernel has.
    """
    known = known_records()
    known.add(results)
    both = {"default": compiled.default, "tuned": compiled.with_records(known)}
    changed = _changed(both["default"], both["tuned"], work.functions)
    if not changed:
        return dict.fromkeys(work.functions)
    runs: dict[str, Callable[[], object]] = {}
    for name, executable in both.items():
        runs |= {f"{step} {name}": run for step, run in steps(executable, work) if step in changed}
    started = time.monotonic()
    interleaved(runs, 1)
    each = (time.monotonic() - started) / 2
    timings = interleaved(runs, int(min(max(_COMPARED, clock.left / each), 60)), warmup=0)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {
        step: ratio_of_times(seconds[f"{step} tuned"], seconds[f"{step} default"])
        if step in changed
        else None
        for step in work.functions
    }


def _changed(default: Executable, tuned: Executable, functions: Iterable[str]) -> list[str]:
    """The functions that do not launch the same kernels in two executables, as far as these say what they launch."""
    records = [read_costs(e.folder, read_manifest(e.folder)) for e in (default, tuned)]
    one, other = (record.functions if record is not None else {} for record in records)
    return [f for f in functions if f not in one or one[f] != other.get(f)]


def steps(executable: Executable, work: Workload) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed of a whole model: a prompt, and eight steps of one token behind as many as the workload says.

    Args:
        executable: the model.
        work: the sizes.
    """
    vocab = executable.program.vocab
    generator = torch.Generator().manual_seed(0)
    shape = (work.batch, max(work.prefill, work.cached))
    ids = torch.randint(0, vocab, shape, generator=generator)
    prompt, state = ids[:, : work.prefill], executable.new_state(work.batch)
    started = executable.new_state(work.batch)
    executable.prefill(ids[:, : work.cached], started)

    def prefill() -> None:
        state.reset()
        executable.prefill(prompt, state)

    behind = started.clone()

    def decode() -> None:
        behind.arena.copy_(started.arena)  # the state that steps were recorded for
        token = ids[:, 0]
        for _ in range(_DECODED):
            token = executable.decode(token, behind).argmax(-1)

    yield "prefill", prefill
    yield "decode", decode
