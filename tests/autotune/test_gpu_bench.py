"""Tuning for a GPU that is not there: what is compiled, what is refused, and what a record says."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from nemoc.autotune.gpu_bench import Compile, Compiled, PredictedBench
from nemoc.autotune.gpu_model import MODEL
from nemoc.autotune.journal import Journal
from nemoc.autotune.records import Device, Records
from nemoc.autotune.search import Space
from nemoc.autotune.tuner import Kernel, Tuner
from nemoc.codegen.bench import Finding
from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.binary import Binary
from nemoc.codegen.triton.build import Variant, try_variants
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import gpu_target
from nemoc.codegen.tunables import Choices, Schedule
from nemoc.ir import NemocError, parse
from nemoc.ir.ops import Fused
from support.gpu_trials import PaperCompiler, paper_binary
from support.mixers import mixer_region

HOPPER = gpu_target("cuda:sm_90")
SIZES = {"B": 1, "L": 256, "C": 257}
DEVICE = Device(HOPPER.name, "triton 0", HOPPER.description, predicted_by=MODEL)
EVER = float("inf")
SOON = 60.0
"""Time for a few batches."""


def site() -> Site:
    """A product of so few programs that smaller tiles pay."""
    body = parse("""
      graph @body {
        input %x: bf16[B, L, 1024]
        input %w: bf16[1024, 1024]
        %y = linear(%x, %w) : f32[B, L, 1024]
        return %y
      }
    """)
    return Site.dense(Fused(body.inputs, body))


SITE = site()
DEFAULT = emit(SITE, HOPPER)


def planned(schedule: Schedule) -> Plan:
    return emit(dataclasses.replace(SITE, choices=Choices(schedule)), HOPPER)


def bench(compiler: Compile) -> PredictedBench:
    aligned = {Arg("operand", 0): True, Arg("operand", 1): False, Arg("result", 0): True}
    return PredictedBench(SITE, DEFAULT, aligned, SIZES, HOPPER, Compiled(compiler))


def tuner(folder: Path, compiler: Compile, keep_bits: bool = False) -> Tuner:
    """A tuner whose clock ticks each time it is read."""
    made = bench(compiler)
    kernel = Kernel(SITE, DEFAULT, "prefill", 1, SIZES, lambda: made)
    log = Journal(folder / "journal.log")
    ticks = itertools.count()
    return Tuner(
        [kernel],
        lambda s: emit(s, HOPPER),
        DEVICE,
        log,
        keep_bits=keep_bits,
        clock=lambda: float(next(ticks)),
    )


def test_kernels_are_compiled_once_and_as_the_model_launches_them() -> None:
    compiler = PaperCompiler()
    made, other = bench(compiler), planned({"stages": 4})
    for _ in range(2):
        assert made.compile([DEFAULT, other]) == {}
    assert [v.kernel.name for v in compiler.asked] == [DEFAULT.name, other.name]
    assert {v.aligned for v in compiler.asked} == {(True, False, True)}


@pytest.mark.parametrize("usual", [0, 16])
def test_what_spills_more_than_the_default_is_out(usual: int) -> None:
    other = planned({"stages": 4})

    def spilling(variant: Variant) -> Binary:
        more = 8 if variant.kernel.name == other.name else 0
        return paper_binary(spilled=usual + more)

    found = bench(PaperCompiler(spilling)).compile([DEFAULT, other])
    assert set(found) == {other.name}
    assert found[other.name].outcome == "compile"
    assert f"spills {usual + 8} bytes" in found[other.name].message


def test_what_does_not_fit_is_out_with_the_reason() -> None:
    other = planned({"stages": 4})

    def failing(variant: Variant) -> Binary | NemocError:
        if variant.kernel.name == other.name:
            return NemocError("a program needs 300000 bytes of shared memory")
        return paper_binary()

    found = bench(PaperCompiler(failing)).compile([other])
    assert found == {
        other.name: Finding("compile", message="a program needs 300000 bytes of shared memory")
    }


def test_predictions_are_the_same_in_every_round() -> None:
    made = bench(PaperCompiler())
    times = made.time([DEFAULT, planned({"rows": 64})], rounds=3, seed=0)
    assert isinstance(times, list)
    assert [len(t) for t in times] == [3, 3]
    assert all(len(set(t)) == 1 and t[0] > 0.0 for t in times)


def test_records_say_that_they_are_predicted_and_are_not_taken_unasked(tmp_path: Path) -> None:
    made = tuner(tmp_path, PaperCompiler())
    made.run(SOON)
    records = made.results()
    (record,) = records
    assert (record.origin, record.device, record.numerics) == ("predicted", HOPPER.name, "any")
    assert record.schedule and record.ratio <= 0.97
    named = (record.kernel, record.device, record.tools, "any")
    assert records.find(*named) is None
    assert records.find(*named, predicted=True) == record


def test_what_was_measured_goes_before_what_was_predicted(tmp_path: Path) -> None:
    made = tuner(tmp_path, PaperCompiler())
    made.run(SOON)
    (record,) = made.results()
    measured = dataclasses.replace(record, origin="measured", date="2001-01-01", schedule={})
    both = Records([record, measured])
    assert both.find(record.kernel, record.device, record.tools, "any", predicted=True) == measured


def test_a_second_run_compiles_nothing(tmp_path: Path) -> None:
    tuner(tmp_path, PaperCompiler(), keep_bits=True).run(EVER)
    compiler = PaperCompiler()
    again = tuner(tmp_path, compiler, keep_bits=True)
    assert again.is_settled
    again.run(EVER)
    assert compiler.asked == []


@pytest.mark.parametrize(("told_apart", "gains"), [(0.97, True), (0.2, False)])
def test_differences_that_a_prediction_cannot_tell_are_no_gain(
    told_apart: float, gains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemoc.autotune.tuner._TOLD_APART", told_apart)
    made = tuner(tmp_path, PaperCompiler(), keep_bits=True)
    made.run(EVER)
    (record,) = made.results()
    assert bool(record.schedule) is gains
    assert record.numerics == "same" and set(record.schedule) <= {"stages", "neighbours"}


def test_schedules_compile_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    made = bench(lambda variants: try_variants(variants, HOPPER))
    other = planned({"rows": 64, "columns": 64})
    assert made.compile([other]) == {}
    (binary,) = made.compiled.get(made.variants(other))
    assert isinstance(binary, Binary)
    assert dict(binary.report.matrix)["wgmma.mma_async.bf16"] > 0
    assert made.seconds(other) < made.seconds(DEFAULT)  # 32 programs against 8


def few_rows() -> tuple[Site, PredictedBench]:
    """A product with a form for one row, one for a few and one for more, tuned for one row."""
    body = parse("""
      graph @body {
        input %x: bf16[B, 1024]
        input %w: bf16[512, 1024]
        %y = linear(%x, %w) : f32[B, 512]
        return %y
      }
    """)
    found = Site.dense(Fused(body.inputs, body))
    sizes = {"B": 1, "L": 1, "C": 9}
    plan = emit(found, HOPPER)
    return found, PredictedBench(found, plan, {}, sizes, HOPPER, Compiled(PaperCompiler()))


def test_forms_that_do_not_run_are_not_tuned() -> None:
    found, made = few_rows()
    whole = Space.of(found, lambda s: emit(s, HOPPER))
    felt = Space.of(found, lambda s: emit(s, HOPPER), runs=made.runs)
    assert len(made.default.stages) > len(made.runs(made.default)) == 1
    assert {t.name for t in felt.tunables} == {
        t.name for t in whole.tunables if t.name.startswith("few1_")
    }


def test_settings_that_nothing_felt_are_in_no_record() -> None:
    found, made = few_rows()
    space = Space.of(found, lambda s: emit(s, HOPPER), runs=made.runs)
    assert space.essential({"few1_stages": 2, "rows": 32, "few4_stages": 1}) == {"few1_stages": 2}


def test_what_decides_which_form_runs_brings_the_other_forms_settings() -> None:
    found = Site.dense(mixer_region(2, 16, 1, 16, norms=1))
    sizes = {"B": 1, "L": 600, "C": 600}
    plan = emit(found, HOPPER)
    made = PredictedBench(found, plan, {}, sizes, HOPPER, Compiled(PaperCompiler()))
    names = {t.name for t in Space.of(found, lambda s: emit(s, HOPPER), runs=made.runs).tunables}
    assert {"shortest", "chunk", "single_chunk", "row_tile"} <= names
