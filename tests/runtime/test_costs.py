"""What artifacts say of the ops behind launches."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import sympy

from nemoc.codegen.plan import Address, Job, Kernel, Launch, StepFunction
from nemoc.ir import NemocError
from nemoc.ir.dims import B, L, T
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import Linear
from nemoc.ir.ops.int8 import RoundToInt8
from nemoc.ir.types import TensorType, Value
from nemoc.runtime.costs import CostRecord

SIZES = {"B": 3, "L": 5, "C": 64, "T": 7}


def value(*shape: Any, dtype: DType = DType.F32) -> Value:
    return Value("x", TensorType.of(dtype, shape))


def record(*jobs: Job) -> CostRecord:
    """A function with a launch for each job, the first two side by side."""
    launches = [Launch(Kernel(f"kernel{i}", "", 1), (Address("a"),), i) for i, _ in enumerate(jobs)]
    phases = (tuple(launches[:2]), *((launch,) for launch in launches[2:]))
    return CostRecord.of([StepFunction("step", ("a",), phases, jobs)])


def again(given: CostRecord) -> CostRecord:
    return CostRecord.from_json(json.loads(given.to_text()), "costs.json")


def linear() -> Op:
    return Linear(value(B, L, 16), value(32, 16, dtype=DType.BF16))


def test_a_record_is_read_as_it_was_written() -> None:
    given = record(Job(linear(), "layers.0.up"), Job(linear()), Job(linear(), "layers.1.up"))
    assert again(given) == given
    function = again(given).functions["step"]
    assert [len(phase) for phase in function.phases] == [2, 1]
    assert [(n.kernel, n.op) for n in function.launches] == [
        ("kernel0", 0),
        ("kernel1", 1),
        ("kernel2", 2),
    ]
    assert [op.weight for op in function.ops] == ["layers.0.up", "", "layers.1.up"]
    assert function.ops[0].op == "linear"


def test_costs_are_those_of_the_op_at_any_size() -> None:
    (op,) = again(record(Job(linear()))).functions["step"].ops
    assert op.at(SIZES) == (2 * 15 * 16 * 32, 15 * 16 * 4 + 16 * 32 * 2 + 15 * 32 * 4)


def test_expectations_have_powers_that_no_dimension_may_have() -> None:
    class Routed(Linear):
        def flops(self) -> Any:
            return B * L * T - 4 * (1 - (1 - 1 / (2 * B / B)) ** (B * L))

    (op,) = again(record(Job(Routed(value(B, L, 16), value(32, 16))))).functions["step"].ops
    found = op.at(SIZES)
    assert found is not None
    assert found[0] == pytest.approx(3 * 5 * 7 - 4 * (1 - 0.5**15))


def test_an_op_without_a_closed_form_has_no_cost() -> None:
    class Strange(Linear):
        def flops(self) -> Any:
            return sympy.Function("steps")(B)

    (op,) = again(record(Job(Strange(value(B, L, 16), value(32, 16))))).functions["step"].ops
    assert op.at(SIZES) is None


def test_a_closed_form_without_a_value_at_a_size_is_not_known_there() -> None:
    class Strange(Linear):
        def flops(self) -> Any:
            return 12 / T

    (op,) = again(record(Job(Strange(value(B, L, 16), value(32, 16))))).functions["step"].ops
    assert op.at(SIZES | {"T": 3}) is not None
    assert op.at(SIZES | {"T": 0}) is None


def test_products_of_integers_are_told_apart() -> None:
    rounding = RoundToInt8(value(B, L, 16))
    found = again(record(Job(rounding), Job(linear()))).functions["step"].ops
    assert [op.integers for op in found] == [True, False]


def _with(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(record(Job(linear(), "w"), Job(linear())).to_text())
    change(data["functions"]["step"])
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f["phases"][0].append(["k", 2]), "phases[0][2][1] is 2"),
        (lambda f: f["phases"][0].append(["k"]), "a kernel and the number of an op"),
        (lambda f: f["ops"][0].update(integers=1), "ops[0].integers is 1"),
        (lambda f: f["ops"][0].pop("cost"), "ops[0].cost is missing"),
        (lambda f: f["ops"][0]["cost"].update(read="N*2"), "ops[0].cost.read is 'N*2'"),
        (lambda f: f["ops"][0]["cost"].update(read="9**9**9"), "ops[0].cost.read is '9**9**9'"),
        (lambda f: f["ops"][0]["cost"].update(read="__import__('os')"), "ops[0].cost.read is"),
        (lambda f: f["ops"][0]["cost"].update(read="(" * 3000), "ops[0].cost.read is"),
        (lambda f: f["ops"][0]["cost"].update(read="floor((0-1)**(1/2))"), "ops[0].cost.read is"),
        (lambda f: f["ops"][0]["cost"].update(read="Min((0-1)**(1/2),1)"), "ops[0].cost.read is"),
        (lambda f: f["phases"].append([]), "phases[1] is [], expected the launches of a phase"),
        (lambda f: f.update(more=1), "no use for a field 'more'"),
    ],
)
def test_what_is_no_record_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    with pytest.raises(NemocError) as caught:
        CostRecord.from_json(_with(change), "costs.json")
    assert str(caught.value).startswith("costs.json: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
