"""Seconds of launches from the marks of threads."""

import pytest
import torch

from nemoc.runtime.step_times import launch_seconds

US = 1000
"""Nanoseconds."""


def seconds(marks: list[list[int]], phases: list[int]) -> tuple[list[float], float]:
    """Microseconds of each launch, and of waiting."""
    found, waiting = launch_seconds(torch.tensor(marks) * US, phases)
    return [1e6 * f for f in found], 1e6 * waiting


def test_launches_take_up_all_the_time_between_first_begin_and_last_end() -> None:
    found, waiting = seconds([[0, 6, 10, 14, 16], [0, 8, 10, 12, 20]], [1, 2])
    assert found == pytest.approx([10, 10 * 6 / 16, 10 * 10 / 16])
    assert sum(found) == pytest.approx(20)
    assert waiting == pytest.approx(20 - (6 + 6 + 8 + 10) / 2)


def test_a_thread_without_tasks_waits() -> None:
    found, waiting = seconds([[0, 30], [0, 0]], [1])
    assert found == pytest.approx([30])
    assert waiting == pytest.approx(15)


def test_threads_that_come_late_to_the_first_phase_cost_its_launches_nothing() -> None:
    found, waiting = seconds([[0, 10, 90, 95], [80, 88, 90, 95]], [1, 1])
    assert found == pytest.approx([10, 5])
    assert waiting == pytest.approx(10 - 18 / 2)


def test_a_launch_too_short_for_the_clock_takes_its_share_of_its_phase() -> None:
    found, waiting = seconds([[0, 0, 4, 4, 6]], [1, 2])
    assert found == pytest.approx([4, 0, 2])
    assert waiting == pytest.approx(4)


def test_a_step_without_launches_takes_no_time() -> None:
    assert launch_seconds(torch.zeros(2, 0, dtype=torch.int64), []) == ((), 0.0)
