"""Records: which one counts, and files of them, whoever wrote them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemoc.autotune.records import (
    MOST_TRIED,
    SHIPPED,
    Record,
    Records,
    read_records,
    records_text,
)
from nemoc.codegen.tunables import Tunable
from nemoc.ir.errors import NemocError
from support.made_up_records import DEVICE, TOOLS, record

ROWS = Tunable("rows", 8, (4, 8, 16))


def one(size: int = 64, speed: float = 0.9, **fields: Any) -> Record:
    """A record of a shape for which 16 rows are that much of the default's time."""
    return record(
        (size, 32),
        lambda shape, s: {4: 1.2, 8: 1.0, 16: speed}[int(s["rows"])],
        [ROWS],
        [{"rows": 4}, {"rows": 16}],
        **fields,
    )


def test_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = Records([one(64), one(128, 0.8), one(256, 1.5)])
    path = tmp_path / "records.json"
    path.write_text(records_text(written))
    assert list(read_records(path)) == sorted(written, key=lambda r: r.kernel)
    assert len(path.read_text().splitlines()) == 2 + len(written)


def test_records_from_before_there_were_trials_are_read(tmp_path: Path) -> None:
    entry = one().to_json()
    del entry["tried"], entry["defaults"]
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"format": 1, "records": [entry]}))
    assert list(read_records(path)) == [dataclasses.replace(one(), tried=(), defaults={})]


def test_records_that_come_along_were_measured_and_claim_no_gain_that_is_in_doubt() -> None:
    found = read_records(SHIPPED)
    assert SHIPPED.stat().st_size < 1 << 20
    assert {r.device for r in found} == {"cpu:znver3, 2 threads", "cuda:sm_90"}
    for r in found:
        assert r.origin == "measured" and r.machine and r.trials > 0
        assert (r.high < 1.0) if r.schedule else (r.ratio, r.low, r.high) == (1.0, 1.0, 1.0)


def test_later_record_of_a_kernel_replaces_the_earlier_one() -> None:
    early, late = one(date="2026-01-01T00:00:00+00:00"), one(speed=0.7, date="2026-02-01T00:00:00")
    assert list(Records([early, late])) == list(Records([late, early])) == [late]


def test_only_what_was_measured_for_exactly_this_is_found() -> None:
    exact, guess = one(64), one(128, origin="predicted")
    other = one(256, numerics="any")
    records = Records([exact, guess, other])
    assert records.find(exact.kernel, DEVICE, TOOLS) == exact
    assert records.find(exact.kernel, "cpu:made-up, 1 thread", TOOLS) is None
    assert records.find(exact.kernel, DEVICE, "apache-tvm 0.28.0") is None
    assert records.find(guess.kernel, DEVICE, TOOLS) is None
    assert records.find(other.kernel, DEVICE, TOOLS) is None
    assert records.find(other.kernel, DEVICE, TOOLS, "any") == other


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(fields)


WRONG = {
    "a name that is no plan's": (change(kernel="../x"), "kernel is '../x', expected the name"),
    "a ratio of zero": (change(ratio=0), "ratio is 0, expected a positive number"),
    "a ratio of true": (change(ratio=True), "ratio is True, expected a positive number"),
    "a ratio that no float is near": (change(ratio=10**400), "ratio is 1000"),
    "another origin": (change(origin="invented"), "origin is 'invented', expected measured or"),
    "a setting that is a list": (
        change(schedule={"rows": [1]}),
        "schedule.rows is [1], expected an integer",
    ),
    "a trial of three parts": (
        change(tried=[[{}, 1.0, 2.0]]),
        "tried[0] is [{}, 1.0, 2.0], expected settings and a number",
    ),
    "a trial with a time of text": (
        change(tried=[[{}, "fast"]]),
        "tried[0][1] is 'fast', expected a positive number",
    ),
    "trials without end": (
        change(tried=[[{}, 1.0]] * (MOST_TRIED + 1)),
        f"expected at most {MOST_TRIED} trials",
    ),
    "settings without end": (
        change(defaults={f"t{i}": i for i in range(100)}),
        "expected at most 64 settings",
    ),
    "a field too many": (change(speed=1), "there is no use for a field 'speed'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, case: str) -> None:
    spoil, message = WRONG[case]
    entry = one().to_json()
    spoil(entry)
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"format": 1, "records": [entry]}))
    with pytest.raises(NemocError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
