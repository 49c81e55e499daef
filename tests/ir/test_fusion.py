"""Making regions of nodes and nodes of regions: what is legal, what is named how, and that no bit changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemoc.ir import Graph, IRError, Node, interpret, ops, parse, verify
from nemoc.ir.fusion import fuse, inline, obstacle
from nemoc.ir.region import Folded, Fused
from nemoc.ir.sample_inputs import sample_arguments
from support.graphs import SIZES, graphs

CHAIN = """graph @g {
  input %x: f32[B, 8]
  param %w: f32[8]

  %a = mul(%x, %w) : f32[B, 8]
  %b = silu(%a) : f32[B, 8]
  %c = exp(%b) : f32[B, 8]
  %d = add(%a, %c) : f32[B, 8]
  %e = tanh(%d) : f32[B, 8]
  return %e, %b
}
"""

STATES = """graph @g {
  input %x: f32[B, L, 8]
  input %valid: i32[B] < L + 1
  state %s: f32[B, 3, 8]
  param %w: f32[8, 4]

  %old = slice(%s) {axis=1, start=2, stop=3} : f32[B, 1, 8]
  %y, %next = causal_conv(%x, %w, _, %s, %valid) : f32[B, L, 8], f32[B, 3, 8]
  %z = add(%y, %old) : f32[B, L, 8]
  return %z
  update %s = %next
}
"""


def pick(graph: Graph, names: str) -> list[Node]:
    """The nodes that define values of these names."""
    return [n for n in graph.nodes if any(v.name in names.split() for v in n.results)]


def regions(graph: Graph) -> list[Fused]:
    return [n.op for n in graph.nodes if isinstance(n.op, Fused)]


def is_fused(node: Node) -> bool:
    return isinstance(node.op, Fused)


def same_results(a: Graph, b: Graph, sizes: dict[str, int]) -> bool:
    """Whether two graphs give the same bits."""
    arguments = sample_arguments(b, sizes)
    found, expected = interpret(a, arguments), interpret(b, arguments)
    pairs = [*zip(found.outputs, expected.outputs, strict=True)]
    pairs += [(found.states[name], t) for name, t in expected.states.items()]
    return all(torch.equal(x.nan_to_num(0.5), y.nan_to_num(0.5)) for x, y in pairs)


def test_a_region_keeps_the_names_of_what_others_read() -> None:
    graph = parse(CHAIN)
    after = fuse(graph, pick(graph, "b c d"), "middle")
    verify(after)
    assert [[v.name for v in n.results] for n in after.nodes] == [["a"], ["b", "d"], ["e"]]
    assert after.outputs == graph.outputs
    (region,) = regions(after)
    assert region.kind == "middle"
    assert [v.name for v in region.args] == ["a"]
    assert [type(n.op) for n in region.body.nodes] == [ops.Silu, ops.Exp, ops.Add]
    assert same_results(after, graph, {"B": 3})


def test_the_order_in_which_nodes_are_named_does_not_matter() -> None:
    graph = parse(CHAIN)
    nodes = pick(graph, "a c b")
    assert str(fuse(graph, nodes[::-1], "k")) == str(fuse(graph, nodes, "k"))


def test_what_comes_back_by_way_of_others_is_no_region() -> None:
    graph = parse(CHAIN)
    assert (
        obstacle(graph, pick(graph, "a c d"))
        == "its exp depends on %b, which depends on the region"
    )
    with pytest.raises(
        IRError, match="g: cannot fuse k: its add depends on %b, which depends on the region"
    ):
        fuse(graph, pick(graph, "a d"), "k")


def test_nodes_that_do_not_touch_are_a_region() -> None:
    graph = parse(CHAIN.replace("exp(%b)", "exp(%x)"))
    after = fuse(graph, pick(graph, "b c"), "k")
    verify(after)
    assert same_results(after, graph, {"B": 3})


def test_a_region_stands_behind_all_it_needs_and_before_all_that_need_it() -> None:
    graph = parse("""graph @g {
      input %x: f32[B, 8]

      %a = exp(%x) : f32[B, 8]
      %user = tanh(%a) : f32[B, 8]
      %late = silu(%x) : f32[B, 8]
      %b = add(%a, %late) : f32[B, 8]
      %other = relu(%x) : f32[B, 8]
      return %user, %b, %other
    }""")
    after = fuse(graph, pick(graph, "a b"), "k")
    verify(after)
    assert [n.results[0].name for n in after.nodes] == ["late", "a", "user", "other"]


def test_constants_of_the_artifact_stay_outside() -> None:
    graph = parse("""graph @g {
      input %x: f32[B, 8]
      param %w: bf16[8]

      %wide = folded([%w]) : f32[8] {
        input %p: bf16[8]
        %cast = cast(%p) {dtype=f32} : f32[8]
        return %cast
      }
      %y = mul(%x, %wide) : f32[B, 8]
      return %y
    }""")
    assert isinstance(graph.nodes[0].op, Folded)
    assert obstacle(graph, graph.nodes) == "%wide is computed when the artifact is built"
    assert obstacle(graph, graph.nodes[1:]) is None


def test_an_old_state_is_not_read_beside_its_update() -> None:
    graph = parse(STATES)
    reason = "its slice reads %s as it was before causal_conv"
    assert obstacle(graph, graph.nodes) == reason
    assert obstacle(graph, pick(graph, "y z")) is None


def test_unread_and_foreign_nodes_are_refused() -> None:
    graph = parse(CHAIN.replace("return %e, %b", "return %b"))
    with pytest.raises(IRError, match="nobody reads its results"):
        fuse(graph, pick(graph, "d e"), "k")
    with pytest.raises(IRError, match="no such node"):
        fuse(graph, parse(CHAIN).nodes[:1], "k")


def test_regions_among_the_nodes_are_merged() -> None:
    graph = parse(CHAIN)
    inner = fuse(graph, pick(graph, "b c"), "inner")
    outer = fuse(inner, inner.nodes[1:], "outer")
    (region,) = regions(outer)
    assert region.kind == "outer"
    assert region.body == regions(fuse(graph, graph.nodes[1:], "outer"))[0].body
    assert same_results(outer, graph, {"B": 3})


def test_two_regions_one_after_another() -> None:
    graph = parse(CHAIN)
    after = fuse(graph, pick(graph, "a b"), "first")
    after = fuse(after, pick(after, "c d e"), "second")
    verify(after)
    assert [r.kind for r in regions(after)] == ["first", "second"]
    assert same_results(after, graph, {"B": 3})
    assert inline(after, is_fused).nodes[-1].results == graph.nodes[-1].results


def test_equal_nodes_on_other_values_give_equal_bodies() -> None:
    graph = parse("""graph @g {
      input %x: f32[B, 8]
      input %y: f32[B, 8]

      %a = silu(%x) : f32[B, 8]
      %b = mul(%a, %x) : f32[B, 8]
      %c = silu(%y) : f32[B, 8]
      %d = mul(%c, %y) : f32[B, 8]
      return %b, %d
    }""")
    after = fuse(fuse(graph, pick(graph, "a b"), "k"), pick(graph, "c d"), "k")
    one, two = regions(after)
    assert one.body == two.body and hash(one.body) == hash(two.body)
    assert one.body.digest == two.body.digest
    assert one.args != two.args
    swapped = parse(str(graph).replace("mul(%c, %y)", "mul(%y, %c)"))
    third = regions(fuse(swapped, pick(swapped, "c d"), "k"))[0]
    assert third.body != one.body


def test_text_comes_back_equal() -> None:
    graph = parse(CHAIN)
    after = fuse(graph, pick(graph, "b c d"), "two words")
    again = parse(str(after))
    assert again == after and str(again) == str(after)
    assert again != fuse(graph, pick(graph, "b c d"), "other")


def test_inlining_puts_the_nodes_back() -> None:
    graph = parse(CHAIN)
    after = inline(fuse(graph, pick(graph, "b c d"), "k"), is_fused)
    verify(after)
    assert after == graph
    assert [n.results[0].name for n in after.nodes] == ["a", "b", "b.exp", "d", "e"]


def test_inlining_takes_only_what_is_wanted() -> None:
    graph = parse(CHAIN)
    assert inline(graph, is_fused) is graph
    after = fuse(fuse(graph, pick(graph, "a b"), "first"), pick(graph, "d e"), "second")
    assert inline(after, lambda node: False) is after
    left = inline(after, lambda node: isinstance(node.op, Fused) and node.op.kind == "first")
    assert [r.kind for r in regions(left)] == ["second"]
    assert same_results(left, graph, {"B": 3})


def test_inlining_a_body_that_hands_an_operand_through() -> None:
    graph = parse("""graph @g {
      input %x: f32[B, 8]

      %a, %b, %c = fused([%x]) {kind="k"} : f32[B, 8], f32[B, 8], f32[B, 8] {
        input %p: f32[B, 8]
        %y = exp(%p) : f32[B, 8]
        return %p, %y, %y
      }
      %z = add(%a, %c) : f32[B, 8]
      return %z, %a, %b
    }""")
    after = inline(graph, is_fused)
    verify(after)
    assert [type(n.op) for n in after.nodes] == [ops.Exp, ops.Add]
    assert after.outputs[1] is graph.inputs[0]
    assert same_results(after, graph, {"B": 3})


def passes_by(graph: Graph, chosen: set[Node]) -> bool:
    """Whether a node outside is between nodes of a set: it needs one, and one needs it."""
    behind: set[Node] = set()
    for node in graph.nodes:
        before = {graph.producers[v] for v in node.op.operands() if v in graph.producers}
        if before & (behind | chosen):
            behind.add(node)
    ahead: set[Node] = set()
    for node in reversed(graph.nodes):
        after = {user for v in node.results for user in graph.uses.get(v, ())}
        if after & (ahead | chosen):
            ahead.add(node)
    return bool((behind & ahead) - chosen)


@given(graph=graphs(), data=st.data())
def test_obstacles_are_those_of_the_definition(graph: Graph, data: st.DataObject) -> None:
    chosen = [n for n in graph.nodes if data.draw(st.integers(0, 2)) > 0]
    if not chosen:
        return
    stale = any(
        getattr(n.op, field) in other.op.operands()
        for n in chosen
        for field in n.op.updates.values()
        for other in chosen
        if other is not n
    )
    assert (obstacle(graph, chosen) is not None) == (passes_by(graph, set(chosen)) or stale)


@given(graph=graphs(), data=st.data())
def test_fused_random_graphs_keep_every_bit(graph: Graph, data: st.DataObject) -> None:
    """Two rounds of regions of whatever nodes can be one, then all of them taken apart."""
    after = graph
    for _ in range(2):
        chosen: list[Node] = []
        for node in after.nodes:
            if data.draw(st.booleans()) and obstacle(after, [*chosen, node]) is None:
                chosen.append(node)
        if any(after.uses.get(v) or v in after.results for n in chosen for v in n.results):
            after = fuse(after, chosen, "random")
    verify(after)
    assert parse(str(after)) == after
    assert same_results(after, graph, SIZES)
    apart = inline(after, is_fused)
    verify(apart)
    assert not regions(apart)
    assert same_results(apart, graph, SIZES)


def test_a_copy_stays_for_those_who_read_it_elsewhere() -> None:
    graph = parse(CHAIN)
    fused = fuse(graph, pick(graph, "c d"), "test", pick(graph, "b"))
    verify(fused)
    assert same_results(fused, graph, SIZES)
    (region,) = regions(fused)
    assert [n.op.mnemonic() for n in region.body.nodes] == ["silu", "exp", "add"]
    assert [v.name for v in region.operands()] == ["a"]
    assert sorted(n.op.mnemonic() for n in fused.nodes) == ["fused", "mul", "silu", "tanh"]


def test_copies_may_lie_between_the_nodes() -> None:
    """The region has its own `b`, so that nothing it needs comes back from outside."""
    graph = parse(CHAIN)
    assert obstacle(graph, pick(graph, "a c d")) is not None
    assert obstacle(graph, pick(graph, "a c d"), pick(graph, "b")) is None
    fused = fuse(graph, pick(graph, "a c d"), "test", pick(graph, "b"))
    verify(fused)
    assert same_results(fused, graph, SIZES)
    assert {v.name for n in fused.nodes if is_fused(n) for v in n.results} == {"a", "d"}


def test_a_state_is_not_updated_twice() -> None:
    graph = parse(STATES)
    reason = obstacle(graph, pick(graph, "z"), pick(graph, "y"))
    assert reason == "%y is a state, which is updated once"


@given(graph=graphs(), data=st.data())
def test_fusing_with_copies_keeps_every_bit(graph: Graph, data: st.DataObject) -> None:
    kinds = [data.draw(st.sampled_from("-fc")) for _ in graph.nodes]
    nodes = [n for n, k in zip(graph.nodes, kinds, strict=True) if k == "f"]
    copied = [n for n, k in zip(graph.nodes, kinds, strict=True) if k == "c"]
    if not nodes or obstacle(graph, nodes, copied) is not None:
        return
    try:
        fused = fuse(graph, nodes, "test", copied)
    except IRError as error:
        assert "nobody reads its results" in str(error)
        return
    verify(fused)
    assert parse(str(fused)) == fused
    assert same_results(fused, graph, SIZES)
