"""The rewriting driver: names survive, rules come to rest or are named, substitution reaches everything."""

import pytest

from nemoc.ir import IRError, Op, interpret, ops, parse, verify
from nemoc.ir.dims import B
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite, substitute_dims
from nemoc.ir.sample_inputs import sample_arguments

GRAPH = """graph @g {
  input %x: f32[B, 4]
  state %s: f32[B, 4]

  %a = scale(%x) {factor=2.0} : f32[B, 4]
  %b = silu(%a) : f32[B, 4]
  return %a, %b
  update %s = %a
}
"""


def _split_scale(op: Op, rewriter: Rewriter) -> Replacement:
    assert isinstance(op, ops.Scale)
    if op.factor != 2.0:
        return None
    return rewriter(ops.Scale(rewriter(ops.Scale(op.x, 4.0)), 0.5))


def test_new_ops_define_the_values_they_replace() -> None:
    graph = parse(GRAPH, "g.ir")
    after = rewrite(graph, (Rule("split", ops.Scale, _split_scale),))
    verify(after)
    assert [[v.name for v in n.results] for n in after.nodes] == [["v"], ["a"], ["b"]]
    assert [n.location for n in after.nodes] == ["g.ir:5", "g.ir:5", "g.ir:6"]
    assert after.nodes[2] is graph.nodes[1]
    assert after.next_states == graph.next_states


def test_nothing_fires_gives_the_same_object() -> None:
    graph = parse(GRAPH)
    assert rewrite(graph, (Rule("never", Op, lambda op, r: None),)) is graph
    assert rewrite(graph, ()) is graph


def test_trial_ops_of_a_rule_that_declines_are_taken_back() -> None:
    def try_and_decline(op: Op, rewriter: Rewriter) -> Replacement:
        rewriter(ops.Exp(op.operands()[0]))
        return None

    graph = parse(GRAPH)
    assert rewrite(graph, (Rule("decline", ops.Silu, try_and_decline),)) is graph


def test_refused_application_changes_nothing() -> None:
    graph = parse(GRAPH)
    rule = Rule("split", ops.Scale, _split_scale)
    assert rewrite(graph, (rule,), on_apply=lambda rule, node: False) is graph


def test_rules_that_never_rest_are_named() -> None:
    def turn(op: Op, rewriter: Rewriter) -> Replacement:
        assert isinstance(op, ops.Scale)
        return rewriter(ops.Scale(op.x, -op.factor))

    with pytest.raises(IRError, match=r"g: the rules \['turn'\] still fire after 5 sweeps"):
        rewrite(parse(GRAPH), (Rule("turn", ops.Scale, turn),), fuel=5)


def test_replacement_of_another_type_is_refused() -> None:
    def narrow(op: Op, rewriter: Rewriter) -> Replacement:
        return rewriter(ops.Sum(op.operands()[0], 1))

    with pytest.raises(IRError, match=r"g.ir:6: rule narrow replaces f32\[B, 4\] by f32\[B\]"):
        rewrite(parse(GRAPH, "g.ir"), (Rule("narrow", ops.Silu, narrow),))


def test_one_value_may_take_the_place_of_several() -> None:
    text = """graph @g {
      input %x: f32[B, 1, 6]
      input %valid: i32[B] < 2
      param %w: f32[6, 2]
      state %s: f32[B, 1, 6]
      %y, %t = causal_conv(%x, %w, _, %s, %valid) : f32[B, 1, 6], f32[B, 1, 6]
      %z = add(%y, %t) : f32[B, 1, 6]
      return %y, %z
      update %s = %t
    }"""

    def both(op: Op, rewriter: Rewriter) -> Replacement:
        assert isinstance(op, ops.CausalConv)
        e = rewriter(ops.Exp(op.x))
        return e, e

    after = rewrite(parse(text), (Rule("both", ops.CausalConv, both),))
    verify(after)
    assert [line.strip() for line in str(after).splitlines()[-5:-1]] == [
        "%y = exp(%x) : f32[B, 1, 6]",
        "%z = add(%y, %y) : f32[B, 1, 6]",
        "return %y, %z",
        "update %s = %y",
    ]


def test_substitution_reaches_types_bounds_attributes_and_bodies() -> None:
    text = """graph @g {
      input %x: f32[B, L, 4]
      input %valid: i32[B] < L + 1
      %v = reshape(%x) {shape=[B*L, 4]} : f32[B*L, 4]
      %f = full() {value=1.0, dtype=f32, shape=[L]} : f32[L]
      %y = folded([%v, %f]) : f32[B*L, 2, 2] {
        input %p: f32[B*L, 4]
        input %q: f32[L]
        %r = reshape(%p) {shape=[B*L, 2, 2]} : f32[B*L, 2, 2]
        return %r
      }
      return %y, %valid
    }"""
    graph = parse(text)
    one = substitute_dims(graph, {"L": 1}, name="one")
    verify(one)
    assert one.name == "one" and "L" not in str(one)
    assert one == parse(
        text.replace("@g", "@one").replace("B*L", "B").replace("L + 1", "2").replace("L", "1")
    )
    two = substitute_dims(graph, {"L": 2 * B})
    assert "f32[2*B**2, 2, 2]" in str(two)
    arguments = sample_arguments(graph, {"B": 2, "L": 1})
    for a, b in zip(
        interpret(graph, arguments).outputs, interpret(one, arguments).outputs, strict=True
    ):
        assert a.equal(b)


def test_substitution_that_does_not_hold_is_located() -> None:
    text = "graph @g {\n input %x: f32[B, L]\n %y = slice(%x) {axis=1, start=2, stop=3} : f32[B, 1]\n return %y\n}"
    with pytest.raises(IRError, match=r"g\.ir:3: slice: 2:3 is no range"):
        substitute_dims(parse(text, "g.ir"), {"L": 2})
