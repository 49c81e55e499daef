"""Interleaved timing, on a clock that the test winds."""

import torch

from nemoc.autotune.measure import Roofs, Timing, interleaved, measured_roofs


def test_candidates_run_in_turn_after_warming_up() -> None:
    order: list[str] = []
    interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1
    )
    assert order == ["a", "b"] * 3


def test_each_candidate_gets_its_own_times() -> None:
    now = 0.0

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    timings = interleaved(
        {"fast": lambda: passing(1.0), "slow": lambda: passing(3.0)},
        rounds=3,
        clock=lambda: now,
    )
    assert timings["fast"].seconds == (1.0, 1.0, 1.0)
    assert timings["slow"].median == 3.0


def test_spread_is_half_the_quartile_distance_relative_to_the_median() -> None:
    assert Timing((2.0, 2.0, 2.0)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0)).spread == 0.5
    assert Timing((5.0,)).spread == 0.0


def test_a_roof_is_the_longer_of_reading_and_arithmetic() -> None:
    roofs = Roofs(bandwidth=100.0, arithmetic=1000.0)
    assert (roofs.seconds(200.0, 1000.0), roofs.seconds(50.0, 4000.0)) == (2.0, 4.0)


def test_measuring_a_roof_leaves_torch_its_threads() -> None:
    before = torch.get_num_threads()
    roofs = measured_roofs(before + 1, rounds=1)
    assert roofs.bandwidth > 0.0 and roofs.arithmetic > 0.0
    assert torch.get_num_threads() == before
