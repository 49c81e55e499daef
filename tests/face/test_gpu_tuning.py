"""Tuning a model for a GPU that is not there: no weights, no GPU, and nothing taken that was not asked for. Of one that
is there, that it is measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

import pytest

from nemoc import NemocError, compiler, gpu_tuning, tuning
from nemoc.autotune.gpu_model import MODEL
from nemoc.autotune.measure import Roofs
from nemoc.autotune.records import Records, read_records
from nemoc.autotune.tuner import Told
from nemoc.codegen.lower import corner_sizes
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.gpu import lower_gpu
from nemoc.schedules import SCHEDULES, Chosen, gpu_device
from nemoc.tuning import TuneReport, tune
from nemoc.workload import Workload
from support.checkpoints import write_checkpoint
from support.gpu_trials import PaperCompiler

pytest.importorskip("triton")

TARGET = "cuda:sm_90"
WORK = Workload(prefill=64, cached=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, seed=3)
    return folder


def stop_at_a_gain(told: Told) -> None:
    if told.best < 0.9:
        raise KeyboardInterrupt  # which ends a search, and what it found counts


def tuned_on_paper(checkpoint: Path, folder: Path, **options: Any) -> TuneReport:
    """A tuning of kernels that are compiled on paper; its records are in `records.json`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tuning, "try_variants", PaperCompiler())
        patch.setattr(tuning, "device_at_hand", lambda target: None)
        return tune(
            str(checkpoint),
            TARGET,
            workload=WORK,
            journal=folder / "journal.log",
            records=folder / "records.json",
            **options,
        )


@pytest.fixture(scope="module")
def tuned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneReport, Path]:
    """A short tuning, and its records."""
    folder = tmp_path_factory.mktemp("tuned")
    report = tuned_on_paper(checkpoint, folder, budget=600, numerics="any", tell=stop_at_a_gain)
    return report, folder / "records.json"


def test_every_kernel_has_a_predicted_record(tuned: tuple[TuneReport, Path]) -> None:
    report, file = tuned
    records = list(read_records(file))
    assert len(records) == len(report.kernels) > 20
    assert {(r.origin, r.device) for r in records} == {("predicted", TARGET)}
    assert all(r.seconds[0] > 0.0 for r in records)
    assert any(r.schedule for r in records)


def test_nothing_of_the_whole_model_is_claimed(tuned: tuple[TuneReport, Path]) -> None:
    report, _ = tuned
    assert not report.whole and report.device.origin == "predicted"


def test_predicted_schedules_are_taken_only_if_asked_for(
    checkpoint: Path, tuned: tuple[TuneReport, Path]
) -> None:
    _, file = tuned
    better = {r.kernel: r for r in read_records(file) if r.schedule}
    graphs, weights = bind_weights(compiler.functions(str(checkpoint), TARGET).graphs)
    layout, corners = weight_layout(weights), corner_sizes(1, 64, 64)

    def kernels(chosen: Chosen | None) -> set[str]:
        program = lower_gpu(graphs, layout, corners, TARGET, chosen)
        return {kernel.name for kernel in program.kernels}

    default, records = kernels(None), Records(better.values())
    unasked = Chosen(records, gpu_device(TARGET), "any")
    asked = dataclasses.replace(unasked, predicted=True)
    assert kernels(unasked) == default and not unasked.files()
    assert kernels(asked) != default
    entries = json.loads(asked.files()[SCHEDULES])
    assert {e["kernel"] for e in entries} <= set(better)
    assert {e["origin"] for e in entries} == {"predicted"}


def test_what_keeps_bits_is_all_that_is_tried_by_default(checkpoint: Path, tmp_path: Path) -> None:
    report = tuned_on_paper(checkpoint, tmp_path, budget=1)
    assert all(t.keeps_bits for k in report.kernels for t in k.space.tunables)
    assert {r.numerics for r in read_records(tmp_path / "records.json")} == {"same"}


def test_a_model_without_weights_can_be_tuned(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tuning, "try_variants", PaperCompiler())
        found = compiler.functions("nano-4b", TARGET, which=("decode",))
        kernels = list(gpu_tuning.GpuBenches(TARGET).kernels(found, WORK))
    assert found.model.parameters is None and len(kernels) > 10
    assert {k.function for k in kernels} == {"decode"}
    assert all(k.launches >= 1 for k in kernels)


def test_targets_without_predictions_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(NemocError, match="'triton-interpret' cannot be tuned, expected one of cpu"):
        tune(str(checkpoint), "triton-interpret", journal=tmp_path / "journal.log")


class Laboratories:
    """Stands for `GpuLaboratory`.

    Attributes:
        log: what it was called with, and what was done with the laboratory.
    """

    def __init__(self) -> None:
        self.log: list[object] = []

    def __call__(self, folder: Path, device: int) -> Self:
        self.log.append((folder, device))
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.append("closed")

    def roofs(self) -> Roofs:
        self.log.append("roofs")
        return Roofs(1e12, 1e14)


@pytest.fixture
def laboratories(monkeypatch: pytest.MonkeyPatch) -> Laboratories:
    made = Laboratories()
    monkeypatch.setattr(tuning, "GpuLaboratory", made)
    return made


def test_a_gpu_at_hand_is_measured(
    laboratories: Laboratories, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "device_at_hand", {TARGET: (1, "Fake GPU")}.get)
    with tuning._benches(TARGET, 1, tmp_path, None) as benches:
        device = benches.device
        assert laboratories.log == [(tmp_path, 1), "roofs"]
    assert laboratories.log[-1] == "closed"
    assert (device.name, device.machine) == (TARGET, "Fake GPU")
    assert (device.origin, device.predicted_by) == ("measured", "")


def test_a_gpu_that_is_not_at_hand_is_predicted(
    laboratories: Laboratories, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "device_at_hand", lambda target: None)
    with tuning._benches(TARGET, 1, tmp_path, None) as benches:
        device = benches.device
    assert laboratories.log == []
    assert (device.origin, device.predicted_by) == ("predicted", MODEL)
    assert device == gpu_device(TARGET, MODEL)
