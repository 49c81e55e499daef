"""Times of kernels beside their rooflines."""

import pytest

from nemoc.autotune.measure import Roofs
from nemoc.kernel_times import step_report
from nemoc.runtime.costs import FunctionCosts, LaunchCost, OpCost
from nemoc.runtime.step_times import StepTimes

ROOFS = Roofs(bandwidth=100.0, arithmetic=1000.0)


def op(name: str, weight: str = "", cost: tuple[str, str, str] | None = ("0", "0", "0")) -> OpCost:
    return OpCost(name, weight, False, cost)


UP = ("10*L", "50 + T", "50")
COSTS = FunctionCosts(
    ops=(
        op("linear", "layers.0.mixer.up_proj.weight-0123456789", UP),
        op("attention", "", ("4000*L", "0", "8")),
        op("linear", "layers.11.mixer.up_proj.weight-abcdef0123", UP),
        op("mine", "layers.1.scale", None),
    ),
    phases=(
        (LaunchCost("up", 0), LaunchCost("mine", 3)),
        (LaunchCost("split", 1),),
        (LaunchCost("merge", 1), LaunchCost("up", 2)),
    ),
)


def step(*seconds: float, length: int = 1, waiting: float = 0.0) -> StepTimes:
    return StepTimes("decode", (1, length, 64), sum(seconds) + 0.5, seconds, waiting)


def test_ops_with_the_same_kernels_have_one_line_the_longest_first() -> None:
    found = step_report([[step(2, 1, 6, 1, 3)]], 10, COSTS, ROOFS)
    lines = [(k.op, k.weights, k.kernels, k.sites, k.seconds) for k in found.kernels]
    assert lines == [
        ("attention", (), ("split", "merge"), 1, 7),
        ("linear", ("up_proj",), ("up",), 2, 5),
        ("mine", ("scale",), ("mine",), 1, 1),
    ]
    assert (found.tokens, found.cached, found.seconds) == (1, 10, 13.5)
    assert found.outside == pytest.approx(0.5)


def test_the_roofline_is_the_longer_of_memory_and_arithmetic_of_each_op() -> None:
    attention, linear, mine = step_report([[step(2, 1, 6, 1, 3)]], 10, COSTS, ROOFS).kernels
    assert (attention.flops, attention.moved, attention.least) == (4000, 8, 4)
    assert attention.roofline == pytest.approx(4 / 7)
    assert (linear.flops, linear.moved) == (20, 2 * 110)
    assert linear.roofline == pytest.approx(2.2 / 5)
    assert (mine.flops, mine.moved, mine.least, mine.roofline) == (None, None, None, None)


def test_integers_are_no_arithmetic() -> None:
    products = OpCost("linear", "", True, ("9000", "100", "0"))
    costs = FunctionCosts((products,), ((LaunchCost("up", 0),),))
    (found,) = step_report([[step(2.0)]], 0, costs, ROOFS).kernels
    assert (found.flops, found.least) == (9000, 1)


def test_prompts_in_several_steps_are_added_up_each_behind_those_before() -> None:
    runs = [[step(1, 1, 1, 1, 1, length=4), step(2, 2, 2, 2, 2, length=3)]]
    found = step_report(runs, 0, COSTS, ROOFS)
    linear = next(k for k in found.kernels if k.op == "linear")
    assert found.tokens == 7
    assert (linear.seconds, linear.flops) == (6, 2 * 10 * 7)
    assert linear.moved == 2 * (100 + 100 + 4)


def test_times_are_medians_of_runs() -> None:
    runs = [[step(*([seconds] * 5), waiting=seconds)] for seconds in (1.0, 50.0, 3.0)]
    found = step_report(runs, 0, COSTS, ROOFS)
    assert {k.op: k.seconds for k in found.kernels} == {"attention": 6, "linear": 6, "mine": 3}
    assert (found.seconds, found.waiting) == (15.5, 3)
