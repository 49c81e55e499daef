"""Spaces and searches: what can be chosen, what is tried, and in which order."""

import dataclasses
from pathlib import Path

import pytest

from nemoc.autotune.journal import Journal
from nemoc.autotune.search import Search, Space, expected_gain
from nemoc.codegen.tunables import Choices, IllegalSchedule, Tunable
from support.paper_kernels import CHAINS, TILE, emit, settings_of, site


def search(folder: Path, keep_bits: bool = False) -> Search:
    space = Space.of(site(16), emit, keep_bits)
    study = Journal(folder / "journal.log").study("one", space.tunables, {"about": "paper"})
    return Search(space, study)


def test_space_is_what_the_emitter_asks_for() -> None:
    space = Space.of(site(16), emit)
    assert [t.name for t in space.tunables] == ["tile", "unroll", "chains", "dead"]
    assert space.size == 4 * 3 * 2 * 2


def test_space_that_keeps_bits_leaves_out_what_may_change_them() -> None:
    space = Space.of(site(16), emit, keep_bits=True)
    assert CHAINS not in space.tunables
    assert TILE in space.tunables


def test_unknown_value_is_refused() -> None:
    with pytest.raises(IllegalSchedule, match=r"tile is 3, expected one of 1, 2, 4, 8"):
        emit(dataclasses.replace(site(16), choices=Choices({"tile": 3})))


def test_setting_that_nobody_asked_for_is_refused() -> None:
    choices = Choices({"tiel": 4})
    emit(dataclasses.replace(site(16), choices=choices))
    with pytest.raises(IllegalSchedule, match=r"no tunable is called 'tiel'"):
        choices.assert_used()


def test_illegal_schedule_has_no_plan() -> None:
    space = Space.of(site(16), emit)
    assert space.plan({"tile": 8, "unroll": 4}) is None
    assert space.plan({"tile": 8, "unroll": 2}) is not None


def test_default_comes_first_and_then_single_changes_next_to_it(tmp_path: Path) -> None:
    first, *others = search(tmp_path).next(4)
    assert settings_of(first.plan) == {"tile": 2, "unroll": 1, "chains": 1}
    changed = [dict(c.schedule) for c in others]
    assert changed == [{"tile": 1}, {"tile": 4}, {"unroll": 2}]


def test_search_ends_when_every_kernel_has_been_tried_once(tmp_path: Path) -> None:
    found = search(tmp_path)
    tried: list[str] = []
    while candidates := found.next(5):
        for candidate in candidates:
            number = found.study.begin(candidate.schedule)
            assert number is not None
            found.study.finish(number, candidate.plan.name, "ok", ratio=1.0, seconds=(1.0,))
            tried.append(candidate.plan.name)
    # Every legal combination but for "dead", which leads to the same kernels.
    assert len(tried) == len(set(tried)) == 2 * (4 * 3 - 1)


def test_known_schedules_of_relatives_come_before_single_changes(tmp_path: Path) -> None:
    space = Space.of(site(16), emit)
    study = Journal(tmp_path / "journal.log").study("one", space.tunables, {"about": "paper"})
    found = Search(space, study, seeds=[{"tile": 8, "warps": 4}])
    assert [dict(c.schedule) for c in found.next(2)] == [{}, {"tile": 8}]


def test_what_a_live_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    found = search(tmp_path)
    default = found.next(1)[0]
    assert found.study.begin(default.schedule) == 0
    assert default.plan.name not in {c.plan.name for c in found.next(30)}


def test_sampler_proposes_near_what_was_good(tmp_path: Path) -> None:
    found = search(tmp_path)
    for tile in (1, 2, 4, 8):
        for unroll in (1, 2):
            schedule = {"tile": tile, "unroll": unroll}
            plan = found.space.plan(schedule)
            number = found.study.begin(schedule)
            assert plan is not None and number is not None
            ratio = 0.5 if tile == 8 else 1.5
            found.study.finish(number, plan.name, "ok", ratio=ratio, seconds=(1.0,))
    proposed = [schedule["tile"] for schedule in found.study.suggestions(80)]
    assert proposed.count(8) > 28  # a quarter by chance


def test_expected_gain_shrinks_when_candidates_are_alike(tmp_path: Path) -> None:
    found = search(tmp_path)
    for i, candidate in enumerate(found.next(8)):
        number = found.study.begin(candidate.schedule)
        assert number is not None
        ratio = 1.0 + 0.3 * (i % 2)
        found.study.finish(number, candidate.plan.name, "ok", ratio=ratio, seconds=(1.0,))
    trials = found.study.trials()
    alike = [dataclasses.replace(t, ratio=1.05) for t in trials]
    assert expected_gain(trials, 10) > 10 * expected_gain(alike, 10) > 0.0
    assert expected_gain(trials, 0) == 0.0


def test_tunable_without_its_default_among_its_values_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Tunable("tile", 3, (1, 2, 4))
