"""Kernels of a GPU at hand, tried one by one: on a device that interprets them, since tests have none."""

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemoc import NemocError, compiler, gpu_trial_worker, gpu_tuning
from nemoc.autotune.journal import Journal
from nemoc.autotune.measure import Roofs
from nemoc.autotune.search import Space
from nemoc.autotune.tuner import Kernel, Tuner
from nemoc.codegen.bench import Finding
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import gpu_target
from nemoc.gpu_laboratory import WORKERS, Given, GpuLaboratory, MeasuredBench
from nemoc.ir.dims import estimate
from nemoc.models import open_model
from nemoc.runtime.cuda_driver import DriverError
from nemoc.schedules import gpu_device
from nemoc.workload import Workload
from support.checkpoints import write_checkpoint
from support.fake_cuda import FakeLaunch, tensor_at
from support.gpu_laboratory import InterpretedCompiler, InterpretedLaboratory

pytest.importorskip("triton")

TARGET = "cuda:sm_90"
WORK = Workload(prefill=5, cached=4, batch=2)


class Known(InterpretedLaboratory):
    """A laboratory whose device has known roofs."""

    def roofs(self) -> Roofs:
        return Roofs(1e12, 1e14)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, seed=3)
    return folder


def kernels(
    checkpoint: Path, folder: Path, spoil: Callable[..., None] | None = None, dtype: str = "bf16"
) -> list[Kernel]:
    """The kernels of both steps, with benches on an interpreting device."""
    compile = InterpretedCompiler()
    options = {} if spoil is None else {"spoil": spoil}
    laboratory = Known(compile, folder, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tuning, "try_variants", compile)
        benches = gpu_tuning.GpuBenches(TARGET, laboratory=laboratory, machine="Fake GPU")
    found = compiler.functions(open_model(str(checkpoint)), TARGET, dtype=dtype)
    return list(benches.kernels(found, WORK))


def bench_of(kernel: Kernel) -> MeasuredBench:
    bench = kernel.bench()
    assert isinstance(bench, MeasuredBench)
    return bench


def check_default(kernel: Kernel) -> Finding:
    bench = bench_of(kernel)
    assert not bench.compile([kernel.default])
    return bench.check(kernel.default)


@pytest.fixture(scope="module")
def known(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return kernels(checkpoint, tmp_path_factory.mktemp("laboratory"))


def test_defaults_are_right_on_what_is_drawn_for_them(known: list[Kernel]) -> None:
    kinds = {kernel.default.name.partition("_")[0]: kernel for kernel in known}
    assert {"product", "grouped", "attention", "conv", "rows"} <= set(kinds)
    for kernel in kinds.values():
        found = check_default(kernel)
        assert (found.outcome, found.equal) == ("ok", True), (kernel.default.name, found.message)
        assert found.error < 5e-3


def test_f32_is_held_to_f32(checkpoint: Path, tmp_path: Path) -> None:
    found = check_default(kernels(checkpoint, tmp_path, dtype="f32")[-1])
    assert found.outcome == "ok" and found.error < 1e-5


def test_other_schedules_are_compared_with_the_default(known: list[Kernel]) -> None:
    kernel = next(k for k in known if k.default.name.startswith("product"))
    bench = bench_of(kernel)
    space = Space.of(
        kernel.site, functools.partial(emit, target=gpu_target(TARGET)), runs=kernel.runs
    )
    plans = [p for change in space.single_changes() if (p := space.plan(change)) is not None][:3]
    assert plans and not bench.compile(plans)
    assert {bench.check(plan).outcome for plan in plans} == {"ok"}
    times = bench.time([kernel.default, *plans], rounds=3, seed=0)
    assert times == [[1e-6] * 3] * (1 + len(plans))


def test_a_run_on_a_device_goes_on_where_the_one_before_ended(
    known: list[Kernel], tmp_path: Path
) -> None:
    kernel = next(k for k in known if k.default.name.startswith("product"))
    target = functools.partial(emit, target=gpu_target(TARGET))

    def stage(deadline: float) -> list[str]:
        """What was tried of the kernel when a run is over that looks at its clock so often."""
        made = Tuner(
            [kernel],
            target,
            gpu_device(TARGET, machine="Fake GPU"),
            Journal(tmp_path / "journal.log"),
            keep_bits=False,
            clock=functools.partial(next, itertools.count()),
        )
        made.run(deadline)
        trials = made.reports[0].study.trials()
        assert {trial.outcome for trial in trials} == {"ok"}
        return [trial.kernels for trial in trials]

    first, second, third = (stage(deadline) for deadline in (0, 1, 1))
    assert first == [kernel.default.name]
    assert first == second[:1] and second == third[: len(second)]
    assert len(first) < len(second) < len(third) == len(set(third))


def test_a_site_whose_operands_cannot_be_made_is_tried_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernels(checkpoint, tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(Given, "operands", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check_default(kernel)
    assert check_default(kernel).outcome == "ok"


def test_what_is_cached_before_a_step_is_part_of_what_is_tried(known: list[Kernel]) -> None:
    bench = bench_of(known[-1])
    other = replace(bench, cached=bench.cached + 1)
    assert bench._subject() == bench_of(known[-1])._subject() != other._subject()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (DriverError("cuLaunchKernel", 700, "illegal address"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (NemocError("5 bytes of GPU memory cannot be allocated"), False),
        (ValueError("a request that means nothing"), False),
    ],
)
def test_only_errors_of_the_device_end_the_process(error: Exception, lost: bool) -> None:
    assert gpu_trial_worker._is_lost(error) is lost


def test_least_times_are_of_weights_and_states_that_have_to_move(known: list[Kernel]) -> None:
    for kernel in known:
        op, given = kernel.site.op, bench_of(kernel).given
        symbols = WORK.symbols(kernel.function)
        pairs = zip(op.operands(), op.reads(), strict=True)
        stored = sum(estimate(n, symbols) for value, n in pairs if given.is_stored(value))
        assert kernel.least == max(stored / 1e12, estimate(op.flops(), symbols) / 4e14)
    assert sum(kernel.least > 0.0 for kernel in known) > 10


def spoiled(checkpoint: Path, folder: Path, spoil: Callable[..., None]) -> Finding:
    """What is said of a default whose launches are spoiled."""
    kernel = next(
        k for k in kernels(checkpoint, folder, spoil) if k.default.name.startswith("product")
    )
    return check_default(kernel)


def test_unwritten_results_are_wrong(checkpoint: Path, tmp_path: Path) -> None:
    found = spoiled(checkpoint, tmp_path, lambda launch, run: None)
    assert found.outcome == "wrong" and "relative error inf" in found.message


def test_writing_outside_of_results_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    def beyond(launch: FakeLaunch, run: Callable[[], None]) -> None:
        run()
        tensor_at(launch.pointers[-1] - 4, torch.int32, [1]).fill_(0)

    found = spoiled(checkpoint, tmp_path, beyond)
    assert found.outcome == "wrong" and "written where it must not be" in found.message


STUB = """
import json, os, sys, time
answers = os.fdopen(int(sys.argv[1]), "w")
def reply(content):
    answers.write(json.dumps(content) + chr(10))
    answers.flush()
sys.stdin.readline()
reply({})
for line in sys.stdin:
    request = json.loads(line)
    kind = request["candidate"]
    if kind == "crash":
        sys.exit("CUDA error: an illegal memory access was encountered")
    if kind == "hang":
        time.sleep(60)
    if kind == "memory":
        reply({"error": "NemocError: 5 bytes of GPU memory cannot be allocated"})
    else:
        reply({"deviation": 0.0, "equal": True})
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crash", "an illegal memory access"),
        ("hang", "did not answer within 2 s"),
        ("memory", "5 bytes of GPU memory"),
    ],
)
def test_what_ends_the_process_is_named_and_the_next_candidate_runs(
    tmp_path: Path, kind: str, message: str
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    workers = replace(WORKERS, command=(sys.executable, str(stub)), seconds=2.0)
    folder = tmp_path / "laboratory"
    folder.mkdir()
    with GpuLaboratory(folder, workers) as laboratory:
        found = laboratory.check(tmp_path, kind, "default", 1e-2)
        assert found.outcome == kind and message in found.message
        assert laboratory.check(tmp_path, "right", "default", 1e-2) == Finding("ok", True)
