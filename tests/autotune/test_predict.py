"""Predictions for shapes without records, from records whose truth the test makes up."""

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from nemoc.autotune.journal import Journal
from nemoc.autotune.predict import predict, seeds
from nemoc.autotune.records import MOST_TRIED, Record, Records, structure_of
from nemoc.autotune.search import Space
from nemoc.autotune.tuner import Tuner
from nemoc.codegen.tunables import Schedule, Setting, Tunable
from support.made_up_records import record, space, valley
from support.paper_kernels import DEVICE as PAPER
from support.paper_kernels import PaperBench, emit, paper_kernel, site

ROWS = Tunable("rows", 15, (1, 3, 7, 15, 31, 63, 127))
ORDER = Tunable("order", "rows", ("rows", "columns"))
SUMS = Tunable("sums", 7, (3, 7, 15), keeps_bits=False)
Time = Callable[[Sequence[int], Schedule], float]


def all_but_default(tunable: Tunable) -> list[Mapping[str, Setting]]:
    return [{tunable.name: v} for v in tunable.values if v != tunable.default]


def moving(shape: Sequence[int], schedule: Schedule) -> float:
    """The best number of rows grows with the first size, one step for each doubling."""
    return valley(math.log2(shape[0] + 1) - 5.0, float(schedule["rows"]))


def by_kind(shape: Sequence[int], schedule: Schedule) -> float:
    """Of pairs of close shapes every other one wants columns, the others rows: no line through the sizes says which."""
    wants_columns = round(math.log2(shape[0])) % 4 < 2
    return 0.8 if (schedule["order"] == "columns") == wants_columns else 1.0


def records_of(time: Time, tunable: Tunable, sizes: Sequence[int]) -> list[Record]:
    return [record((n, 64), time, [tunable], all_but_default(tunable)) for n in sizes]


def test_model_beats_neighbour_where_the_optimum_moves_with_the_shape() -> None:
    known = records_of(moving, ROWS, [63, 255, 1023, 4095, 8191])
    found = predict(known, (2047, 64), space(ROWS))
    assert (found.method, found.schedule) == ("model", {"rows": 63})
    assert found.shapes == 5
    assert found.low <= found.ratio <= found.high
    truth = moving((2047,), {"rows": 63}) / moving((2047,), {"rows": 15})
    assert found.low <= truth <= found.high
    # The neighbour is one or two steps off everywhere.
    assert found.regret < math.exp(0.1)


def test_model_chooses_what_no_neighbour_has_chosen() -> None:
    most = Tunable("rows", 127, ROWS.values)
    known = records_of(moving, most, [63, 70, 90, 127, 1023, 1100, 1448, 2047])
    assert {"rows": 15} not in [r.schedule for r in known]
    assert predict(known, (511, 64), space(most)).schedule == {"rows": 15}


def test_default_stays_where_the_better_method_chooses_it() -> None:
    known = records_of(moving, ROWS, [63, 127, 1023, 2047])
    found = predict(known, (511, 64), space(ROWS))  # where 15 is best, whatever 1023 has
    assert (found.method, found.schedule) == ("default", {})


def test_neighbour_beats_model_where_close_shapes_are_alike_and_no_line_says_how() -> None:
    sizes = [64, 66, 256, 258, 1024, 1026, 4096, 4098, 16384, 16386]
    known = records_of(by_kind, ORDER, sizes)
    found = predict(known, (260, 64), space(ORDER))
    assert (found.method, found.schedule) == ("neighbour", {"order": "columns"})
    assert found.ratio == pytest.approx(0.8**0.4, rel=1e-3)  # four of ten want columns
    assert (found.low, found.high) == (pytest.approx(0.8), 1.0)
    assert found.regret == pytest.approx(1.0)


def test_default_is_what_is_predicted_where_nothing_helps() -> None:
    gains = 0
    for seed in range(20):
        draw = random.Random(seed)
        times: dict[tuple[int, Setting], float] = {}

        def noise(
            shape: Sequence[int],
            schedule: Schedule,
            draw: random.Random = draw,
            times: dict[tuple[int, Setting], float] = times,
        ) -> float:
            return times.setdefault((shape[0], schedule["rows"]), math.exp(draw.gauss(0.0, 0.05)))

        known = records_of(noise, ROWS, [64, 200, 600, 1800, 5400, 16200])
        found = predict(known, (1000, 64), space(ROWS))
        gains += found.method != "default"
        if found.method == "default":
            assert (found.schedule, found.ratio) == ({}, 1.0)
            assert found.regret > 1.02  # there were faster trials, but nothing said which
    assert gains <= 2


def test_too_few_shapes_prove_nothing() -> None:
    known = records_of(lambda shape, s: valley(6.0, float(s["rows"])), ROWS, [100, 400, 1600])
    assert predict(known, (800, 64), space(ROWS)).schedule == {"rows": 63}
    few = predict(known[:2], (800, 64), space(ROWS))
    assert (few.method, few.schedule, few.ratio, few.shapes) == ("default", {}, 1.0, 2)
    none = predict([], (800, 64), space(ROWS))
    assert (none.method, none.regret, none.shapes) == ("default", 1.0, 0)


def test_a_gain_within_the_margin_is_none() -> None:
    known = records_of(
        lambda shape, s: 0.995 if s["rows"] == 31 else 1.0, ROWS, [100, 400, 1600, 6400]
    )
    assert predict(known, (800, 64), space(ROWS)).method == "default"


def test_what_is_not_legal_for_the_new_kernel_is_not_predicted() -> None:
    narrow = space(ROWS, legal=lambda s: s["rows"] != 63)
    known = records_of(moving, ROWS, [63, 255, 1023, 4095, 8191])
    found = predict(known, (1700, 64), narrow)
    assert (found.method, found.schedule) == ("model", {"rows": 31})
    alike = records_of(lambda shape, s: valley(6.0, float(s["rows"])), ROWS, [100, 400, 1600])
    assert predict(alike, (800, 64), narrow).method == "default"


def test_what_changes_bits_is_not_predicted_where_bits_are_kept() -> None:
    def time(shape: Sequence[int], s: Schedule) -> float:
        return (0.5 if s["sums"] == 15 else 1.0) * (0.9 if s["rows"] == 31 else 1.0)

    tried: list[Mapping[str, Setting]] = [{"sums": 15}, {"rows": 31}, {"rows": 31, "sums": 15}]
    known = [
        record((n, 64), time, [ROWS, SUMS], tried, numerics="any") for n in (100, 400, 1600, 6400)
    ]
    found = predict(known, (800, 64), space(ROWS, SUMS))
    assert found.schedule == {"rows": 31, "sums": 15}
    kept = predict(known, (800, 64), space(ROWS, SUMS, keep_bits=True))
    assert kept.schedule == {"rows": 31}
    assert kept.ratio == pytest.approx(0.9, rel=1e-3)


def test_settings_that_the_new_kernel_does_not_have_are_passed_over() -> None:
    known = records_of(lambda shape, s: valley(6.0, float(s["rows"])), ROWS, [100, 400, 1600])
    smaller = Tunable("rows", 15, (7, 15, 31))
    assert predict(known, (800, 64), space(smaller)).schedule == {"rows": 31}
    assert predict(known, (800, 64), space(ORDER)).method == "default"
    assert predict(known, (800, 64, 3), space(ROWS)).shapes == 0


def test_predictions_and_records_without_trials_are_no_evidence() -> None:
    known = records_of(lambda shape, s: valley(6.0, float(s["rows"])), ROWS, [100, 400, 1600])
    guesses = [dataclasses.replace(r, origin="predicted") for r in known]
    assert predict(guesses, (800, 64), space(ROWS)).shapes == 0
    bare = [dataclasses.replace(r, tried=(), defaults={}) for r in known]
    assert predict(bare, (800, 64), space(ROWS)).schedule == {"rows": 63}


def test_seeds_come_from_both_methods_even_where_they_prove_nothing() -> None:
    known = records_of(moving, ROWS, [63, 4095])
    # By its nearest shape 7, by the model something between that and 127 of the other.
    found = [s["rows"] for s in seeds(known, (200, 64), space(ROWS))]
    assert found
    assert set(found) <= {1, 3, 7, 31}
    assert seeds([], (200, 64), space(ROWS)) == []
    assert seeds(known[:1], (70, 64), space(ROWS)) == [{"rows": 1}]


def test_records_keep_trials_from_the_fastest_to_the_slowest() -> None:
    many = Tunable("rows", 0, tuple(range(200)))
    kept = record((8, 8), lambda shape, s: 1.0 + float(s["rows"]), [many], all_but_default(many))
    assert len(kept.tried) == MOST_TRIED
    ratios = [ratio for _, ratio in kept.tried]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (1.0, 200.0)


def paper_records(folder: Path, widths: Sequence[int], known: Records | None = None) -> Records:
    """Records of kernels that were tuned on paper to the end."""
    bench = PaperBench()
    made = Tuner(
        [paper_kernel(width, bench) for width in widths],
        emit,
        PAPER,
        Journal(folder / "journal.log"),
        known,
        keep_bits=False,
    )
    made.run(math.inf)
    return made.results()


def test_tuned_shapes_predict_another_one(tmp_path: Path) -> None:
    known = paper_records(tmp_path, (16, 32, 64, 128))
    assert all(len(r.tried) == r.trials for r in known)
    assert all(r.defaults["tile"] == 2 for r in known)
    new = site(48)
    structure, shape = structure_of(new)
    found = predict(known.relatives(structure, PAPER.name), shape, Space.of(new, emit))
    assert found.schedule == {"tile": 4, "unroll": 2, "chains": 2}
    assert found.shapes == 4
    assert found.ratio == pytest.approx(0.8 / (1.4 * 1.1), rel=0.01)


def test_tuner_tries_predictions_first(tmp_path: Path) -> None:
    known = paper_records(tmp_path / "known", (16, 32, 64, 128))
    bench = PaperBench()
    made = Tuner(
        [paper_kernel(48, bench)],
        emit,
        PAPER,
        Journal(tmp_path / "new.log"),
        known,
        keep_bits=False,
    )
    made.run(math.inf)
    first = made.reports[0].study.trials()[1]
    wanted = {"tile": 4, "unroll": 2, "chains": 2}
    assert {k: v for k, v in first.schedule.items() if k in wanted} == wanted
