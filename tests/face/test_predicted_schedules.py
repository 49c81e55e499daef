"""Compiling with schedules that records of other shapes predict: only where asked for, and never silently."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from nemoc.autotune.records import Record, Records, structure_of
from nemoc.autotune.search import Space
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.tuned import tuned
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.target import cpu_target
from nemoc.commands import compile as command
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Interleave, Linear
from nemoc.schedules import SCHEDULES, Chosen, Numerics, cpu_device
from support.kernels import value
from support.made_up_records import record

CPU = cpu_target("cpu:x86-64-v3")
DEVICE = cpu_device(CPU.mcpu, 2)
EMIT = functools.partial(emit, target=CPU)
FAST = {"panels": 4}


def product(features: int) -> Site:
    """Rows of any number by a weight [features, 64]."""
    w = value(DType.F32, *Interleave(value(DType.F32, features, 64), 32).infer().shape)
    return Site.dense(Linear(value(DType.F32, B * L, 64), w, interleave=32, features=features))


def relative(features: int, ratio: float = 0.8) -> Record:
    """A record of such a product, for which the fast schedule takes that much of the default's time."""
    site = product(features)
    structure, shape = structure_of(site)
    found = record(
        shape,
        lambda shape, s: ratio if s["panels"] == 4 else 1.0,
        Space.of(site, EMIT, keep_bits=True).tunables,
        [FAST, {"panels": 2}],
    )
    return dataclasses.replace(
        found,
        kernel=EMIT(site).name,
        structure=structure,
        device=DEVICE.name,
        tools=DEVICE.tools,
    )


KNOWN = Records(map(relative, (64, 128, 512)))
NEW = product(256)


def compiled(
    records: Records, predicted: bool, numerics: Numerics = "same"
) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that compilation takes for the new product, and what the artifact says of schedules."""
    chosen = Chosen(records, DEVICE, numerics, predicted)
    plan = tuned(EMIT, chosen)(NEW)
    return plan, json.loads(chosen.files().get(SCHEDULES, "[]"))


def test_nothing_is_predicted_unless_asked_for() -> None:
    assert compiled(KNOWN, predicted=False) == (EMIT(NEW), [])


def test_prediction_is_taken_and_said_to_be_one() -> None:
    plan, (entry,) = compiled(KNOWN, predicted=True)
    assert plan == Space.of(NEW, EMIT).plan(FAST) != EMIT(NEW)
    assert entry["origin"] == "predicted"
    assert entry["kernel"] == EMIT(NEW).name
    assert (entry["schedule"], entry["method"], entry["shapes"]) == (FAST, "neighbour", 3)
    assert entry["ratio"] == pytest.approx(0.8)
    assert entry["regret"] == pytest.approx(1.0)


def test_record_of_the_kernel_itself_counts_more_than_a_prediction() -> None:
    measured = dataclasses.replace(relative(256), schedule={}, ratio=1.0)
    assert compiled(Records([*KNOWN, measured]), predicted=True) == (EMIT(NEW), [])


def test_too_few_records_predict_nothing() -> None:
    assert compiled(Records(list(KNOWN)[:2]), predicted=True) == (EMIT(NEW), [])


def test_records_of_another_device_predict_nothing() -> None:
    others = [dataclasses.replace(r, device="cpu:elsewhere, 2 threads") for r in KNOWN]
    assert compiled(Records(others), predicted=True) == (EMIT(NEW), [])


def test_kernel_is_predicted_once_however_many_layers_have_it() -> None:
    chosen = Chosen(KNOWN, DEVICE, "same", predicted=True)
    backend = tuned(EMIT, chosen)
    assert backend(NEW) == backend(NEW)
    assert len(chosen.predictions) == len(json.loads(chosen.files()[SCHEDULES])) == 1


def test_command_says_what_is_predicted(tmp_path: Path) -> None:
    assert list(command.predicted_notes(tmp_path)) == []
    (tmp_path / SCHEDULES).parent.mkdir()
    _, entries = compiled(KNOWN, predicted=True)
    measured = {**entries[0], "origin": "measured"}
    (tmp_path / SCHEDULES).write_text(json.dumps([measured]))
    assert list(command.predicted_notes(tmp_path)) == []
    (tmp_path / SCHEDULES).write_text(json.dumps([measured, *entries]))
    (note,) = command.predicted_notes(tmp_path)
    assert note == (
        "kernels with predicted schedules, not measured ones: 1, expected at 0.80 to 0.80 of the "
        f"default's time: {tmp_path / SCHEDULES}"
    )
