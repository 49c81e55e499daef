"""Interleaved timing, on a clock that the test winds."""

from nemoc.autotune.measure import Timing, interleaved


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
