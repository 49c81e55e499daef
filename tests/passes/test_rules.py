"""Facts that canonicalize's rules stand on."""

import itertools

import pytest
import torch

from nemoc.ir import DType, interpret, parse
from nemoc.ir.rewrite import rewrite
from nemoc.passes.canonicalize import RULES
from nemoc.passes.check import same_bits
from nemoc.passes.rules.casts import holds


def _special_values(dtype: DType) -> torch.Tensor:
    if dtype is DType.BOOL:
        return torch.tensor([False, True])
    if not dtype.is_float:
        whole = torch.iinfo(dtype.torch)
        return torch.tensor(
            [whole.min, whole.min + 1, 0, 1, 7, whole.max - 1, whole.max], dtype=dtype.torch
        )
    if dtype.bytes <= 2:  # all of them
        bits = torch.arange(2 ** (8 * dtype.bytes), dtype=torch.int32)
        return bits.to(torch.uint8 if dtype.bytes == 1 else torch.uint16).view(dtype.torch)
    info = torch.finfo(dtype.torch)
    values = [0.0, -0.0, info.tiny, info.tiny * info.eps, info.eps, 1 + info.eps, 1 / 3, info.max]
    values += [-v for v in values] + [float("inf"), float("-inf"), float("nan"), 65520.0, 448.0]
    return torch.tensor(values, dtype=dtype.torch)


@pytest.mark.parametrize("narrow", list(DType), ids=str)
def test_a_type_that_holds_another_gives_every_value_back(narrow: DType) -> None:
    values = _special_values(narrow)
    for wide in DType:
        if holds(wide, narrow):
            assert same_bits(values.to(wide.torch).to(narrow.torch), values), wide


def test_types_that_hold_others() -> None:
    pairs = {
        (a.value, b.value) for a, b in itertools.product(DType, DType) if a != b and holds(a, b)
    }
    assert pairs >= {
        ("f32", "bf16"),
        ("f32", "f16"),
        ("bf16", "f8e4m3"),
        ("i32", "u8"),
        ("i8", "bool"),
    }
    assert not pairs & {
        ("bf16", "f16"),
        ("f16", "bf16"),
        ("i8", "u8"),
        ("u8", "i8"),
        ("f64", "i32"),
    }


@pytest.mark.parametrize("narrow", list(DType), ids=str)
def test_widening_in_between_changes_no_bit(narrow: DType) -> None:
    values = _special_values(narrow)
    for wide, last in itertools.product(DType, DType):
        if holds(wide, narrow) and last.is_float == narrow.is_float:
            direct = values.to(last.torch)
            assert same_bits(values.to(wide.torch).to(last.torch), direct), (wide, last)


def test_rule_names_are_unique() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and " " not in name for name in names)


def test_rules_state_their_algebra() -> None:
    assert all(rule.apply.__doc__ and "=" in rule.apply.__doc__ for rule in RULES)


SPECIAL = """graph @g {
  input %x: f32[B]

  %one = scale(%x) {factor=1.0} : f32[B]
  %still = shift(%one) {amount=-0.0} : f32[B]
  %ones = full() {value=1.0, dtype=f32, shape=[B]} : f32[B]
  %product = mul(%still, %ones) : f32[B]
  %quotient = div(%product, %ones) : f32[B]
  %minus = full() {value=-0.0, dtype=f32, shape=[B]} : f32[B]
  %total = add(%minus, %quotient) : f32[B]
  %wide = cast(%total) {dtype=f64} : f64[B]
  %back = cast(%wide) {dtype=f32} : f32[B]
  %relu = relu(%back) : f32[B]
  %same = relu(%relu) : f32[B]
  %shifted = shift(%x) {amount=0.0} : f32[B]
  %plus = full() {value=0.0, dtype=f32, shape=[B]} : f32[B]
  %added = add(%plus, %x) : f32[B]
  return %back, %same, %shifted, %added
}
"""


def test_special_values_keep_their_bits() -> None:
    graph = parse(SPECIAL)
    after = rewrite(graph, RULES)
    assert after.outputs[0] is graph.inputs[0]
    arguments = {"x": _special_values(DType.F32)}
    for a, b in zip(
        interpret(graph, arguments).outputs, interpret(after, arguments).outputs, strict=True
    ):
        assert same_bits(a, b)
