"""Tuning a small model on this machine: what is kept, what is spent, and that no bit changes unasked."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import nemoc
import nemoc.tuning
from nemoc.__main__ import main
from nemoc.autotune import tuner
from nemoc.autotune.journal import Trial
from nemoc.autotune.measure import Roofs, Timing
from nemoc.autotune.records import Record, Records, read_records
from nemoc.autotune.statistics import Interval
from nemoc.autotune.tuner import KernelReport, Told, Tuner
from nemoc.codegen import sites
from nemoc.codegen.lower import corner_sizes, lower_program
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.storage import Weight, bind_weights, weight_layout
from nemoc.codegen.tunables import Choices, IllegalSchedule, Tunable
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.laboratory import Laboratory
from nemoc.codegen.tvm.target import cpu_target
from nemoc.compiler import functions
from nemoc.models import open_model
from nemoc.runtime import Executable, artifact
from nemoc.runtime.costs import read_costs
from nemoc.runtime.machine import thread_count
from nemoc.runtime.manifest import read_manifest
from nemoc.runtime.weights import WeightSource, write_weights
from nemoc.schedules import SCHEDULES, Chosen, cpu_device
from nemoc.tuning import tune
from nemoc.workload import Workload
from support.checkpoints import write_checkpoint
from support.made_up_records import site as product
from support.quantized import WIDE

WORK = Workload(prefill=16, cached=8)
CPU = cpu_target()
DEVICE = cpu_device(CPU.mcpu, thread_count(None))
SITE, EMIT = product(), functools.partial(emit, target=CPU)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(
        folder, seed=3, dtype=torch.bfloat16, **(WIDE | {"hybrid_override_pattern": "M*E"})
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_rounds() -> Iterator[None]:
    """No batch is measured for longer than it takes at least: nothing here depends on how fast what is."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_BATCH_SECONDS", "_FINAL_SECONDS"):
            patch.setattr(tuner, name, 0.0)
        yield


def interrupt(told: Told) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tuned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the journal and the records of a tuning that ended after its first candidates."""
    folder = tmp_path_factory.mktemp("tuned")
    log, found = folder / "journal.log", folder / "records.json"
    report = tune(
        str(checkpoint), workload=WORK, journal=log, records=found, budget=1e6, tell=interrupt
    )
    assert len(report.kernels) > 10 and not report.whole
    assert report.interrupted and not report.finished and not report.not_reached
    assert all(k.seconds > k.kernel.least for k in report.kernels)
    assert sum(k.kernel.least > 0.0 for k in report.kernels) > 10
    for function in ("prefill", "decode"):
        shares = [k.share for k in report.kernels if k.kernel.function == function]
        assert sum(shares) == pytest.approx(1.0)
    return folder


def test_every_kernel_has_a_record(tuned: Path) -> None:
    records = list(read_records(tuned / "records.json"))
    assert len(records) > 10
    for record in records:
        assert (record.device, record.tools) == (DEVICE.name, DEVICE.tools)
        assert (record.numerics, record.origin) == ("same", "measured")
        assert record.sizes in (WORK.sizes("prefill"), WORK.sizes("decode"))
        assert record.high < 1.0 or record.schedule == {}


def test_budget_that_is_spent_is_not_spent_again(
    checkpoint: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("something is compiled, measured or computed")

    for name in ("compile", "check", "time"):
        monkeypatch.setattr(Laboratory, name, refuse)
    monkeypatch.setattr(sites, "interpret", refuse)
    before = list(read_records(tuned / "records.json"))
    report = tune(
        str(checkpoint),
        budget=0.01,
        workload=WORK,
        journal=tuned / "journal.log",
        records=tuned / "again.json",
    )
    assert report.earlier > 0.01
    again = {r.kernel: r.schedule for r in read_records(tuned / "again.json")}
    assert again == {r.kernel: r.schedule for r in before}


def test_kernels_of_a_step_that_became_slower_keep_their_defaults(
    checkpoint: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim(self: Tuner, report: KernelReport, trials: Sequence[Trial]) -> dict[str, Any]:
        schedule = next((t.schedule for t in trials if t.schedule), {})
        return {"schedule": schedule, "equal": False, "ratio": 0.9, "low": 0.89, "high": 0.91}

    def compare(*_: object) -> dict[str, Interval]:
        claimed.update({r.kernel: r.schedule for r in read_records(found)})
        return {"prefill": Interval(0.9, 0.8, 1.0), "decode": Interval(1.1, 1.05, 1.2)}

    monkeypatch.setattr(Tuner, "_last_measurement", claim)
    monkeypatch.setattr(nemoc.tuning, "_compare", compare)
    monkeypatch.setattr(Tuner, "_search", lambda *_: None)
    log = shutil.copy(tuned / "journal.log", tmp_path)
    found, claimed = tmp_path / "records.json", dict[str, Any]()
    report = tune(
        str(checkpoint), budget=1000, workload=WORK, journal=log, records=found, numerics="any"
    )
    assert report.whole["decode"].is_loss
    steps = {k.name: k.kernel.function for k in report.kernels}
    assert {steps[name] for name, schedule in claimed.items() if schedule} == {"prefill", "decode"}
    for record in read_records(found):
        stays = steps[record.kernel] == "prefill"
        assert record.schedule == (claimed[record.kernel] if stays else {})


def test_a_budget_that_is_over_before_the_search_measures_one_default_and_leaves_the_rest(
    checkpoint: Path, tmp_path: Path
) -> None:
    files = {"journal": tmp_path / "journal.log", "records": tmp_path / "records.json"}
    for _ in range(2):  # the second run has nothing left to spend
        report = tune(str(checkpoint), budget=0.01, workload=WORK, **files)
        reached = [k for k in report.kernels if k.reached]
        assert len(reached) == 1 and reached[0].seconds > 0.0
        assert sum(report.not_reached.values()) == len(report.kernels) - 1
        assert not report.finished and not report.interrupted
    (record,) = read_records(tmp_path / "records.json")
    assert record.kernel == reached[0].name


def test_an_interrupt_ends_the_comparison_and_keeps_what_kernels_gained(
    checkpoint: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: object) -> None:
        raise KeyboardInterrupt

    def claim(self: Tuner, report: KernelReport) -> None:
        gain = {"equal": True, "ratio": 0.9, "low": 0.89, "high": 0.91}
        report.take({"schedule": dict(report.study.trials()[0].schedule), **gain})

    monkeypatch.setattr(Tuner, "_conclude", claim)
    monkeypatch.setattr(Tuner, "_search", lambda *_: None)
    monkeypatch.setattr(nemoc.tuning, "_compare", compare)
    log, found = shutil.copy(tuned / "journal.log", tmp_path), tmp_path / "records.json"
    report = tune(str(checkpoint), budget=1e6, workload=WORK, journal=log, records=found)
    assert report.interrupted and not report.whole
    assert any(record.schedule for record in read_records(found))


def test_weights_are_packed_once_for_kernels_and_executables(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(file: object, weights: Sequence[Weight], *rest: Any) -> None:
        written.append(len(weights))
        write_weights(file, weights, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(artifact, "write_weights", write)
    model = open_model(checkpoint)
    options = {"target": "reference", "quantize": "nvfp4"}
    compiled = nemoc.tuning._Executables(model, options, "same", WORK)
    assert not written
    _, weights = bind_weights(functions(model, which=WORK.functions, **options).graphs)
    assert model.parameters is not None
    made = WeightSource(model.parameters, weights)
    for weight in weights:
        assert compiled.type_of(weight.name) == weight.type
        assert torch.equal(compiled.read(weight.name), made.read(weight.name))
    other = compiled.with_records(Records())
    assert other.folder != compiled.default.folder
    assert len(written) == 1


def test_command_prints_what_was_found(
    checkpoint: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--db", str(tuned / "journal.log"), "--records", str(tuned / "cli.json")]
    sizes = ["--prefill", "16", "--cached", "8", "--budget", "0.01s"]
    page = tuned / "tune.html"
    assert main(["tune", str(checkpoint), *files, *sizes, "--report", str(page), "-q"]) == 0
    printed = capsys.readouterr().out
    assert str(page) in printed and DEVICE.name in page.read_text()
    assert f"Kernels on {DEVICE.name}" in printed
    assert "candidates of" in printed and "before" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget soon: expected a time such as 90s, 10m or 1h"),
        (["--budget", "0m"], "--budget 0m: expected a time"),
        (["--target", "reference"], "target 'reference' cannot be tuned"),
        (["--numerics", "close"], "'close' is not one of"),
        (["--db", "/proc/no/journal.log"], "/proc/no/journal.log"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(checkpoint), *arguments, "-q"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def artifacts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Without schedules, and of every kernel with the greatest settings of what is said to keep bits, all at once."""
    records = Records(_record(name, s) for name, s in _extremes(checkpoint).items())
    assert len(records) > 8
    folder = tmp_path_factory.mktemp("artifacts")
    for name, known in (("default", Records()), ("tuned", records)):
        options = {"records": known, "max_batch": 2, "max_context": 64}
        nemoc.compile(str(checkpoint), "cpu", destination=folder / name, **options)
    entries = json.loads((folder / "tuned" / SCHEDULES).read_text())
    assert {e["kernel"] for e in entries} == {r.kernel for r in records}
    assert not (folder / "default" / SCHEDULES).exists()
    return folder / "default", folder / "tuned"


def test_schedules_that_keep_bits_leave_logits_as_they_are(artifacts: tuple[Path, Path]) -> None:
    logits = []
    for made in map(nemoc.load, artifacts):
        ids = torch.randint(97, (2, 29), generator=torch.Generator().manual_seed(0))
        state = made.new_state(2)
        found = [made.prefill(ids, state, all_logits=True)]
        found += [made.decode(ids[:, t], state)[:, None] for t in range(4)]
        logits.append(torch.cat(found, 1))
    assert torch.equal(*logits)


@dataclasses.dataclass
class Both:
    """The executables that a comparison asks for."""

    default: Executable
    tuned: Executable

    def with_records(self, records: Records) -> Executable:
        return self.tuned


def test_only_steps_that_launch_other_kernels_are_compared(
    artifacts: tuple[Path, Path],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Times of others would differ by chance alone, and a step could be called slower."""
    timed: list[str] = []

    def time(runs: dict[str, object], rounds: int, warmup: int = 1) -> dict[str, Timing]:
        timed.extend(runs)
        return {name: Timing((2.0 if "default" in name else 1.0,) * rounds) for name in runs}

    monkeypatch.setattr(nemoc.tuning, "interleaved", time)
    default, tuned = map(nemoc.load, artifacts)
    costs = read_costs(artifacts[0], read_manifest(artifacts[0]))
    assert costs is not None
    launched = {f: {n.kernel for n in costs.functions[f].launches} for f in costs.functions}
    decode = launched.pop("decode").difference(*launched.values())
    records = Records(
        _record(name, schedule)
        for name, schedule in _extremes(checkpoint).items()
        if decode.issuperset(name.split("+"))
    )
    assert records
    options = {"records": records, "max_batch": 2, "max_context": 64}
    only_decode = nemoc.compile(str(checkpoint), "cpu", destination=tmp_path / "decode", **options)
    for made, expected in (
        (default, {"prefill": None, "decode": None}),
        (only_decode, {"prefill": None, "decode": 0.5}),
        (tuned, {"prefill": 0.5, "decode": 0.5}),
    ):
        timed.clear()
        budget = nemoc.tuning._Budget(1.0)
        found = nemoc.tuning._compare(Both(default, made), Records(), WORK, budget)  # type: ignore[arg-type]
        assert {step: i and round(i.ratio, 9) for step, i in found.items()} == expected
        compared = {step for step, ratio in expected.items() if ratio is not None}
        assert {name.split()[0] for name in timed} == compared


def test_loading_and_running_never_tunes(artifacts: tuple[Path, Path]) -> None:
    script = (
        "import sys, torch, nemoc\n"
        "made = nemoc.load(sys.argv[1])\n"
        "made.prefill(torch.zeros(1, 3, dtype=torch.int64), made.new_state())\n"
        "names = {m.split('.')[0] for m in sys.modules} & {'optuna', 'tvm', 'triton'}\n"
        "assert not names, names\n"
        "names = {m for m in sys.modules if m.startswith('nemoc.autotune')}\n"
        "assert names <= {'nemoc.autotune', 'nemoc.autotune.records'}, names\n"
    )
    subprocess.run([sys.executable, "-c", script, str(artifacts[1])], check=True)


def test_record_that_changes_bits_is_taken_only_when_asked() -> None:
    record = dataclasses.replace(_record("linear_0", {"sums": 16}), numerics="any")
    assert Chosen(Records([record]), DEVICE, "same")("linear_0", SITE, EMIT) == {}
    chosen = Chosen(Records([record]), DEVICE, "any")
    assert chosen("linear_0", SITE, EMIT) == {"sums": 16}
    assert chosen.taken == {"linear_0": record}


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu:cray-1, 1 thread"}, {"tools": "pencil 2"}, {"origin": "predicted"}],
)
def test_record_for_something_else_is_not_taken(other: dict[str, str]) -> None:
    record = dataclasses.replace(_record("linear_0", {"panels": 2}), **other)  # type: ignore[arg-type]
    assert Chosen(Records([record]), DEVICE, "any")("linear_0", SITE, EMIT) == {}


def test_schedules_that_are_taken_are_in_the_artifact() -> None:
    chosen = Chosen(Records([_record("linear_0", {"panels": 2})]), DEVICE, "same")
    assert chosen.files() == {}
    chosen("linear_0", SITE, EMIT)
    chosen("linear_1", SITE, EMIT)
    ((name, text),) = chosen.files().items()
    assert name == SCHEDULES
    (entry,) = json.loads(text)
    assert (entry["kernel"], entry["schedule"]) == ("linear_0", {"panels": 2})


def _extremes(checkpoint: Path) -> dict[str, dict[str, int | str]]:
    """For each kernel that has some, the greatest legal settings of the tunables that keep bits."""
    graphs, weights = bind_weights(functions(str(checkpoint), "cpu").graphs)
    found: dict[str, dict[str, int | str]] = {}

    def note(site: Site) -> Plan:
        choices = Choices()
        plan = emit(dataclasses.replace(site, choices=choices), CPU)
        schedule = _greatest(site, [t for t in choices.asked.values() if t.keeps_bits])
        if schedule:
            found[plan.name] = schedule
        return plan

    corners = corner_sizes(1, 64, 64)
    lower_program(expanded(graphs), weight_layout(weights), corners, note)
    return found


def test_a_launch_that_several_products_have_counts_for_each_as_often_as_that_product(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of q, k and v become integers by one kernel; q is another product than k and v."""
    monkeypatch.setattr(nemoc.tuning, "measured_roofs", lambda threads: Roofs(1e10, 1e11))
    found = functions(checkpoint, "cpu", quantize="nvfp4-w4a8")
    with nemoc.tuning._benches("cpu", 1, tmp_path, None) as benches:
        kernels = [k for k in benches.kernels(found, WORK) if k.function == "decode"]
    times = {k.default.name: k.launches for k in kernels if len(k.default.stages) > 1}
    graphs, weights = bind_weights(found.graphs)
    program = lower_program(
        expanded({"decode": graphs["decode"]}),
        weight_layout(weights),
        corner_sizes(1, 64, 64),
        EMIT,
    )
    launched = Counter(launch.kernel.name for launch in program.functions[0].launches)
    assert times == {name: launched[name.rpartition("+")[2]] for name in times}
    integers = [name for name in times if name.startswith("integers")]
    assert len({name.partition("+")[0] for name in integers}) < len(integers)


def _greatest(site: Site, tunables: list[Tunable]) -> dict[str, int | str]:
    schedule: dict[str, int | str] = {}
    for tunable in tunables:
        wanted = schedule | {tunable.name: tunable.values[-1]}
        try:
            emit(dataclasses.replace(site, choices=Choices(wanted)), CPU)
        except IllegalSchedule:
            continue
        schedule = wanted
    return schedule


def _record(kernel: str, schedule: dict[str, int | str]) -> Record:
    return Record(
        kernel=kernel,
        device=DEVICE.name,
        tools=DEVICE.tools,
        structure="linear",
        shape=(),
        sizes=WORK.sizes("prefill"),
        schedule=schedule,
        numerics="same",
        ratio=0.9,
        low=0.85,
        high=0.95,
        seconds=(1.0, 0.9),
        trials=1,
        origin="measured",
        machine=DEVICE.machine,
        date="2026-01-01T00:00:00+00:00",
    )
